"""The objective of the family that is trained cell by cell."""

import torch

from pertstate.base.constants import CELL_MASK, GENE_LABELS, LABELS
from pertstate.base.modeling_perturbation import PerturbationOutput
from pertstate.families.embed_sum.configuration_embed_sum import EmbedSumConfig
from pertstate.losses.mse import MSELoss
from pertstate.losses.objective import Objective


class EmbedSumObjective(Objective):
    """
    Named terms of the loss of an [`EmbedSumForPerturbation`]: cells are compared one by one.

    - `mse`: squared error of predicted cell i against observed cell i
    - `decoder`: the same of the decoded genes, where there is a gene decoder
    - `loss`: `mse + decoder_weight * decoder`
    """

    config: EmbedSumConfig

    def __init__(self, config: EmbedSumConfig):
        super().__init__(config)
        self.distance = MSELoss()

    def forward(self, outputs: PerturbationOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = batch.get(CELL_MASK)
        terms = {"mse": self.distance(outputs.predictions, self.required(batch, LABELS), mask).mean()}
        terms["loss"] = terms["mse"]
        if self.config.gene_dim is not None:
            terms["decoder"] = self.distance(outputs.gene_predictions, self.required(batch, GENE_LABELS), mask).mean()
            terms["loss"] = terms["loss"] + self.config.decoder_weight * terms["decoder"]
        return terms
