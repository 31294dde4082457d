"""A distance between the predicted and the observed cells of a sentence, and of the genes decoded from them."""

from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import nn

from pertstate.base.configuration_perturbation import SetTransformerConfig
from pertstate.base.constants import CELL_MASK, GENE_LABELS, LABELS
from pertstate.base.modeling_perturbation import PerturbationOutput
from pertstate.losses.energy import EnergyLoss
from pertstate.losses.mse import MSELoss
from pertstate.losses.objective import Objective
from pertstate.losses.sinkhorn import SinkhornLoss


class DistributionalObjective(Objective):
    """
    Named terms of the loss of a model with a distributional loss, as its config asks for them.

    - `energy`, `sinkhorn`, `mse`: distance between `predictions` and `labels`
    - `decoder`: the same distance between `gene_predictions` and `gene_labels`
    - `loss`: their sum, each times its entry in `weights`

    Args:
        config ([`SetTransformerConfig`]): loss options, see there.
    """

    config: SetTransformerConfig

    def __init__(self, config: SetTransformerConfig):
        super().__init__(config)
        weights_of: dict[str, dict[str, float]] = {
            "energy": {"energy": 1.0},
            "sinkhorn": {"sinkhorn": 1.0},
            "combined": {"energy": config.energy_weight, "sinkhorn": config.sinkhorn_weight},
            "mse": {"mse": 1.0},
        }
        self.weights = weights_of[config.loss]
        kinds: dict[str, Callable[[], nn.Module]] = {
            "energy": EnergyLoss,
            "sinkhorn": partial(SinkhornLoss, config.blur),
            "mse": MSELoss,
        }
        self.distances = nn.ModuleDict({name: kinds[name]() for name in self.weights})
        if config.gene_dim is not None:
            self.weights["decoder"] = config.decoder_weight

    def forward(self, outputs: PerturbationOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = batch.get(CELL_MASK)
        per_sentence = self._distances(outputs.predictions, self.required(batch, LABELS), mask)
        terms = {name: value.mean() for name, value in per_sentence.items()}
        if "decoder" in self.weights:
            decoded = self._distances(outputs.gene_predictions, self.required(batch, GENE_LABELS), mask)
            terms["decoder"] = self._total(decoded).mean()
        terms |= self._further_terms(outputs, batch, self._total(per_sentence))
        terms["loss"] = self._total({name: terms[name] for name in self.weights})
        return terms

    def _further_terms(self, outputs, batch, distances: torch.Tensor) -> dict[str, torch.Tensor]:
        """Terms that a family adds, from the sentences' distances (B,) among others."""
        return {}

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

    def _total(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        return reduce(torch.add, (self.weights[name] * value for name, value in values.items()))
