"""Control cells plus the mean change of their perturbation."""

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

from ...base.messages import given
from ...base.modeling_fitted import (
    FittedPreTrainedModel,
    TrainingMeans,
    ids_and_doses,
    per_cell,
)
from ...base.modeling_perturbation import PerturbationOutput
from .configuration_perturbation_mean import PerturbationMeanConfig


class PerturbationMeanForPerturbation(FittedPreTrainedModel):
    r"""
    `x + delta_p`: each control cell plus the change of its perturbation, the unweighted mean over training contexts of
    (mean perturbed cell - mean control cell). A measured combination has a change of its own. A perturbation or combination
    without training cells changes nothing and counts as unseen. Perturbations given by features are recognised by their
    vector: those with equal vectors share the mean of their changes.

    Args:
        config ([`PerturbationMeanConfig`]): sizes.
    """

    config: PerturbationMeanConfig
    config_class = PerturbationMeanConfig
    entries: torch.Tensor
    changes: nn.Parameter

    def __init__(self, config: PerturbationMeanConfig):
        super().__init__(config)
        # The key of each entry. Entry 0 is the control, which changes nothing: no ids, or features of 0.
        if config.num_perturbations is not None:
            self.register_buffer("entries", torch.full((config.num_entries, config.entry_width), -1))
        else:
            self.register_buffer("entries", torch.zeros(config.num_entries, config.perturbation_width))
        self._add_table("changes", config.num_entries, config.output_dim)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self and self.config.num_perturbations is not None:
            init.constant_(self.entries, -1)

    def fit(self, means: TrainingMeans):
        """Take the changes of all entries, and the config their number."""
        self._check_means(means)
        if means.perturbation_ids is None:
            keys, nothing = given("perturbation_features", means.perturbation_features), 0
        else:
            keys, nothing = -np.sort(-means.perturbation_ids, axis=1), -1
        keys, entry_of = np.unique(keys, axis=0, return_inverse=True)
        changes = np.zeros((len(keys), means.changes.shape[1]))
        np.add.at(changes, entry_of, means.changes)
        changes /= np.bincount(entry_of)[:, None]
        control = np.full((1, keys.shape[1]), nothing, dtype=keys.dtype)
        self._set(entries=np.concatenate([control, keys]), changes=np.pad(changes, ((1, 0), (0, 0))))
        self.config.num_entries = len(self.changes)
        if means.perturbation_ids is not None:
            self.config.entry_width = self.entries.shape[1]

    def forward(
        self,
        control_cells: torch.Tensor,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        batch_ids: torch.Tensor | None = None,
        cell_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gene_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> PerturbationOutput:
        """
        Inputs, output and errors as in [`PerturbationPreTrainedModel`]; contexts and batches are not used. The dose of
        a single perturbation scales its change.

        Raises:
            ValueError: a measured combination is asked for at doses other than 1, which have no measured change.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        if self.config.num_perturbations is not None:
            entry, known, dose = self._by_ids(perturbation_ids, perturbation_doses, perturbation_features)
        else:
            entry, known = self._by_features(given("perturbation_features", perturbation_features))
            dose = torch.ones_like(entry)
        change = self.changes[entry] * dose.unsqueeze(-1).to(self.changes.dtype)
        return self._outputs(
            control_cells + change,
            ~known.all(dim=1),
            "their perturbation has no training cells, so that nothing changes",
        )

    def _by_ids(self, ids, doses, features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The number of each perturbation's entry (0 where there is none), whether there is one, and its dose."""
        ids, doses = ids_and_doses(ids, doses, features)
        width = self.entries.shape[1]
        wider = (ids[..., width:] >= 0).any(dim=-1)
        padded = nn.functional.pad(ids[..., :width], (0, max(0, width - ids.shape[-1])), value=-1)
        equal = (padded.unsqueeze(-2) == self.entries).all(dim=-1) & ~wider.unsqueeze(-1)
        known, together = equal.any(dim=-1), (ids >= 0).sum(dim=-1)
        scaled = ((doses != 1) & (ids >= 0)).any(dim=-1)
        if (scaled & known & (together > 1)).any():
            raise ValueError(
                "perturbation_doses: expected 1 for each perturbation of a combination, whose change was measured at these "
                "doses alone, found others; a model of type state-additive adds up changes at any doses"
            )
        return equal.to(torch.uint8).argmax(dim=-1), known, torch.where(together == 1, doses[..., 0], 1)

    def _by_features(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = per_cell(features).to(self.entries.dtype)
        rows, row_of = torch.unique(features.flatten(0, 1), dim=0, return_inverse=True)
        equal = torch.stack([(self.entries == row).all(dim=-1) for row in rows])
        entry, known = equal.to(torch.uint8).argmax(dim=-1), equal.any(dim=-1)
        return entry[row_of].view(features.shape[:2]), known[row_of].view(features.shape[:2])


__all__ = ["PerturbationMeanForPerturbation"]
