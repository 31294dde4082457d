"""Control cells times the mean fold change of their perturbation."""

import torch
from torch import nn

from ...base.messages import given
from ...base.modeling_fitted import MeasuredPreTrainedModel, TrainingMeans, ids_and_doses
from ...base.modeling_perturbation import PerturbationOutput
from .configuration_log_fold_change import LogFoldChangeConfig


class LogFoldChangeForPerturbation(MeasuredPreTrainedModel):
    r"""
    `log1p(expm1(x) exp(sum_k dose_k l_k))`: the expression of each control cell times the geometric mean fold change of its
    perturbation. `l` is the unweighted mean over training contexts of `log((e_perturbed + c) / (e_control + c))`, where `e`
    is the mean of `expm1` of log1p expression and `c` is 0.01. A measured combination has an `l` of its own at doses of 1; other
    combinations and doses add up those of the single perturbations k, so their fold changes multiply. Where one of these was
    not measured alone, nothing changes, and the sentence counts as unseen. Perturbations given by features are recognised by
    their vector: those with equal vectors share the mean of their `l`.

    Args:
        config ([`LogFoldChangeConfig`]): sizes.
    """

    config: LogFoldChangeConfig
    config_class = LogFoldChangeConfig
    log_folds: nn.Parameter

    def __init__(self, config: LogFoldChangeConfig):
        super().__init__(config)
        self._add_entries("log_folds")
        self.post_init()

    def fit(self, means: TrainingMeans):
        """
        Take the log fold changes of all entries, and the config their number.

        Raises:
            ValueError: the training cells are no log1p expression.
        """
        self._check_means(means)
        if means.log_folds is None:
            raise ValueError(
                "state-log-fold-change: expected log1p expression, whose fold changes it takes, found other values; read or "
                "normalise to log1p expression, or use state-perturbation-mean"
            )
        self._fit_entries(means, "log_folds", means.log_folds)

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
        if self.config.num_perturbations is not None:
            log_fold, known = self._by_ids(*ids_and_doses(perturbation_ids, perturbation_doses, perturbation_features))
        else:
            entry, known = self._entries_of_features(given("perturbation_features", perturbation_features))
            log_fold = self.log_folds[entry]
        changed = torch.log1p(torch.expm1(control_cells) * log_fold.exp())
        return self._outputs(
            # A cell whose genes do not change keeps all its digits.
            torch.where(log_fold == 0, control_cells, changed),
            ~known.all(dim=1),
            "neither their perturbation nor all of its parts have training cells, so that nothing changes",
        )

    def _by_ids(self, ids: torch.Tensor, doses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1 or S, K) ids and doses to (B, 1 or S, D) log fold changes, 0 where they are not known, and whether they are."""
        whole, measured = self._entries_of_ids(ids)
        measured &= ((doses == 1) | (ids < 0)).all(dim=-1)
        single, known = self._entries_of_ids(ids.unsqueeze(-1))
        known = known.all(dim=-1)
        weights = (doses * known.unsqueeze(-1)).to(self.log_folds.dtype)
        parts = (weights.unsqueeze(-1) * self.log_folds[single]).sum(dim=-2)
        return torch.where(measured.unsqueeze(-1), self.log_folds[whole], parts), measured | known


__all__ = ["LogFoldChangeForPerturbation"]
