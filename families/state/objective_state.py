"""The objective of the State transition model: a distributional loss and its auxiliary terms."""

import torch

from pertstate.base.constants import BATCH_IDS, CELL_MASK, CONTROL_CELLS
from pertstate.configuration_state import StateConfig
from pertstate.losses.distributional import DistributionalObjective


class StateObjective(DistributionalObjective):
    """
    The terms of [`DistributionalObjective`], and those that the config of a [`StateForPerturbation`] adds:

    - `confidence`: squared error of `confidence` against `confidence_target_scale` x the sentence's (detached) distance
    - `batch_token`: cross-entropy of `batch_logits` against the batches of the sentence's cells
    - `l1`: mean absolute change from control to prediction

    Args:
        config ([`StateConfig`]): loss options, see there.
    """

    config: StateConfig

    def __init__(self, config: StateConfig):
        super().__init__(config)
        if config.confidence_token:
            self.weights["confidence"] = config.confidence_weight
        if config.batch_token:
            self.weights["batch_token"] = config.batch_token_weight
        if config.l1_weight > 0:
            self.weights["l1"] = config.l1_weight

    def _further_terms(self, outputs, batch, distances: torch.Tensor) -> dict[str, torch.Tensor]:
        mask, terms = batch.get(CELL_MASK), {}
        if "confidence" in self.weights:
            target = self.config.confidence_target_scale * distances.detach()
            terms["confidence"] = (outputs.confidence.float() - target).square().mean()
        if "batch_token" in self.weights:
            terms["batch_token"] = self._batch_cross_entropy(
                outputs.batch_logits, self.required(batch, BATCH_IDS), mask
            )
        if "l1" in self.weights:
            change = (outputs.predictions.float() - batch[CONTROL_CELLS].float()).abs().mean(dim=-1)
            terms["l1"] = self.mean_over_cells(change, mask).mean()
        return terms

    def _batch_cross_entropy(self, logits, batch_ids, mask) -> torch.Tensor:
        """Cross-entropy against the share of each batch among the sentence's cells."""
        log_probabilities = logits.float().log_softmax(dim=-1)
        return self.mean_over_cells(-log_probabilities.gather(1, batch_ids), mask).mean()
