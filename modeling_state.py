"""The State transition model: S control cells and a perturbation in, S perturbed cells out."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from .base.modeling_anchor import Anchor
from .base.modeling_finetuning import BATCHES, CONTEXTS, FEATURES, PERTURBATIONS
from .base.modeling_layers import ConfidenceHead, Packing, SetTransformer
from .base.modeling_perturbation import PerturbationOutput, SetTransformerPreTrainedModel
from .configuration_state import StateConfig


class StatePreTrainedModel(SetTransformerPreTrainedModel):
    config: StateConfig
    config_class = StateConfig


class StateForPerturbation(StatePreTrainedModel):
    r"""
    The State transition model: a transformer over the cells of a sentence, without positions.

    Permuting the cells of a sentence permutes the predictions and changes nothing else; padded cells (False in
    `cell_mask`) change nothing for the real ones (with the default `attention` and `positions`).

    Args:
        config ([`StateConfig`]): sizes and options. One of `num_perturbations` and `perturbation_dim` must be set.

    Example:
    ```python
    >>> import torch
    >>> from pertstate import StateConfig, StateForPerturbation

    >>> config = StateConfig.from_preset("tiny", input_dim=100, num_perturbations=5)
    >>> model = StateForPerturbation(config)
    >>> outputs = model(control_cells=torch.rand(2, 32, 100), perturbation_ids=torch.tensor([[3], [4]]))
    >>> tuple(outputs.predictions.shape)
    (2, 32, 100)
    ```
    """

    packs_cells = True

    def __init__(self, config: StateConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self._make_encoders(config.num_encoder_layers if config.basal_encoder == "mlp" else 1)
        if config.batch_encoder:
            self.batch_embedding = nn.Embedding(config.required_size("num_batches"), hidden)
        if config.batch_token:
            self.batch_token = nn.Parameter(torch.empty(1, 1, hidden))
            self.batch_head = nn.Linear(hidden, config.required_size("num_batches"))
        if config.confidence_token:
            self.confidence_token = nn.Parameter(torch.empty(1, 1, hidden))
            self.confidence_head = ConfidenceHead(hidden, config.hidden_dropout)
        self.backbone = SetTransformer(config)
        self._make_output_head()
        if config.output_adapter:
            bottleneck = config.output_dim // 8
            self.output_adapter = nn.Sequential(
                nn.Linear(config.output_dim, bottleneck), nn.GELU(), nn.Linear(bottleneck, config.output_dim)
            )
        if config.residual == "anchor":
            self.anchor = Anchor(
                config.perturbation_width,
                config.output_dim,
                config.num_contexts or 0,
                expression=config.nonnegative_output,
                by_features=config.num_perturbations is None,
            )
        self._make_gene_decoder()
        self.post_init()

    @property
    def fitted_anchor(self) -> Anchor | None:
        return self.anchor if self.config.residual == "anchor" else None

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        axes = super().vocabulary_axes()
        if self.config.batch_encoder:
            axes["batch_embedding.weight"] = {0: BATCHES}
        if self.config.batch_token:
            axes |= {"batch_head.weight": {0: BATCHES}, "batch_head.bias": {0: BATCHES}}
        if self.config.output_adapter:
            axes["output_adapter.0.weight"] = {1: FEATURES}
            axes |= {"output_adapter.2.weight": {0: FEATURES}, "output_adapter.2.bias": {0: FEATURES}}
        if self.config.residual == "anchor":
            for name, table in self.anchor.named_buffers(prefix="anchor"):
                rows = CONTEXTS if name.startswith("anchor.control") else PERTURBATIONS
                if name == "anchor.control_counts":
                    axes[name] = {0: CONTEXTS}
                elif table.dim() == 1:
                    axes[name] = {0: FEATURES}
                else:
                    by_vector = rows == PERTURBATIONS and self.anchor.by_features
                    axes[name] = {1: FEATURES} if by_vector else {0: rows, 1: FEATURES}
        return axes

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, StateForPerturbation):
            if self.config.batch_token:
                init.normal_(module.batch_token, std=self.config.initializer_range)
            if self.config.confidence_token:
                init.normal_(module.confidence_token, std=self.config.initializer_range)
        # Not in the branch above: transformers does not initialise a custom top module without parameters of its own.
        if module is self.output_head.layers[-1] and self.config.residual in ("output", "anchor"):
            init.zeros_(module.weight)
        if isinstance(module, Anchor):
            for table in module.buffers():
                init.zeros_(table)

    @capture_outputs
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
        control_expression: torch.Tensor | None = None,
        control_counts: torch.Tensor | None = None,
        cell_places: torch.Tensor | None = None,
        **kwargs,
    ) -> PerturbationOutput:
        r"""
        Inputs, output and errors as in [`PerturbationPreTrainedModel`]. With `residual="anchor"` there may also be
        `control_expression` `(batch_size, input_dim)`, the mean of `expm1` of all control cells of the sentence's context, and
        `control_counts` `(batch_size,)`, their number, see [`Anchor`]. `batch_ids` is required with `batch_encoder`; the
        context is read from the control cells; `labels` are read where `detach_decoder` trains the gene decoder on true
        latents. `cell_places` `(cells,)` are the places of the real cells among all `batch_size x set_size`, in order: with these a
        GPU computes nothing of the padding.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        config = self.config
        of_cells = None if cell_mask is None else self._packing(cell_mask, cell_places, kwargs)
        encoded_cells = self._of_cells(self.cell_encoder, control_cells, of_cells)
        hidden = encoded_cells + self.perturbation_encoder(perturbation_ids, perturbation_doses, perturbation_features)
        if config.batch_encoder:
            hidden = hidden + self.batch_embedding(self._check_batches(batch_ids))

        tokens, mask = [hidden], cell_mask
        if config.batch_token:
            tokens.insert(0, self.batch_token.expand(len(hidden), -1, -1))
        if config.confidence_token:
            tokens.append(self.confidence_token.expand(len(hidden), -1, -1))
        if mask is not None:
            mask = nn.functional.pad(mask.bool(), (int(config.batch_token), int(config.confidence_token)), value=True)
        packing = of_cells and of_cells.with_tokens(int(config.batch_token), int(config.confidence_token))
        transformed = self.backbone(torch.cat(tokens, dim=1) if len(tokens) > 1 else hidden, mask, packing, **kwargs)

        first = int(config.batch_token)
        cells = transformed[:, first : first + control_cells.shape[1]]
        if config.residual == "hidden":
            cells = cells + encoded_cells
        predictions = self._of_cells(self.output_head, cells, of_cells)
        if config.residual == "output":
            predictions = predictions + control_cells
        if config.residual == "anchor":
            perturbation = (perturbation_ids, perturbation_doses, perturbation_features)
            changed = self.anchor(control_cells, *perturbation, context_ids, control_expression, control_counts)
            predictions = predictions + changed
        if config.output_adapter:
            predictions = self.output_adapter(predictions)
        return self._outputs(
            predictions,
            labels,
            detach=config.detach_decoder,
            confidence=self.confidence_head(transformed[:, -1]) if config.confidence_token else None,
            batch_logits=self.batch_head(transformed[:, 0]) if config.batch_token else None,
        )

    def _packing(self, mask: torch.Tensor, places: torch.Tensor | None, options: dict) -> Packing | None:
        """How the real cells of a padded batch are computed by themselves; None where the whole batch is."""
        config = self.config
        recorded = any(options.get(name, getattr(config, name)) for name in self._forward_options)
        if recorded or config.positions != "none" or config.attention == "causal":
            return None
        return Packing.of(mask, places, not self.training, config.hidden_size)

    @staticmethod
    def _of_cells(module: nn.Module, cells: torch.Tensor, packing: Packing | None) -> torch.Tensor:
        return module(cells) if packing is None else packing.apply(module, cells)


__all__ = ["StateForPerturbation", "StatePreTrainedModel"]
