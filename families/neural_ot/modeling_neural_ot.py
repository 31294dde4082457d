"""A transformer over three tokens of one cell: its perturbation, the control cell and the cell to be."""

import torch
from transformers.utils.output_capturing import capture_outputs

from ...base.modeling_layers import SetTransformer
from ...base.modeling_perturbation import PerturbationOutput, SetTransformerPreTrainedModel
from .configuration_neural_ot import NeuralOTConfig


class NeuralOTForPerturbation(SetTransformerPreTrainedModel):
    r"""
    A map from each control cell to a perturbed one, trained like a neural optimal transport map by a distance between
    the two sets: the tokens `[perturbation, cell, zeros]` of a cell go through the backbone, and the last of them (plus
    the encoded cell, with `residual="hidden"`) through the output head. Cells of a sentence do not see one another.

    Args:
        config ([`NeuralOTConfig`]): sizes and options.
    """

    config: NeuralOTConfig
    config_class = NeuralOTConfig

    def __init__(self, config: NeuralOTConfig):
        super().__init__(config)
        self._make_encoders(config.num_encoder_layers)
        self.backbone = SetTransformer(config)
        self._make_output_head()
        self._make_gene_decoder()
        self.post_init()

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
        Inputs, output and errors as in [`PerturbationPreTrainedModel`]; contexts and batches are not used. Hidden states
        and attentions are those of the `batch_size * set_size` cells, three tokens each.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        cells = self.cell_encoder(control_cells)
        perturbation = self.perturbation_encoder(perturbation_ids, perturbation_doses, perturbation_features)
        tokens = torch.stack((perturbation.expand_as(cells), cells, torch.zeros_like(cells)), dim=2)
        moved = self.backbone(tokens.flatten(0, 1), **kwargs)[:, -1].view_as(cells)
        predictions = self.output_head(moved + cells if self.config.residual == "hidden" else moved)
        return self._outputs(predictions, labels, detach=self.config.detach_decoder)


__all__ = ["NeuralOTForPerturbation"]
