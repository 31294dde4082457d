"""Control cells plus the changes of the single perturbations."""

import torch
from torch import nn

from ...base.messages import given
from ...base.modeling_fitted import FittedPreTrainedModel, TrainingMeans, ids_and_doses
from ...base.modeling_perturbation import PerturbationOutput, UnseenPerturbationError
from .configuration_additive import AdditiveConfig


class AdditiveForPerturbation(FittedPreTrainedModel):
    r"""
    `x + sum_k dose_k delta_k`: each control cell plus the changes of the perturbations applied together, each at its
    dose, as they were measured alone: the unweighted mean over training contexts of (mean perturbed cell - mean
    control cell). Combinations in the training data are not used.

    Args:
        config ([`AdditiveConfig`]): sizes.
    """

    config: AdditiveConfig
    config_class = AdditiveConfig
    changes: nn.Parameter

    def __init__(self, config: AdditiveConfig):
        super().__init__(config)
        self._add_table("changes", config.perturbation_width, config.output_dim)
        self._add_seen(config.perturbation_width)
        self.post_init()

    def fit(self, means: TrainingMeans):
        """Take the changes of the perturbations that were measured alone."""
        self._check_means(means)
        ids = given("perturbation_ids", means.perturbation_ids)
        single = (ids >= 0).sum(axis=1) == 1
        self._set_rows(ids[single].max(axis=1), changes=means.changes[single])

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
        Inputs, output and errors as in [`PerturbationPreTrainedModel`]; contexts and batches are not used.

        Raises:
            UnseenPerturbationError: a perturbation has no training cells with it alone.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        ids, doses = ids_and_doses(perturbation_ids, perturbation_doses, perturbation_features)
        self._check_seen(ids)
        rows = ids.clamp(min=0)
        change = (doses.unsqueeze(-1).to(self.changes.dtype) * self.changes[rows]).sum(dim=-2)
        return self._outputs(control_cells + change, None)

    def check_perturbations(self, perturbation_ids=None, perturbation_doses=None, perturbation_features=None):
        self._check_seen(ids_and_doses(perturbation_ids, perturbation_doses, perturbation_features)[0])

    def _check_seen(self, ids: torch.Tensor):
        unseen = (ids >= 0) & ~self.seen[ids.clamp(min=0)]
        if unseen.any():
            raise UnseenPerturbationError(
                ids[unseen].unique().tolist(),
                "no training cells have one of these alone, so that its change cannot be added; train on cells that do, "
                "leave these perturbations out, or use another model",
            )


__all__ = ["AdditiveForPerturbation"]
