"""The mean cell of each training group. Baselines are computed from it, and it is small enough to be saved with a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pertstate.data.group_sums import GroupKey, GroupSums, log_fold_change


@dataclass
class GroupMeans:
    """
    The mean cell of each training group, and of the control cells of each (dataset, context) that has training groups.

    Args:
        control (`str`): the perturbation of control cells.
        groups (`list[GroupKey]`): dataset, context and perturbation of each group, sorted.
        counts (`np.ndarray` of shape `(groups,)`): its cells.
        means (`np.ndarray` of shape `(groups, features)`): its mean cell, float32, in the units of predictions.
        expression (`np.ndarray` of shape `(groups, features)`, *optional*): the mean of `expm1` of its cells, float32; None
            where predictions are no log1p expression.
    """

    control: str
    groups: list[GroupKey]
    counts: np.ndarray
    means: np.ndarray
    expression: np.ndarray | None = None

    @classmethod
    def of_sums(cls, sums: GroupSums) -> "GroupMeans":
        """The means of groups that have controls, and of these controls. ValueError if there is none."""
        groups = sums.paired
        if not groups:
            raise ValueError("no perturbed training cells with control cells of their dataset and context")
        counts = np.array([sums.counts[key] for key in groups])
        means = np.stack([sums.sums[key] / sums.counts[key] for key in groups]).astype(np.float32)
        expression = None
        if sums.expression is not None:
            expression = np.stack([sums.expression[key] / sums.counts[key] for key in groups]).astype(np.float32)
        return cls(sums.control, groups, counts, means, expression)

    def changes(self) -> dict[str, np.ndarray]:
        """
        Perturbation to the unweighted mean, over the datasets' contexts that have it, of (mean perturbed cell - mean control
        cell), `(features,)` float64.
        """
        return self._over_contexts(self.change)

    def log_folds(self) -> dict[str, np.ndarray]:
        """
        Perturbation to the unweighted mean, over the datasets' contexts that have it, of the log fold change of the mean
        expression, see [`log_fold_change`], `(features,)` float64. Empty where there is no expression.
        """
        return {} if self.expression is None else self._over_contexts(self.log_fold)

    def contexts_of(self, perturbation: str) -> list[tuple[str, str]]:
        """The (dataset, context) pairs that have training cells of a perturbation, sorted."""
        return self._contexts.get(perturbation, [])

    def control_mean(self, place: tuple[str, str]) -> np.ndarray:
        """The mean control cell of a (dataset, context), float64."""
        return self.means[self._row[*place, self.control]].astype(np.float64)

    def change(self, place: tuple[str, str], perturbation: str) -> np.ndarray:
        """Mean perturbed cell - mean control cell in a (dataset, context), float64."""
        return self.means[self._row[*place, perturbation]].astype(np.float64) - self.control_mean(place)

    def log_fold(self, place: tuple[str, str], perturbation: str) -> np.ndarray:
        """The log fold change of the mean expression in a (dataset, context), float64."""
        expression: np.ndarray = self.expression  # type: ignore[assignment]  # asked for where there is some
        perturbed, control = (expression[self._row[*place, name]] for name in (perturbation, self.control))
        return log_fold_change(perturbed.astype(np.float64), control.astype(np.float64))

    def of_features(self, columns: np.ndarray) -> "GroupMeans":
        """The means of these features alone, in this order."""
        expression = None if self.expression is None else self.expression[:, columns]
        return GroupMeans(self.control, self.groups, self.counts, self.means[:, columns], expression)

    def of(self, perturbations: Iterable[str]) -> "GroupMeans":
        """The means of these perturbations alone, and of all control cells."""
        kept = {*perturbations, self.control}
        rows = [i for i, key in enumerate(self.groups) if key[2] in kept]
        expression = None if self.expression is None else self.expression[rows]
        return GroupMeans(self.control, [self.groups[i] for i in rows], self.counts[rows], self.means[rows], expression)

    def is_like(self, other: "GroupMeans") -> bool:
        """Whether both have as many features, and both or none have `expression`."""
        return self.means.shape[1] == other.means.shape[1] and (self.expression is None) == (other.expression is None)

    def joined(self, other: "GroupMeans") -> "GroupMeans":
        """These groups and those of another training, which [`is_like`] this one. A group that both have has the mean of all its cells."""
        theirs = [(dataset, context, self._named(name, other)) for dataset, context, name in other.groups]
        groups = sorted({*self.groups, *theirs})
        row = {key: i for i, key in enumerate(groups)}
        rows = np.array([row[key] for key in (*self.groups, *theirs)])
        cells = np.concatenate([self.counts, other.counts])
        counts = np.bincount(rows, weights=cells).astype(np.int64)

        def mean(mine: np.ndarray, its: np.ndarray) -> np.ndarray:
            sums = np.zeros((len(groups), mine.shape[1]))
            np.add.at(sums, rows, np.concatenate([mine, its]).astype(np.float64) * cells[:, None])
            return (sums / counts[:, None]).astype(np.float32)

        expression = None
        if self.expression is not None and other.expression is not None:
            expression = mean(self.expression, other.expression)
        return GroupMeans(self.control, groups, counts, mean(self.means, other.means), expression)

    def _named(self, name: str, other: "GroupMeans") -> str:
        """What a perturbation of another training is called here."""
        return self.control if name == other.control else name

    @cached_property
    def _contexts(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for dataset, context, name in self.groups:
            found.setdefault(name, []).append((dataset, context))
        return found

    @cached_property
    def _row(self) -> dict[GroupKey, int]:
        return {key: i for i, key in enumerate(self.groups)}

    def _over_contexts(self, change) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {}
        for dataset, context, name in self.groups:
            if name != self.control:
                found.setdefault(name, []).append(change((dataset, context), name))
        return {name: np.mean(changes, axis=0) for name, changes in sorted(found.items())}
