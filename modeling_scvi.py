"""scVI: a conditional variational autoencoder on counts."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .configuration_families import SCVIConfig
from .count_distributions import (
    negative_binomial_mean_log1p,
    sample_negative_binomial,
    sample_zero_inflated_negative_binomial,
)
from .modeling_perturbation import (
    BatchNormMLP,
    PerturbationEmbedding,
    PerturbationOutput,
    PerturbationPreTrainedModel,
    UnseenMeanEmbedding,
)


# Added to the posterior's variance, so that its logarithm is finite.
_LEAST_VARIANCE = 1e-4


@dataclass
class SCVIOutput(PerturbationOutput):
    r"""
    What [`SCVIForPerturbation`] returns: a [`PerturbationOutput`] whose `predictions` are log1p expression, and the
    distributions that they come from.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, set_size, input_dim)`):
            Mean count of the negative binomial distribution, at the total of the control cell. 0 where that has none.
        inverse_dispersion (`torch.Tensor` of shape `(input_dim,)`):
            Inverse dispersion of each gene.
        dropout_logits (`torch.Tensor` of shape `(batch_size, set_size, input_dim)`, *optional*):
            Log-odds of additional zeros, with `likelihood="zinb"`.
        posterior_mean, posterior_variance (`torch.Tensor` of shape `(batch_size, set_size, latent_dim)`):
            Of the latent state of each control cell.
    """

    mean: torch.Tensor | None = None
    inverse_dispersion: torch.Tensor | None = None
    dropout_logits: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_variance: torch.Tensor | None = None


class SCVIForPerturbation(PerturbationPreTrainedModel):
    r"""
    A conditional variational autoencoder on counts (Lopez et al. 2018, Nature Methods 15; here the latent state is a
    control cell's, and decoded under a perturbation), cell by cell:

        q(z | x) = N(mean(log1p x), variance(log1p x)),            x the counts of a control cell
        rho      = softmax(decoder([z, context, batch, perturbation]))
        y        ~ NB or ZINB of mean (sum of x) rho and inverse dispersion exp(r), r of each gene

    Predictions are log1p expression like those of the other families, though the model reads counts: the mean of
    `log1p(library_size y / sum of x)`, or log1p of its mean, as `prediction` says. In evaluation mode z is the posterior's
    mean. In training it is drawn, and predictions, which the loss does not read, are log1p of the mean in any case: it
    costs next to nothing. [`sample_counts`] draws counts.

    A context or batch that was not seen in training (id -1) has the mean of the known ones' embeddings.

    Args:
        config ([`SCVIConfig`]): sizes and options.

    Example:
    ```python
    >>> import torch
    >>> from cellstate import SCVIConfig, SCVIForPerturbation

    >>> config = SCVIConfig.from_preset("tiny", input_dim=100, num_perturbations=5)
    >>> model = SCVIForPerturbation(config).eval()
    >>> batch = {"control_cells": torch.ones(2, 32, 100), "perturbation_ids": torch.tensor([[3], [4]])}
    >>> tuple(model(**batch).predictions.shape)
    (2, 32, 100)
    >>> tuple(model.sample_counts(**batch, generator=torch.Generator().manual_seed(0)).shape)
    (2, 32, 100)
    ```
    """

    config_class = SCVIConfig

    def __init__(self, config: SCVIConfig):
        super().__init__(config)
        hidden, act = config.hidden_size, config.hidden_act
        self.encoder = BatchNormMLP(config.input_dim, hidden, config.num_encoder_layers, act, config.hidden_dropout)
        self.posterior_mean = nn.Linear(hidden, config.latent_dim)
        self.posterior_variance = nn.Linear(hidden, config.latent_dim)
        self.perturbation_embedding = PerturbationEmbedding(
            config.num_perturbations or config.perturbation_dim, config.perturbation_embedding_dim
        )
        width = config.latent_dim + config.perturbation_embedding_dim
        if config.num_contexts is not None:
            self.context_embedding = UnseenMeanEmbedding(config.num_contexts, config.context_embedding_dim, "context")
            width += config.context_embedding_dim
        if config.num_batches is not None:
            self.batch_embedding = UnseenMeanEmbedding(config.num_batches, config.batch_embedding_dim, "batch")
            width += config.batch_embedding_dim
        self.decoder = BatchNormMLP(width, hidden, config.num_decoder_layers, act, 0.0)
        self.share_head = nn.Linear(hidden, config.input_dim)
        if config.likelihood == "zinb":
            self.dropout_head = nn.Linear(hidden, config.input_dim)
        self.log_inverse_dispersion = nn.Parameter(torch.empty(config.input_dim))
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SCVIForPerturbation):
            init.normal_(module.log_inverse_dispersion)

    def forward(
        self,
        control_cells: torch.Tensor,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        batch_ids: torch.Tensor | None = None,
        cell_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gene_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SCVIOutput:
        """
        Inputs and errors as in [`PerturbationPreTrainedModel`]; `control_cells` (and `labels`) are raw counts. Contexts
        and batches must be given where the model was trained with them. Returns an [`SCVIOutput`].
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        mean, variance = self._posterior(control_cells, cell_mask)
        latents = mean + variance.sqrt() * torch.randn_like(mean) if self.training else mean
        perturbation = self.perturbation_embedding(perturbation_ids, perturbation_doses, perturbation_features)
        decoded = self._decode(latents, perturbation, context_ids, batch_ids, control_cells, cell_mask)
        unseen = None if self.config.num_contexts is None else context_ids < 0
        return SCVIOutput(posterior_mean=mean, posterior_variance=variance, unseen=unseen, **decoded)

    @torch.no_grad()
    def sample_counts(
        self,
        control_cells: torch.Tensor,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        batch_ids: torch.Tensor | None = None,
        cell_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        r"""
        Counts of perturbed cells, drawn from the model: a latent state from each control cell's posterior, then counts
        at that cell's total.

        Args:
            generator (`torch.Generator`, *optional*): on the model's device; the same state gives the same counts.

            The others are those of [`forward`].

        Returns:
            `torch.Tensor` of shape `(batch_size, set_size, input_dim)`: whole numbers, float.

        Raises:
            ValueError: the model is in training mode, or an input does not fit, as in [`forward`].
        """
        if self.training:
            raise ValueError("sample_counts needs evaluation mode, found training mode; call model.eval() first")
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, {}
        )
        mean, variance = self._posterior(control_cells, cell_mask)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        perturbation = self.perturbation_embedding(perturbation_ids, perturbation_doses, perturbation_features)
        latents = mean + variance.sqrt() * noise
        decoded = self._decode(latents, perturbation, context_ids, batch_ids, control_cells, cell_mask)
        expected, theta, dropout = (decoded[name] for name in ("mean", "inverse_dispersion", "dropout_logits"))
        if dropout is None:
            return sample_negative_binomial(expected, theta, generator)
        return sample_zero_inflated_negative_binomial(expected, theta, dropout, generator)

    def _posterior(self, control_cells: torch.Tensor, mask: torch.Tensor | None):
        """Mean and variance of q(z | x), (B, S, latent_dim) each."""
        hidden = self.encoder(torch.log1p(control_cells), mask)
        variance = nn.functional.softplus(self.posterior_variance(hidden)) + _LEAST_VARIANCE
        return self.posterior_mean(hidden), variance

    def _decode(self, latents, perturbation, context_ids, batch_ids, control_cells, mask) -> dict[str, torch.Tensor]:
        """Predictions and parameters of the counts' distribution, in float32."""
        parts = [latents, perturbation]
        if self.config.num_contexts is not None:
            parts.append(self.context_embedding(self._given("context_ids", context_ids)).unsqueeze(1))
        if self.config.num_batches is not None:
            parts.append(self.batch_embedding(self._given("batch_ids", batch_ids)))
        hidden = self.decoder(torch.cat([part.expand(*latents.shape[:2], -1) for part in parts], dim=-1), mask)
        shares = self.share_head(hidden).float().softmax(dim=-1)
        total = control_cells.float().sum(dim=-1, keepdim=True)
        mean, theta = total * shares, self.log_inverse_dispersion.float().exp()
        dropout = self.dropout_head(hidden).float() if self.config.likelihood == "zinb" else None
        scale = torch.ones_like(total)
        if self.config.library_size is not None:
            scale = torch.where(total > 0, self.config.library_size / total, 0.0)
        kept = 1.0 if dropout is None else torch.sigmoid(-dropout)
        if self.config.prediction == "mean_log1p" and not self.training:
            predictions = kept * negative_binomial_mean_log1p(mean, theta, scale)
        else:
            predictions = torch.log1p(kept * mean * scale)
        return {"predictions": predictions, "mean": mean, "inverse_dispersion": theta, "dropout_logits": dropout}

    @staticmethod
    def _given(name: str, ids: torch.Tensor | None) -> torch.Tensor:
        if ids is None:
            raise ValueError(f"this model was trained with {name} and needs them, found None; -1 is an unknown one")
        return ids


SCVIForPerturbation.register_for_auto_class("AutoModel")

__all__ = ["SCVIForPerturbation", "SCVIOutput"]
