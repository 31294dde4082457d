"""Simple predictions that any model must beat: each changes the control cells by what training cells show."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import numpy as np

from pertstate.base.messages import given
from pertstate.base.modeling_fitted import ridge_weights
from pertstate.data.group_means import GroupMeans


NO_CHANGE = "no change"
PERTURBATION_MEAN = "perturbation mean"
LOG_FOLD_CHANGE = "log fold change"
HALF_AND_HALF = "half and half"
NEAREST_CONTEXT = "nearest context"
ADDITIVE = "additive"
LINEAR = "linear"
MEAN_OF_ALL = "mean of all perturbations"
BASELINES = (
    NO_CHANGE,
    PERTURBATION_MEAN,
    LOG_FOLD_CHANGE,
    HALF_AND_HALF,
    NEAREST_CONTEXT,
    ADDITIVE,
    LINEAR,
    MEAN_OF_ALL,
)
# The penalty of the baseline "linear". The family `state-linear` has the same by default.
RIDGE = 0.1


@dataclass
class Change:
    """
    What a baseline does to control cells.

    Args:
        added (`np.ndarray` of shape `(features,)`, *optional*): added to each cell.
        log_fold (`np.ndarray` of shape `(features,)`, *optional*): natural logarithms of the factors by which expression,
            `expm1` of the cell, is multiplied. With both, the prediction is the mean of the two.
    """

    added: np.ndarray | None = None
    log_fold: np.ndarray | None = None

    def apply(self, cells: np.ndarray, clip: bool) -> np.ndarray:
        """Changed cells, `(cells, features)` float32; with `clip`, none is below 0."""
        return ChangedCells(cells, lambda: np.expm1(cells), clip).of(self)


class ChangedCells:
    """
    Control cells with several changes. What changes have in common is computed once: *half and half* is the mean of two others.

    Args:
        cells (`np.ndarray` of shape `(cells, features)`): control cells, float32.
        expression (`Callable`): gives `expm1` of them.
        clip (`bool`): none is below 0.
    """

    def __init__(self, cells: np.ndarray, expression: Callable[[], np.ndarray], clip: bool):
        self.cells, self.expression, self.clip = cells, expression, clip
        # Of the change that was found last, so that memory stays bounded.
        self._moved: tuple[np.ndarray, np.ndarray] | None = None
        self._folded: tuple[np.ndarray, np.ndarray] | None = None

    def of(self, change: Change) -> np.ndarray:
        """The changed cells, `(cells, features)` float32."""
        found = []
        if change.added is not None:
            if self._moved is None or self._moved[0] is not change.added:
                moved = self.cells + change.added.astype(np.float32)
                self._moved = change.added, np.maximum(moved, 0, out=moved) if self.clip else moved
            found.append(self._moved[1])
        if change.log_fold is not None:
            if self._folded is None or self._folded[0] is not change.log_fold:
                folded = self.expression() * np.exp(change.log_fold).astype(np.float32)
                self._folded = change.log_fold, np.log1p(folded, out=folded)
            found.append(self._folded[1])
        return found[0] if len(found) == 1 else (found[0] + found[1]) / np.float32(2)


class Baselines:
    """
    The baselines of [`BASELINES`], learned from the means of training groups. Each changes the control cells:

    - no change: the control cells stay as they are.
    - perturbation mean: the perturbation's mean change is added, the unweighted mean over training contexts of (mean
      perturbed cell - mean control cell).
    - log fold change: expression is multiplied by the perturbation's geometric mean fold change over training contexts, see
      [`GroupMeans.log_folds`]. For a combination that was not trained on, it is multiplied by those of all parts.
    - half and half: the mean of these two predictions. For a combination that was not trained on, the changes of its parts
      are added up.
    - nearest context: the change in the training context whose mean control cell is nearest is added.
    - additive: the mean changes of the parts of a combination are added.
    - linear: the change that a ridge regression predicts is added. It is fitted to the mean changes of the perturbations,
      from their one-hot codes, or from their vectors if the model has some.
    - mean of all perturbations: the mean of all perturbations' mean changes is added.

    Args:
        means ([`GroupMeans`], *optional*): means of the training groups; None if they are not known.
        split (`Callable`): gives the parts of a perturbation.
        clip (`bool`): whether predictions are expression, which is clipped at 0.
        vectors (`Callable`, *optional*): gives the vectors of perturbations, `(perturbations, width)`, or None if one of them
            has no vector.
        methods (`tuple[str, ...]`, *optional*): only these baselines; all by default.
    """

    def __init__(
        self,
        means: GroupMeans | None,
        split: Callable[[str], list[str]],
        clip: bool,
        vectors: Callable[[list[str]], np.ndarray | None] | None = None,
        methods: tuple[str, ...] | None = None,
    ):
        self.means, self.split, self.clip, self.vectors, self.methods = means, split, clip, vectors, methods
        self._changes = {} if means is None else means.changes()
        self._log_folds = {} if means is None else means.log_folds()
        self._mean_of_all = np.mean(list(self._changes.values()), axis=0) if len(self._changes) > 1 else None
        # Groups are scored in several threads.
        self._lock = Lock()
        self._linear: tuple[dict[str, int], np.ndarray, np.ndarray] | None = None

    def of(self, perturbation: str, control_mean: np.ndarray) -> dict[str, Change | str]:
        """
        What each baseline knows about a perturbation: a change, or the reason why it knows none.

        Args:
            perturbation (`str`): its canonical name.
            control_mean (`np.ndarray` of shape `(features,)`): mean of the control cells that are changed.
        """
        with self._lock:
            found = self._known(perturbation, control_mean)
        return {name: of for name, of in found.items() if self.methods is None or name in self.methods}

    def _known(self, perturbation: str, control_mean: np.ndarray) -> dict[str, Change | str]:
        if self.means is None:
            unknown = "the training cells are not known"
            return {NO_CHANGE: Change(np.zeros(len(control_mean))), **dict.fromkeys(BASELINES[1:], unknown)}
        parts = self.split(perturbation)
        nothing = "no training cell has it"
        own, own_log = self._changes.get(perturbation), self._log_folds.get(perturbation)
        added = own if own is not None else self._sum(self._changes, parts)
        log_fold = own_log if own_log is not None else self._sum(self._log_folds, parts)
        found: dict[str, Change | str] = {NO_CHANGE: Change(np.zeros(len(control_mean)))}
        found[PERTURBATION_MEAN] = nothing if own is None else Change(own)
        if self.means.expression is None:
            found[LOG_FOLD_CHANGE] = found[HALF_AND_HALF] = "only for log1p expression"
        else:
            found[LOG_FOLD_CHANGE] = nothing if log_fold is None else Change(log_fold=log_fold)
            found[HALF_AND_HALF] = nothing if added is None else Change(added, log_fold)
        found[NEAREST_CONTEXT] = self._nearest(perturbation, control_mean)
        of_parts = self._sum(self._changes, parts)
        if len(parts) < 2:
            found[ADDITIVE] = "not a combination"
        else:
            found[ADDITIVE] = "no training cell has one of its parts" if of_parts is None else Change(of_parts)
        found[LINEAR] = self._ridge(perturbation, parts)
        found[MEAN_OF_ALL] = (
            "fewer than two training perturbations" if self._mean_of_all is None else Change(self._mean_of_all)
        )
        return found

    @staticmethod
    def _sum(of: dict[str, np.ndarray], parts: list[str]) -> np.ndarray | None:
        """The sum over the parts of a combination. None for a single perturbation, or if a part is unknown."""
        if len(parts) < 2 or not all(part in of for part in parts):
            return None
        return np.sum([of[part] for part in parts], axis=0)

    def _nearest(self, perturbation: str, control_mean: np.ndarray) -> Change | str:
        means = given("means", self.means)
        having = means.contexts_of(perturbation)
        if not having:
            return "no training cell has it"
        if len(having) < 2:
            return "only one training context has it"
        distances = [np.linalg.norm(means.control_mean(place) - control_mean) for place in having]
        return Change(means.change(having[int(np.argmin(distances))], perturbation))

    def _ridge(self, perturbation: str, parts: list[str]) -> Change | str:
        if len(self._changes) < 2:
            return "fewer than two training perturbations"
        if self.vectors is not None:
            names = list(self._changes)
            known, asked = self.vectors(names), self.vectors([perturbation])
            if known is None or asked is None:
                return "it has no vector"
            if self._linear is None:
                self._linear = ({}, *self._solve(known))
            return Change(asked[0] @ self._linear[1] + self._linear[2])
        if self._linear is None:
            names = sorted({part for name in self._changes for part in self.split(name)})
            of_name = {name: i for i, name in enumerate(names)}
            one_hot = np.zeros((len(self._changes), len(names)))
            for row, name in enumerate(self._changes):
                for part in self.split(name):
                    one_hot[row, of_name[part]] += 1
            self._linear = (of_name, *self._solve(one_hot))
        of_name, weight, intercept = self._linear
        if not all(part in of_name for part in parts):
            return "no training cell has it" if len(parts) < 2 else "no training cell has one of its parts"
        return Change(np.sum([weight[of_name[part]] for part in parts], axis=0) + intercept)

    def _solve(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        changes = np.stack(list(self._changes.values()))
        feature_means, change_means = features.mean(axis=0), changes.mean(axis=0)
        weight = ridge_weights(features - feature_means, changes - change_means, RIDGE)
        return weight, change_means - feature_means @ weight
