"""Counts and sums of the cells of groups, in float64. Every mean over training cells is computed from these."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm.auto import tqdm

from pertstate.base.constants import PERTURBATION_FEATURES, PERTURBATION_IDS
from pertstate.base.messages import given
from pertstate.base.modeling_anchor import PSEUDOCOUNT
from pertstate.base.modeling_fitted import TrainingMeans
from pertstate.processing import StateProcessor


GroupKey = tuple[str, str, str]


@dataclass
class GroupSums:
    """
    How many cells each (dataset, context, perturbation) has, and their sum.

    Args:
        control (`str`): the perturbation of control cells.
        counts (`dict[GroupKey, int]`), sums (`dict[GroupKey, np.ndarray]`): cells of each group, and their sum
            `(features,)` in float64.
        expression (`dict[GroupKey, np.ndarray]`, *optional*): the sum of `expm1` of the cells, where they are log1p
            expression; None where they are not.
    """

    control: str
    counts: dict[GroupKey, int] = field(default_factory=dict)
    sums: dict[GroupKey, np.ndarray] = field(default_factory=dict)
    expression: dict[GroupKey, np.ndarray] | None = None

    @classmethod
    def of_cells(
        cls,
        features,
        groups: pd.DataFrame,
        control: str,
        part: int = 0,
        parts: int = 1,
        progress: bool = False,
        block: int = 4096,
        log1p: bool = False,
    ) -> "GroupSums":
        """
        Read once, block by block, each cell of the groups that have controls, and each of these controls.

        Args:
            features (of shape `(cells, features)`): `features[start:stop]` gives an array.
            groups (`pandas.DataFrame`): columns `dataset`, `context`, `perturbation`, `start` and `stop`, the rows of
                the cells. Rows of other cells are not read.
            part, parts (`int`): take this share of the groups; together the shares are all of them.
            progress (`bool`): show a progress bar.
            block (`int`): cells that are read at once.
            log1p (`bool`): the features are log1p expression, which is summed too.
        """
        summed = cls(control, expression={} if log1p else None)
        spans: dict[GroupKey, list[tuple[int, int]]] = {}
        for *key, start, stop in groups[["dataset", "context", "perturbation", "start", "stop"]].to_numpy():
            dataset, context, perturbation = map(str, key)
            spans.setdefault((dataset, context, perturbation), []).append((start, stop))
        mine = sorted(_paired(spans, control))[part::parts]
        total = sum(stop - start for key in mine for start, stop in spans[key])
        pieces = [
            (key, first, min(first + block, stop))
            for key in mine
            for start, stop in spans[key]
            for first in range(start, stop, block)
        ]
        with tqdm(total=total, desc="fit", unit=" cells", unit_scale=True, disable=not progress) as bar:
            for together in _neighbours(pieces, block):
                first, last = together[0][1], together[-1][2]
                cells = features[first:last]
                for key, start, stop in together:
                    summed.add(key, cells[start - first : stop - first])
                bar.update(last - first)
        return summed

    @classmethod
    def merged(cls, several: "list[GroupSums]") -> "GroupSums":
        """The sums over disjoint sets of cells together."""
        summed = cls(several[0].control, expression=None if several[0].expression is None else {})
        for other in several:
            for key, count in other.counts.items():
                summed._add(key, count, other.sums[key], None if other.expression is None else other.expression[key])
        return summed

    def add(self, key: GroupKey, cells: "np.ndarray | sp.csr_matrix"):
        """Some more cells of a group, `(cells, features)` float32."""
        expression = None
        if isinstance(cells, np.ndarray):
            total = cells.sum(axis=0, dtype=np.float64)
            if self.expression is not None:
                expression = np.expm1(cells).sum(axis=0, dtype=np.float64)
        else:
            # A sparse matrix would sum itself in float32.
            total = np.bincount(cells.indices, weights=cells.data, minlength=cells.shape[1])
            if self.expression is not None:
                expression = np.bincount(cells.indices, weights=np.expm1(cells.data), minlength=cells.shape[1])
        self._add(key, cells.shape[0], total, expression)

    def _add(self, key: GroupKey, count: int, total: np.ndarray, expression: np.ndarray | None = None):
        self.counts[key] = self.counts.get(key, 0) + count
        self.sums[key] = self.sums[key] + total if key in self.sums else total
        if self.expression is not None:
            expression = given("expression", expression)
            self.expression[key] = self.expression[key] + expression if key in self.expression else expression

    @property
    def lonely(self) -> list[tuple[str, str]]:
        """The (dataset, context) pairs of perturbed cells without control cells."""
        controls = {key[:2] for key in self.counts if key[2] == self.control}
        return sorted({key[:2] for key in self.counts} - controls)

    @property
    def num_cells(self) -> int:
        """How many cells there are of perturbed groups that have controls, and of these controls."""
        return sum(self.counts[key] for key in _paired(self.counts, self.control))

    @property
    def paired(self) -> list[GroupKey]:
        """The keys of perturbed groups that have controls, and of these controls, sorted."""
        return sorted(_paired(self.counts, self.control))

    def changes(self) -> dict[str, np.ndarray]:
        """
        Perturbation to the unweighted mean, over the datasets' contexts that have it, of (mean perturbed cell - mean
        control cell), `(features,)` float64. Contexts without control cells are left out.
        """
        return self._over_contexts(lambda key, control: self._mean([key]) - self._mean([control]))

    def log_folds(self) -> dict[str, np.ndarray]:
        """
        Perturbation to the unweighted mean, over the datasets' contexts that have it, of the log fold change of the mean
        expression, see [`log_fold_change`], `(features,)` float64. The means are rounded to float32 first, as
        [`~pertstate.data.group_means.GroupMeans`] holds them, so that both give the same digits. Empty where there is no expression.
        """
        expression = self.expression
        if expression is None:
            return {}

        def mean(key: GroupKey) -> np.ndarray:
            return (expression[key] / self.counts[key]).astype(np.float32).astype(np.float64)

        return self._over_contexts(lambda key, control: log_fold_change(mean(key), mean(control)))

    def context_means(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """
        Context to the mean of its perturbed cells over all perturbations, and to that of its control cells,
        `(features,)` float64 each. Every cell weighs the same, whatever dataset it is of.
        """
        of_context: dict[str, tuple[list[GroupKey], list[GroupKey]]] = {}
        for key in sorted(_paired(self.counts, self.control)):
            of_context.setdefault(key[1], ([], []))[key[2] == self.control].append(key)
        return {context: (self._mean(perturbed), self._mean(of)) for context, (perturbed, of) in of_context.items()}

    def means(self, processor: StateProcessor) -> TrainingMeans:
        """
        What a model is fitted to, with names as the numbers that the processor gives them.

        Raises:
            ValueError: the perturbations have doses, which no family that is fitted knows.
        """
        if processor.dose_key is not None:
            raise ValueError(
                f"dose_key={processor.dose_key!r}: families that are fitted in one pass know no doses; train another family, or "
                "leave dose_key out"
            )
        changes = self.changes()
        encoded = processor.encode(list(changes))
        # A context that came up after the first look over a stream has no number.
        known = set(processor.vocabulary.contexts)
        contexts = {context: means for context, means in self.context_means().items() if context in known}
        return TrainingMeans(
            changes=np.stack(list(changes.values())),
            perturbation_ids=encoded.get(PERTURBATION_IDS),
            perturbation_features=encoded.get(PERTURBATION_FEATURES),
            context_ids=processor.encode_contexts(contexts),
            context_means=np.stack([perturbed for perturbed, _ in contexts.values()]),
            control_means=np.stack([control for _, control in contexts.values()]),
            log_folds=None if self.expression is None else np.stack(list(self.log_folds().values())),
        )

    def _over_contexts(self, change: Callable[[GroupKey, GroupKey], np.ndarray]) -> dict[str, np.ndarray]:
        """Perturbation to the mean, over the contexts that have it, of what `change` gives of its group and of its controls."""
        found: dict[str, list[np.ndarray]] = {}
        for dataset, context, name in sorted(_paired(self.counts, self.control)):
            if name != self.control:
                found.setdefault(name, []).append(change((dataset, context, name), (dataset, context, self.control)))
        return {name: np.mean(changes, axis=0) for name, changes in sorted(found.items())}

    def _mean(self, keys: list[GroupKey]) -> np.ndarray:
        return sum((self.sums[key] for key in keys), np.zeros(1)) / sum(self.counts[key] for key in keys)


def log_fold_change(perturbed: np.ndarray, control: np.ndarray, pseudocount: float = PSEUDOCOUNT) -> np.ndarray:
    """
    The log of the fold change of mean expression, `log((perturbed + c) / (control + c))`, natural.

    Args:
        perturbed, control (`np.ndarray` of shape `(features,)`): means of `expm1` of log1p values.
        pseudocount (`float`): c, in the same units.
    """
    return np.log(perturbed + pseudocount) - np.log(control + pseudocount)


def _neighbours(pieces: list[tuple[GroupKey, int, int]], block: int) -> Iterator[list[tuple[GroupKey, int, int]]]:
    """Pieces whose rows follow one another and are no more than `block` together, so that small groups are read at once."""
    together: list[tuple[GroupKey, int, int]] = []
    for piece in pieces:
        if together and (piece[1] != together[-1][2] or piece[2] - together[0][1] > block):
            yield together
            together = []
        together.append(piece)
    if together:
        yield together


def _paired(keys, control: str) -> list[GroupKey]:
    """The keys of perturbed cells that have controls of their dataset and context, and those of the controls."""
    controls = {key[:2] for key in keys if key[2] == control}
    perturbed = {key[:2] for key in keys if key[2] != control}
    return [key for key in keys if key[:2] in controls & perturbed]
