"""The objective of the State transition model: a distributional loss and its auxiliary terms."""

import torch
from torch import nn

from cellstate.configuration_state import StateConfig
from cellstate.modeling_perturbation import (
    BATCH_IDS,
    CELL_MASK,
    CONTROL_CELLS,
    GENE_LABELS,
    LABELS,
    PerturbationOutput,
)
from cellstate.training.objectives.energy import EnergyLoss
from cellstate.training.objectives.mse import MSELoss
from cellstate.training.objectives.sinkhorn import SinkhornLoss


class StateObjective(nn.Module):
    """
    Named terms of the loss of a [`StateForPerturbation`], as its config asks for them. Every term is a mean over
    sentences, each over its real cells.

    - `energy`, `sinkhorn`, `mse`: distance between `predictions` and `labels`
    - `decoder`: the same distance between `gene_predictions` and `gene_labels`
    - `confidence`: squared error of `confidence` against `confidence_target_scale` x the sentence's (detached) distance
    - `batch_token`: cross-entropy of `batch_logits` against the batches of the sentence's cells
    - `l1`: mean absolute change from control to prediction
    - `loss`: their sum, each times its entry in `weights`

    Args:
        config ([`StateConfig`]): loss options, see there.
    """

    def __init__(self, config: StateConfig):
        super().__init__()
        self.config = config
        distances = {
            "energy": {"energy": (1.0, EnergyLoss())},
            "sinkhorn": {"sinkhorn": (1.0, SinkhornLoss(config.blur))},
            "combined": {
                "energy": (config.energy_weight, EnergyLoss()),
                "sinkhorn": (config.sinkhorn_weight, SinkhornLoss(config.blur)),
            },
            "mse": {"mse": (1.0, MSELoss())},
        }[config.loss]
        self.distances = nn.ModuleDict({name: module for name, (_, module) in distances.items()})
        self.weights = {name: weight for name, (weight, _) in distances.items()}
        if config.gene_dim is not None:
            self.weights["decoder"] = config.decoder_weight
        if config.confidence_token:
            self.weights["confidence"] = config.confidence_weight
        if config.batch_token:
            self.weights["batch_token"] = config.batch_token_weight
        if config.l1_weight > 0:
            self.weights["l1"] = config.l1_weight

    def forward(self, outputs: PerturbationOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's outputs and the batch it was given (contract of the batch keys) to named scalar terms.

        Raises:
            ValueError: the batch lacks `labels`, or `gene_labels` or `batch_ids` where a term needs them.
        """
        mask = batch.get(CELL_MASK)
        per_sentence = self._distances(outputs.predictions, self._required(batch, LABELS), mask)
        terms = {name: value.mean() for name, value in per_sentence.items()}
        if "decoder" in self.weights:
            decoded = self._distances(outputs.gene_predictions, self._required(batch, GENE_LABELS), mask)
            terms["decoder"] = self._total(decoded).mean()
        if "confidence" in self.weights:
            target = self.config.confidence_target_scale * self._total(per_sentence).detach()
            terms["confidence"] = (outputs.confidence.float() - target).square().mean()
        if "batch_token" in self.weights:
            terms["batch_token"] = self._batch_cross_entropy(
                outputs.batch_logits, self._required(batch, BATCH_IDS), mask
            )
        if "l1" in self.weights:
            change = (outputs.predictions.float() - batch[CONTROL_CELLS].float()).abs().mean(dim=-1)
            terms["l1"] = self._mean_over_cells(change, mask).mean()
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights.items())
        return terms

    @staticmethod
    def _required(batch: dict, key: str) -> torch.Tensor:
        if batch.get(key) is None:
            raise ValueError(f"the loss needs {key!r} in the batch, found {sorted(k for k in batch)}")
        return batch[key]

    @staticmethod
    def _mean_over_cells(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return values.mean(dim=1)
        return (values * mask).sum(dim=1) / mask.sum(dim=1)

    def _distances(self, predictions, targets, mask) -> dict[str, torch.Tensor]:
        """Name of each distance to its value per sentence (B,), averaged over the feature chunks."""
        if self.config.feature_chunks == 1:
            chunks = [(predictions, targets)]
        else:
            if self.config.shuffle_feature_chunks and self.training:
                order = torch.randperm(predictions.shape[-1], device=predictions.device)
                predictions, targets = predictions[..., order], targets[..., order]
            n = self.config.feature_chunks
            chunks = list(zip(predictions.tensor_split(n, dim=-1), targets.tensor_split(n, dim=-1)))
        return {
            name: torch.stack([distance(x, y, mask) for x, y in chunks]).mean(dim=0)
            for name, distance in self.distances.items()
        }

    def _total(self, distances: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(self.weights[name] * value for name, value in distances.items())

    def _batch_cross_entropy(self, logits, batch_ids, mask) -> torch.Tensor:
        """Cross-entropy against the share of each batch among the sentence's cells."""
        log_probabilities = logits.float().log_softmax(dim=-1)
        return self._mean_over_cells(-log_probabilities.gather(1, batch_ids), mask).mean()
