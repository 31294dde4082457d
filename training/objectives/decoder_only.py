"""The objective of a gene decoder alone."""

import torch

from pertstate.configuration_families import DecoderOnlyConfig
from pertstate.modeling_perturbation import CELL_MASK, GENE_LABELS, PerturbationOutput
from pertstate.training.objectives.base import Objective
from pertstate.training.objectives.mse import MSELoss


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
