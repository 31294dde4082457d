"""The objective of the gene-token transformer."""

import torch

from pertstate.base.constants import CELL_MASK, LABELS
from pertstate.families.scgpt.configuration_scgpt import ScGPTConfig
from pertstate.families.scgpt.modeling_scgpt import ScGPTOutput
from pertstate.losses.mse import MSELoss
from pertstate.losses.objective import Objective


class ScGPTObjective(Objective):
    """
    Mean squared error between predicted cell i and observed cell i, over the genes that the model predicted: in a training
    step those that were drawn for it (Cui et al. 2024, perturbation response).

    - `loss`: that error, in squared units of the expression. There are no further terms.
    """

    def __init__(self, config: ScGPTConfig):
        super().__init__(config)
        self.error = MSELoss()

    def forward(self, outputs: ScGPTOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels = self.required(batch, LABELS)
        if outputs.gene_indices is not None:
            labels = labels[..., outputs.gene_indices]
        return {"loss": self.error(outputs.predictions, labels, batch.get(CELL_MASK)).mean()}
