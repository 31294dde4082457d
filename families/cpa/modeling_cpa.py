"""CPA: a compositional perturbation autoencoder."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ...base.messages import given
from ...base.modeling_counts import CountsFields, CountsOutput, CountsPreTrainedModel
from ...base.modeling_finetuning import (
    BATCHES,
    CONTEXTS,
    FEATURES,
    PERTURBATIONS,
    PERTURBATIONS_AND_CONTROL,
)
from ...base.modeling_layers import BatchNormMLP, PerturbationEmbedding, UnseenMeanEmbedding
from .configuration_cpa import CPAConfig


# Added to the variance of a normal distribution, whose likelihood is not bounded as it goes to 0.
_LEAST_VARIANCE = 1e-4


@dataclass
class CPAOutput(CountsOutput):
    r"""
    What [`CPAForPerturbation`] returns: a [`CountsOutput`], and in training the scores of the adversaries. With
    `likelihood="gauss"`, `mean` is that of the normal distribution and `inverse_dispersion` is None.

    Args:
        variance (`torch.Tensor` of shape `(batch_size, set_size, output_dim)`, *optional*):
            With `likelihood="gauss"`.
        basal (`torch.Tensor` of shape `(batch_size, set_size, latent_dim)`):
            The encoded control cell, before any effect is added.
        adversary_input (`torch.Tensor` of shape `(batch_size, set_size, latent_dim)`, *optional*):
            The same, detached: no gradient flows from the adversaries to the encoder by itself.
        adversary_logits (`dict[str, torch.Tensor]`, *optional*):
            Name of each adversary to scores `(batch_size, set_size, classes)`.
    """

    variance: torch.Tensor | None = None
    basal: torch.Tensor | None = None
    adversary_input: torch.Tensor | None = None
    adversary_logits: dict[str, torch.Tensor] | None = None


class CPAFields(CountsFields, total=False):
    """The fields of a [`CPAOutput`] that follow from the decoded state and the basal state."""

    variance: torch.Tensor
    unseen: torch.Tensor
    adversary_input: torch.Tensor
    adversary_logits: dict[str, torch.Tensor]


class SigmoidDoser(nn.Module):
    """
    `sigmoid(slope * dose + offset) - sigmoid(offset)` (Lotfollahi et al. 2023, Mol Syst Biol 19:e11517), slope and offset
    of each perturbation; the slope is a softplus, so that the effect never falls with the dose. A new one has slope 1 and
    offset 0.
    """

    def __init__(self, num_perturbations: int):
        super().__init__()
        self.slope = nn.Parameter(torch.empty(num_perturbations))
        self.offset = nn.Parameter(torch.empty(num_perturbations))

    def init_own_weights(self):
        init.constant_(self.slope, math.log(math.expm1(1)))
        init.zeros_(self.offset)

    def forward(self, doses: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Doses `(B, K)` of the perturbations `ids`, or `(.., P)` of all perturbations, to the factors of their rows."""
        slope: torch.Tensor = nn.functional.softplus(self.slope)
        offset: torch.Tensor = self.offset
        if ids is not None:
            slope, offset = slope[ids], offset[ids]
        return torch.sigmoid(slope * doses.to(slope.dtype) + offset) - torch.sigmoid(offset)


