"""Control cells plus the mean change of their perturbation."""

import torch
from torch import nn

from ...base.messages import given
from ...base.modeling_fitted import MeasuredPreTrainedModel, TrainingMeans, ids_and_doses
from ...base.modeling_perturbation import PerturbationOutput
from .configuration_perturbation_mean import PerturbationMeanConfig


class PerturbationMeanForPerturbation(MeasuredPreTrainedModel):
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
    changes: nn.Parameter

    def __init__(self, config: PerturbationMeanConfig):
        super().__init__(config)
        self._add_entries("changes")
        self.post_init()

    def fit(self, means: TrainingMeans):
        """Take the changes of all entries, and the config their number."""
        self._check_means(means)
        self._fit_entries(means, "changes", means.changes)

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
            entry, known = self._entries_of_features(given("perturbation_features", perturbation_features))
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
        entry, known = self._entries_of_ids(ids)
        together = (ids >= 0).sum(dim=-1)
        scaled = ((doses != 1) & (ids >= 0)).any(dim=-1)
        if (scaled & known & (together > 1)).any():
            raise ValueError(
                "perturbation_doses: expected 1 for each perturbation of a combination, whose change was measured at these "
                "doses alone, found others; a model of type state-additive adds up changes at any doses"
            )
        return entry, known, torch.where(together == 1, doses[..., 0], 1)


__all__ = ["PerturbationMeanForPerturbation"]
