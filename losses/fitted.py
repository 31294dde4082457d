"""The objective of the families that are fitted without gradients."""

import torch

from pertstate.base.configuration_fitted import FittedConfig
from pertstate.base.constants import CELL_MASK, LABELS
from pertstate.base.modeling_perturbation import PerturbationOutput
from pertstate.losses.energy import EnergyLoss
from pertstate.losses.objective import Objective


class FittedObjective(Objective):
    """
    The loss that an evaluation reports for a family that is fitted in one pass; nothing is trained with it. It is the
    State model's default loss, so that the two can be compared.

    - `energy`: energy distance between `predictions` and `labels`
    - `loss`: the same
    """

    def __init__(self, config: FittedConfig):
        super().__init__(config)
        self.distance = EnergyLoss()

    def forward(self, outputs: PerturbationOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        distances = self.distance(outputs.predictions, self.required(batch, LABELS), batch.get(CELL_MASK))
        return {"energy": distances.mean(), "loss": distances.mean()}