class Adversary(nn.Module):
    """A classifier of cells `(B, S, latent_dim)`: hidden layers with batch normalisation, then scores `(B, S, classes)`."""

    def __init__(self, config: CPAConfig, classes: int):
        super().__init__()
        self.layers = BatchNormMLP(
            config.latent_dim,
            config.adversary_hidden_size,
            config.num_adversary_layers,
            config.hidden_act,
            config.adversary_dropout,
            bias=False,
        )
        self.output = nn.Linear(config.adversary_hidden_size, classes)

    def forward(self, basal: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.output(self.layers(basal, mask))


class CPAForPerturbation(CountsPreTrainedModel):
    r"""
    The compositional perturbation autoencoder (Lotfollahi et al. 2023, Mol Syst Biol 19:e11517), cell by cell; here it
    encodes the control cell and decodes the perturbed one:

        basal = encoder(x)
        z     = basal + sum_k doser_k(dose_k) E_perturbation[k] + E_context + E_batch
        y     ~ N(mean(decoder(z)), variance(decoder(z))), or negative binomial counts

    Adversaries learn to tell perturbation, context and batch from `basal`, and the encoder learns to remove what they tell
    them by. The embeddings then carry these effects, and an unseen combination is the sum of its parts. Adversaries run in
    training mode alone, on the schedule of the objective.

    Predictions are means, clamped at 0 with `nonnegative_output`; on counts they are log1p expression, as `prediction` says.
    Contexts and batches are embedded where there are several, and must then be given; one not seen in training (id -1) has
    the mean of the known embeddings. Perturbation features go through a linear map without bias instead; scale them by the
    dose before.

    Args:
        config ([`CPAConfig`]): sizes and options.

    Example:
    ```python
    >>> import torch
    >>> from pertstate import CPAConfig, CPAForPerturbation

    >>> config = CPAConfig.from_preset("tiny", input_dim=100, num_perturbations=5, num_contexts=3)
    >>> model = CPAForPerturbation(config).eval()
    >>> outputs = model(
    ...     control_cells=torch.rand(2, 32, 100),
    ...     perturbation_ids=torch.tensor([[3, -1], [3, 4]]),
    ...     context_ids=torch.tensor([0, 2]),
    ... )
    >>> tuple(outputs.predictions.shape), tuple(outputs.basal.shape)
    ((2, 32, 100), (2, 32, 16))
    ```
    """

    config: CPAConfig
    config_class = CPAConfig
    _adapted_parts = ("encoder", "decoder")

    def __init__(self, config: CPAConfig):
        super().__init__(config)
        hidden, latent = config.hidden_size, config.latent_dim
        widths = [config.input_dim] + [hidden] * (config.num_encoder_layers - 1) + [latent]
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(a, b), nn.LayerNorm(b), ACT2FN[config.hidden_act], nn.Dropout(config.hidden_dropout)
                )
                for a, b in zip(widths[:-1], widths[1:])
            )
        )
        # Without bias: the control changes nothing.
        self.perturbation_embedding = PerturbationEmbedding(config.perturbation_width, latent, bias=False)
        # The config sees to it that perturbations have ids then.
        self.doser = SigmoidDoser(config.perturbation_width) if config.doser == "sigmoid" else None
        if "context" in config.adversaries:
            self.context_embedding = UnseenMeanEmbedding(config.adversaries["context"], latent, "context")
        if "batch" in config.adversaries:
            self.batch_embedding = UnseenMeanEmbedding(config.adversaries["batch"], latent, "batch")
        self.decoder = BatchNormMLP(
            latent, hidden, config.num_decoder_layers, config.hidden_act, config.hidden_dropout, bias=False
        )
        if config.likelihood == "gauss":
            self.mean_head = nn.Linear(hidden, config.output_dim)
            self.variance_head = nn.Linear(hidden, config.output_dim)
        else:
            self._make_count_heads()
        self.adversaries = nn.ModuleDict(
            {name: Adversary(config, classes) for name, classes in config.adversaries.items()}
        )
        self.post_init()

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        axes = super().vocabulary_axes() | {"encoder.0.0.weight": {1: FEATURES}}
        if not self.config.reads_counts:
            for head in ("mean_head", "variance_head"):
                axes |= {f"{head}.weight": {0: FEATURES}, f"{head}.bias": {0: FEATURES}}
        if self.doser is not None:
            axes |= {"doser.slope": {0: PERTURBATIONS}, "doser.offset": {0: PERTURBATIONS}}
        classes = {"perturbation": PERTURBATIONS_AND_CONTROL, "context": CONTEXTS, "batch": BATCHES}
        for name in self.adversaries:
            output = f"adversaries.{name}.output"
            axes |= {f"{output}.weight": {0: classes[name]}, f"{output}.bias": {0: classes[name]}}
        return axes

    def parts_with_adapters(self) -> list[str]:
        # The adversaries must keep up with the encoder, whose adapters change it.
        return [f"adversaries.{name}" for name in self.adversaries]

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SigmoidDoser):
            module.init_own_weights()

    def parameter_groups(self) -> list[dict]:
        """The autoencoder's parameters, and the adversaries'."""
        adversaries = list(self.adversaries.parameters())
        own = {id(parameter) for parameter in adversaries}
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in self.parameters() if id(parameter) not in own]}
        ]
        if adversaries:
            config = self.config
            options = {"lr": config.adversary_learning_rate, "weight_decay": config.adversary_weight_decay}
            given = {name: value for name, value in options.items() if value is not None}
            groups.append({"params": adversaries, **given})
        return groups

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
    ) -> CPAOutput:
        """
        Inputs and errors as in [`PerturbationPreTrainedModel`]; with `likelihood` `"nb"` and `"zinb"`, `control_cells` (and
        `labels`) are raw counts. Contexts and batches must be given where the model was trained with several. Returns a
        [`CPAOutput`].
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        basal = self.encoder(torch.log1p(control_cells) if self.config.reads_counts else control_cells)
        latents = basal + self._perturbation(perturbation_ids, perturbation_doses, perturbation_features)
        if "context" in self.config.adversaries:
            latents = latents + self.context_embedding(self._given("context_ids", context_ids)).unsqueeze(1)
        if "batch" in self.config.adversaries:
            latents = latents + self.batch_embedding(self._given("batch_ids", batch_ids))
        outputs = self._distribution(self.decoder(latents, cell_mask), control_cells)
        if "context" in self.config.adversaries:
            outputs["unseen"] = self._given("context_ids", context_ids) < 0
        if self.training and self.adversaries:
            # In the type of the weights: under mixed precision a layer copies inputs of another type, and the gradient of
            # the scores would be that of the copy.
            seen = basal.detach().to(self.dtype).requires_grad_()
            outputs["adversary_input"] = seen
            outputs["adversary_logits"] = {
                name: adversary(seen, cell_mask) for name, adversary in self.adversaries.items()
            }
        return CPAOutput(basal=basal, **outputs)

    @torch.no_grad()
    def sample_counts(self, generator: torch.Generator | None = None, **batch) -> torch.Tensor:
        r"""
        Counts of perturbed cells, drawn from the model's distribution at the control cell's total.

        Args:
            generator (`torch.Generator`, *optional*): on the model's device; the same state gives the same counts.
            batch: the inputs of [`forward`].

        Returns:
            `torch.Tensor` of shape `(batch_size, set_size, output_dim)`: whole numbers, float.

        Raises:
            ValueError: the model has no distribution of counts, is in training mode, or an input does not fit.
        """
        if not self.config.reads_counts:
            raise ValueError(
                "likelihood='gauss' has no distribution of counts, so none can be drawn (sample_counts); train with "
                "likelihood: nb or zinb, on raw counts"
            )
        self._check_drawing()
        outputs: CPAOutput = self(**batch)
        mean = given("mean", outputs.mean)
        inverse_dispersion = given("inverse_dispersion", outputs.inverse_dispersion)
        return self._draw(mean, inverse_dispersion, outputs.dropout_logits, generator)

    def _perturbation(self, ids, doses, features) -> torch.Tensor:
        """The effect of the perturbations together, (B, 1, latent_dim) or (B, S, latent_dim)."""
        if self.doser is not None and features is not None:
            features = self.doser(features)
        elif self.doser is not None:
            doses = self.doser(torch.ones_like(ids) if doses is None else doses, ids.clamp(min=0))
        return self.perturbation_embedding(ids, doses, features)

    def _distribution(self, hidden: torch.Tensor, control_cells: torch.Tensor) -> CPAFields:
        """Predictions and the parameters of a cell's distribution, in float32."""
        if self.config.reads_counts:
            return {**self._counts(hidden, control_cells)}
        mean = self.mean_head(hidden).float()
        return {
            "predictions": nn.functional.relu(mean) if self.config.nonnegative_output else mean,
            "mean": mean,
            "variance": nn.functional.softplus(self.variance_head(hidden).float()) + _LEAST_VARIANCE,
        }


__all__ = ["CPAForPerturbation", "CPAOutput"]
