"""What every objective shares."""

import torch
from torch import nn

from pertstate.base.configuration_perturbation import PerturbationConfig


class Objective(nn.Module):
    """
    Named scalar terms of a family's loss. A term is a mean over a sentence's real cells, then over sentences.

    A subclass implements `forward(outputs, batch)`. It takes the model's [`PerturbationOutput`] and the batch that the model
    was given, and returns named terms; `"loss"` is what is minimised. ValueError where the batch lacks what a term needs.

    The Trainer says how far training is, for schedules:

    - `step` (`int`): optimiser steps taken so far
    - `epoch` (`float`): epochs of the training data seen so far; None in a stream whose length is not known

    Args:
        config ([`PerturbationConfig`]): of the model; it holds the loss options.
    """

    config: PerturbationConfig
    step: int
    epoch: float | None

    def __init__(self, config: PerturbationConfig):
        super().__init__()
        self.config = config
        self.set_progress(0, 0.0)

    def set_progress(self, step: int, epoch: float | None):
        self.step, self.epoch = step, epoch

    @staticmethod
    def required(batch: dict, key: str) -> torch.Tensor:
        if batch.get(key) is None:
            raise ValueError(f"the loss needs {key!r} in the batch, found {sorted(k for k in batch)}")
        return batch[key]

    @staticmethod
    def mean_over_cells(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, S) values to (B,) means over the real cells."""
        if mask is None:
            return values.mean(dim=1)
        return (values * mask).sum(dim=1) / mask.sum(dim=1)
