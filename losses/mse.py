"""Mean squared error of cell i against cell i."""

import torch
from torch import nn


class MSELoss(nn.Module):
    """
    Mean squared error between predicted cell i and observed cell i. Cells of a sentence are not paired, so the
    best prediction is the conditional mean. This loss is for checkpoints and families that were trained with it.

    Inputs:
        - predictions `(B, S, D)`, targets `(B, S, D)`, mask `(B, S)` bool or None: the real cells of both.
    Output:
        - `(B,)`, one error a sentence, in squared units of the cells.
    """

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        errors = (predictions.float() - targets.float()).square().mean(dim=-1)
        if mask is None:
            return errors.mean(dim=1)
        return (errors * mask).sum(dim=1) / mask.sum(dim=1)
