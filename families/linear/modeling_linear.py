"""Ridge regression of the mean change on the perturbation."""

import numpy as np
import torch
from torch import nn

from ...base.messages import given
from ...base.modeling_fitted import (
    FittedPreTrainedModel,
    TrainingMeans,
    ids_and_doses,
    is_control,
    per_cell,
    ridge_weights,
)
from ...base.modeling_perturbation import PerturbationOutput
from .configuration_linear import LinearConfig


class LinearForPerturbation(FittedPreTrainedModel):
    r"""
    `x + f_p W + b`: each control cell plus a change that is linear in the perturbation. `f_p` is the perturbation's
    features, or with perturbation ids the vector of its doses (one-hot, or of a combination with several entries). The
    control changes nothing. Let row e of `F` be the features of a measured perturbation or combination, and row e of
    `D` its change, the unweighted mean over training contexts of (mean perturbed cell - mean control cell). Then

        W, b = argmin sum_e |D_e - F_e W - b|^2 + ridge |W|^2        (b = 0 without `intercept`)

    in closed form, in float64: `W = F' (F F' + ridge 1)^-1 D` or, where it is smaller, `(F'F + ridge 1)^-1 F' D`, with
    column means taken off `F` and `D` where there is an intercept. With `rank` r, `D` (less its column means) is
    replaced by its scores on its first r right singular vectors `V`, the genes' embedding: `W = W_r V'`, where `W_r` is
    the ridge regression of `D V`. As `V` is orthonormal this is the full `W` projected on them, and a full rank gives
    it unchanged.

    After the linear baseline of Ahlmann-Eltze, Huber & Anders (2025, Nature Methods), `Y ~ G W P' + b`, which takes mean
    expression for `D`, perturbations' embeddings for `F`, and shrinks by the same ridge along `G = V` as well.

    With perturbation ids, one without training cells adds nothing, and the sentence counts as unseen. With features, any
    perturbation is predicted from its own.

    Args:
        config ([`LinearConfig`]): sizes and options.
    """

    config: LinearConfig
    config_class = LinearConfig
    weight: nn.Parameter
    components: nn.Parameter
    intercept: nn.Parameter

    def __init__(self, config: LinearConfig):
        super().__init__(config)
        self._add_table("weight", config.perturbation_width, config.rank or config.output_dim)
        if config.rank is not None:
            self._add_table("components", config.rank, config.output_dim)
        if config.intercept:
            self._add_table("intercept", config.output_dim)
        if config.num_perturbations is not None:
            self._add_seen(config.num_perturbations)
        self.post_init()

    def fit(self, means: TrainingMeans):
        """
        Solve for the weights.

        Raises:
            ValueError: `rank` is more than the training data have.
        """
        self._check_means(means)
        config, changes, features = self.config, means.changes, means.perturbation_features
        if features is None:
            ids = given("perturbation_ids", means.perturbation_ids)
            features = np.zeros((len(changes), config.perturbation_width))
            rows, places = np.nonzero(ids >= 0)
            # A perturbation that stands twice in a combination counts twice.
            np.add.at(features, (rows, ids[rows, places]), 1)
            self._set(seen=np.asarray(features.any(axis=0)))
        features = features.astype(np.float64)
        feature_means, change_means = features.mean(axis=0), changes.mean(axis=0)
        if config.intercept:
            features, changes = features - feature_means, changes - change_means
        solved = changes
        if config.rank is not None:
            if config.rank > min(changes.shape):
                raise ValueError(
                    f"rank={config.rank}: expected at most {min(changes.shape)}, as the training data have {len(changes)} "
                    f"perturbations of {changes.shape[1]} features; lower it, or leave it out"
                )
            components = np.linalg.svd(changes, full_matrices=False)[2][: config.rank]
            solved = changes @ components.T
            self._set(components=components)
        weight = ridge_weights(features, solved, config.ridge)
        self._set(weight=weight)
        if config.intercept:
            full = weight if config.rank is None else weight @ components
            self._set(intercept=change_means - feature_means @ full)

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
        """Inputs, output and errors as in [`PerturbationPreTrainedModel`]; contexts and batches are not used."""
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        unseen = None
        if self.config.num_perturbations is not None:
            ids, doses = ids_and_doses(perturbation_ids, perturbation_doses, perturbation_features)
            rows = ids.clamp(min=0)
            change = (doses.unsqueeze(-1).to(self.weight.dtype) * self.weight[rows]).sum(dim=-2)
            unseen = ((ids >= 0) & ~self.seen[rows]).flatten(1).any(dim=1)
        else:
            change = per_cell(given("perturbation_features", perturbation_features)).to(self.weight.dtype) @ self.weight
        if self.config.rank is not None:
            change = change @ self.components
        if self.config.intercept:
            perturbed = ~is_control(perturbation_ids, perturbation_features)
            change = change + perturbed.unsqueeze(-1).to(change.dtype) * self.intercept
        return self._outputs(
            control_cells + change, unseen, "a perturbation of theirs has no training cells, so that it adds nothing"
        )


__all__ = ["LinearForPerturbation"]
