"""scVI: a conditional variational autoencoder on counts."""

from dataclasses import dataclass

import torch
from torch import nn

from ...base.modeling_counts import CountsFields, CountsOutput, CountsPreTrainedModel
from ...base.modeling_finetuning import GENES
from ...base.modeling_layers import BatchNormMLP, PerturbationEmbedding, UnseenMeanEmbedding
from .configuration_scvi import SCVIConfig


# Added to the posterior's variance, so that its logarithm is finite.
_LEAST_VARIANCE = 1e-4


@dataclass
class SCVIOutput(CountsOutput):
    r"""
    What [`SCVIForPerturbation`] returns: a [`CountsOutput`], and the distribution of the latent states.

    Args:
        posterior_mean, posterior_variance (`torch.Tensor` of shape `(batch_size, set_size, latent_dim)`):
            Of the latent state of each control cell.
    """

    posterior_mean: torch.Tensor | None = None
    posterior_variance: torch.Tensor | None = None


class SCVIForPerturbation(CountsPreTrainedModel):
    r"""
    A conditional variational autoencoder on counts (Lopez et al. 2018, Nature Methods 15; here the latent state is a
    control cell's, and decoded under a perturbation), cell by cell:

        q(z | x) = N(mean(log1p x), variance(log1p x)),            x the counts of a control cell
        rho      = softmax(decoder([z, context, batch, perturbation]))
        y        ~ NB or ZINB of mean (sum of x) rho and inverse dispersion exp(r), r of each gene

    Predictions are log1p expression like those of the other families, though the model reads counts: the mean of
    `log1p(library_size y / sum of x)`, or log1p of its mean, as `prediction` says. In evaluation mode z is the posterior's
    mean. In training it is drawn, and the predictions are always log1p of the mean: the loss does not read them, and this
    costs next to nothing. [`sample_counts`] draws counts.

    A context or batch that was not seen in training (id -1) has the mean of the known ones' embeddings.

    Args:
        config ([`SCVIConfig`]): sizes and options.

    Example:
    ```python
    >>> import torch
    >>> from pertstate import SCVIConfig, SCVIForPerturbation

    >>> config = SCVIConfig.from_preset("tiny", input_dim=100, num_perturbations=5)
    >>> model = SCVIForPerturbation(config).eval()
    >>> batch = {"control_cells": torch.ones(2, 32, 100), "perturbation_ids": torch.tensor([[3], [4]])}
    >>> tuple(model(**batch).predictions.shape)
    (2, 32, 100)
    >>> tuple(model.sample_counts(**batch, generator=torch.Generator().manual_seed(0)).shape)
    (2, 32, 100)
    ```
    """

    config: SCVIConfig
    config_class = SCVIConfig
    _adapted_parts = ("encoder", "posterior_mean", "posterior_variance", "decoder")

    def __init__(self, config: SCVIConfig):
        super().__init__(config)
        hidden, act = config.hidden_size, config.hidden_act
        self.encoder = BatchNormMLP(config.input_dim, hidden, config.num_encoder_layers, act, config.hidden_dropout)
        self.posterior_mean = nn.Linear(hidden, config.latent_dim)
        self.posterior_variance = nn.Linear(hidden, config.latent_dim)
        self.perturbation_embedding = PerturbationEmbedding(
            config.perturbation_width, config.perturbation_embedding_dim
        )
        width = config.latent_dim + config.perturbation_embedding_dim
        if config.num_contexts is not None:
            self.context_embedding = UnseenMeanEmbedding(config.num_contexts, config.context_embedding_dim, "context")
            width += config.context_embedding_dim
        if config.num_batches is not None:
            self.batch_embedding = UnseenMeanEmbedding(config.num_batches, config.batch_embedding_dim, "batch")
            width += config.batch_embedding_dim
        self.decoder = BatchNormMLP(width, hidden, config.num_decoder_layers, act, 0.0)
        self._make_count_heads()
        self.post_init()

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        return super().vocabulary_axes() | {"encoder.layers.0.weight": {1: GENES}}

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
        unseen = None if self.config.num_contexts is None else self._given("context_ids", context_ids) < 0
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
        self._check_drawing()
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, {}
        )
        mean, variance = self._posterior(control_cells, cell_mask)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        perturbation = self.perturbation_embedding(perturbation_ids, perturbation_doses, perturbation_features)
        latents = mean + variance.sqrt() * noise
        decoded = self._decode(latents, perturbation, context_ids, batch_ids, control_cells, cell_mask)
        return self._draw(decoded["mean"], decoded["inverse_dispersion"], decoded["dropout_logits"], generator)

    def _posterior(self, control_cells: torch.Tensor, mask: torch.Tensor | None):
        """Mean and variance of q(z | x), (B, S, latent_dim) each."""
        hidden = self.encoder(torch.log1p(control_cells), mask)
        variance = nn.functional.softplus(self.posterior_variance(hidden)) + _LEAST_VARIANCE
        return self.posterior_mean(hidden), variance

    def _decode(self, latents, perturbation, context_ids, batch_ids, control_cells, mask) -> CountsFields:
        """The distribution of the counts of perturbed cells."""
        parts = [latents, perturbation]
        if self.config.num_contexts is not None:
            parts.append(self.context_embedding(self._given("context_ids", context_ids)).unsqueeze(1))
        if self.config.num_batches is not None:
            parts.append(self.batch_embedding(self._given("batch_ids", batch_ids)))
        hidden = self.decoder(torch.cat([part.expand(*latents.shape[:2], -1) for part in parts], dim=-1), mask)
        return self._counts(hidden, control_cells)


__all__ = ["SCVIForPerturbation", "SCVIOutput"]
