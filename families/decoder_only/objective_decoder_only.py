"""The objective of a gene decoder alone."""

import torch

from pertstate.base.constants import CELL_MASK, GENE_LABELS
from pertstate.base.modeling_perturbation import PerturbationOutput
from pertstate.families.decoder_only.configuration_decoder_only import DecoderOnlyConfig
from pertstate.losses.mse import MSELoss
from pertstate.losses.objective import Objective


class DecoderOnlyObjective(Objective):
    """
    The loss of a [`DecoderOnlyForPerturbation`], `loss`: squared error of the genes decoded from a cell's embedding
    against the expression of that very cell.
    """

    def __init__(self, config: DecoderOnlyConfig):
        super().__init__(config)
        self.distance = MSELoss()

    def forward(self, outputs: PerturbationOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        genes = self.required(batch, GENE_LABELS)
        return {"loss": self.distance(outputs.gene_predictions, genes, batch.get(CELL_MASK)).mean()}
