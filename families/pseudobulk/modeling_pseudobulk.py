"""A transformer over one token, the mean of the encoded cells of a sentence."""

import torch
from transformers.utils.output_capturing import capture_outputs

from ...base.modeling_finetuning import BATCHES
from ...base.modeling_layers import PerturbationEncoder, SetTransformer
from ...base.modeling_perturbation import PerturbationOutput, SetTransformerPreTrainedModel
from .configuration_pseudobulk import PseudobulkConfig


class PseudobulkForPerturbation(SetTransformerPreTrainedModel):
    r"""
    The mean over a sentence's real cells of `e_p + e_c` (encoded perturbation and cell, and batch where the config says
    so) goes through the backbone as one token; every cell is given the result, and the output head reads it (plus the
    encoded cell, with `residual="hidden"`).

    Args:
        config ([`PseudobulkConfig`]): sizes and options.
    """

    config: PseudobulkConfig
    config_class = PseudobulkConfig

    def __init__(self, config: PseudobulkConfig):
        super().__init__(config)
        self._make_encoders(config.num_encoder_layers)
        if config.batch_encoder:
            self.batch_encoder = PerturbationEncoder(
                config.required_size("num_batches"),
                config.hidden_size,
                config.num_encoder_layers,
                config.hidden_act,
                config.hidden_dropout,
            )
        self.backbone = SetTransformer(config)
        self._make_output_head()
        self._make_gene_decoder()
        self.post_init()

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        axes = super().vocabulary_axes()
        if self.config.batch_encoder:
            axes["batch_encoder.embedding.weight"] = {0: BATCHES}
        return axes

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
        **kwargs,
    ) -> PerturbationOutput:
        """
        Inputs, output and errors as in [`PerturbationPreTrainedModel`]; contexts are not used, `batch_ids` are required
        with `batch_encoder`. Hidden states and attentions have one token a sentence.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        cells = self.cell_encoder(control_cells)
        hidden = cells + self.perturbation_encoder(perturbation_ids, perturbation_doses, perturbation_features)
        if self.config.batch_encoder:
            known = self._check_batches(batch_ids)
            hidden = hidden + self.batch_encoder(known.flatten()[:, None]).view_as(hidden)
        if cell_mask is None:
            mean = hidden.mean(dim=1, keepdim=True)
        else:
            real = cell_mask.to(hidden.dtype).unsqueeze(-1)
            mean = (hidden * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
        bulk = self.backbone(mean, **kwargs).expand_as(cells)
        predictions = self.output_head(bulk + cells if self.config.residual == "hidden" else bulk)
        return self._outputs(predictions, labels, detach=self.config.detach_decoder)


__all__ = ["PseudobulkForPerturbation"]
