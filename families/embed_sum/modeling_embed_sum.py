"""The sum of a cell's and a perturbation's encoding, read by an MLP, cell by cell."""

import torch
from torch import nn

from ...base.modeling_perturbation import EncoderPreTrainedModel, PerturbationOutput
from .configuration_embed_sum import EmbedSumConfig


class EmbedSumForPerturbation(EncoderPreTrainedModel):
    r"""
    `MLP_out(MLP_pert(p) + MLP_cell(x))`: each cell alone, without its sentence. A gene decoder is trained on the
    latents as they are (its gradient stops at them).

    In training, expression is not clamped at 0: a gene below 0 in every cell would have no gradient. Predictions in
    evaluation mode are clamped where `nonnegative_output` is set.

    Args:
        config ([`EmbedSumConfig`]): sizes.
    """

    config: EmbedSumConfig
    config_class = EmbedSumConfig

    def __init__(self, config: EmbedSumConfig):
        super().__init__(config)
        self._make_encoders(config.num_encoder_layers)
        self._make_output_head()
        self._make_gene_decoder()
        self.post_init()

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
        """Inputs, output and errors as in [`PerturbationPreTrainedModel`]; contexts and batches are not used."""
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        perturbation = self.perturbation_encoder(perturbation_ids, perturbation_doses, perturbation_features)
        predictions = self.output_head(self.cell_encoder(control_cells) + perturbation)
        genes = self.gene_decoder(predictions.detach()) if self.config.gene_dim is not None else None
        if self.config.nonnegative_output and not self.training:
            predictions = nn.functional.relu(predictions)
        return PerturbationOutput(predictions=predictions, gene_predictions=genes)


__all__ = ["EmbedSumForPerturbation"]
