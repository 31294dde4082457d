"""Scores groups. Runs, the command and Python all use this code, so they score the same cells and give the same figures."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from threading import RLock

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pertstate.base.cell_ids import order_of
from pertstate.base.messages import given
from pertstate.evaluation.baselines import BASELINES, MEAN_OF_ALL, NO_CHANGE, Baselines, Change, ChangedCells
from pertstate.evaluation.bootstrap import DRAWS, bootstrap_weights, correlation, generator_of, weighted_distances
from pertstate.evaluation.further_metrics import FurtherFigures, WeightedCells, bandwidth_of
from pertstate.evaluation.metrics import CEILING, FURTHER, METRICS, MODEL
from pertstate.evaluation.read_ahead import read_ahead


# The largest number of control, of predicted and of real cells of a group that are scored.
MAX_CELLS = 1000
# For each real cell of a group, at most so many control and predicted cells are scored: more would cost time and tell
# nothing. Up to FEWEST cells are scored in any case.
CELLS_FOR_EACH, FEWEST = 10, 100
# Random halves of the real cells of a group, from which the ceiling is estimated.
HALVES = 10
# Values of cells that several baselines predict at once.
_VALUES_TOGETHER = 1 << 18

Group = tuple[str, str, str]


@dataclass
class RealCells:
    """
    Real cells that predictions are scored against, wherever they lie.

    Args:
        rows_of (`dict[Group, np.ndarray]`): the rows of the cells of each (dataset, context, perturbation).
        ids (`Callable`, *optional*): gives a number for the barcode of each of some rows, see
            [`~pertstate.base.cell_ids.cell_ids`]; None if cells have no barcodes.
        scored (`Callable`): gives the cells of some rows in the units of predictions, `(rows, features)` float32.
        inputs (`Callable`, *optional*): gives the cells of some rows as the model reads them; None if nothing is predicted.
        batches (`Callable`, *optional*): gives the experimental batches of some rows; None if there are none.
    """

    rows_of: dict[Group, np.ndarray]
    ids: Callable[[np.ndarray], np.ndarray] | None
    scored: Callable[[np.ndarray], np.ndarray]
    inputs: Callable[[np.ndarray], np.ndarray] | None = None
    batches: Callable[[np.ndarray], np.ndarray] | None = None

    def rows(self, group: Group, seed: int, at_most: int | None) -> np.ndarray:
        """
        The rows of a group in the order in which they are drawn. The order follows from their barcodes and the seed, so it does
        not depend on where the cells stand.
        """
        rows = self.rows_of.get(group, np.zeros(0, dtype=np.int64))
        return rows[order_of(self.ids(rows) if self.ids else None, len(rows), seed)][:at_most]


@dataclass
class Predicted:
    """
    The predicted cells of a group.

    Args:
        cells (`np.ndarray` of shape `(cells, features)`): the cells in the units of predictions, float32.
        of_controls (`bool`): whether cell i was predicted from the i-th control cell of its context.
        confidence (`float`, *optional*): the loss that the model expects.
    """

    cells: np.ndarray
    of_controls: bool = False
    confidence: float | None = None


class ControlCells:
    """
    The control cells of a context, with the figures that depend only on them. All groups of the context share these.

    Args:
        cells (`np.ndarray` of shape `(cells, features)`): in the order in which they are drawn.
        names (`tuple[str, str]`): dataset and context.
        seed (`int`), draws (`int`): seed and resamplings of the bootstrap; without draws, only the figures themselves are found.
    """

    def __init__(self, cells: np.ndarray, names: tuple[str, str], seed: int = 0, draws: int = DRAWS):
        self.cells, self.names, self.seed, self.draws = cells, names, seed, draws
        self.bandwidth_cells = cells
        self._smaller: dict[int, ControlCells] = {}
        self._changed: tuple[np.ndarray, WeightedCells] | None = None
        # Groups are scored in several threads.
        self._lock = RLock()

    def first(self, number: int) -> "ControlCells":
        """The first `number` cells, or all if there are no more."""
        if number >= len(self.cells):
            return self
        with self._lock:
            smaller = self._smaller.get(number)
            if smaller is None:
                smaller = ControlCells(self.cells[:number], self.names, self.seed, self.draws)
                smaller.bandwidth_cells = self.bandwidth_cells
                self._smaller = {number: smaller}
            return smaller

    @cached_property
    def weights(self) -> np.ndarray:
        """See [`bootstrap_weights`]."""
        return bootstrap_weights(generator_of(self.seed, self.names[1]), len(self.cells), self.draws)

    @cached_property
    def weighted(self) -> WeightedCells:
        """The cells as one set, with their weights."""
        return WeightedCells(self.cells[None], self.weights)

    @cached_property
    def expression(self) -> np.ndarray:
        """`expm1` of the cells."""
        return np.expm1(self.cells)

    def prepare(self) -> "ControlCells":
        """Compute what all groups need, once, whatever thread asks first."""
        with self._lock:
            _ = self.weighted.within, self.weighted.variance, self.weighted.zeros
        return self

    def changed(self, change: np.ndarray, cells: Callable[[], np.ndarray]) -> WeightedCells:
        """The cells with a change that several groups share, `cells()`, kept until another one is asked for."""
        with self._lock:
            if self._changed is None or self._changed[0] is not change:
                found = WeightedCells(cells()[None], self.weights)
                _ = found.within, found.variance, found.zeros
                self._changed = change, found
            return self._changed[1]

    @cached_property
    def bandwidth(self) -> float:
        """The bandwidth of the kernel of the MMD, the same for all groups of the context, see [`bandwidth_of`]."""
        return bandwidth_of(self.bandwidth_cells)


@dataclass
class GroupResult:
    """
    The scores of one group.

    Args:
        group (`Group`): dataset, context, perturbation.
        figures (`dict[str, np.ndarray]`): for each method `(1 + draws, metrics)`: the [`METRICS`], then those of each resampling.
        reasons (`dict[str, str]`): for a method without figures, the reason.
        numbers (`dict[str, int]`): `predicted_cells`, `real_cells` and `control_cells`.
        means (`dict[str, np.ndarray]`): `control`, `observed` and `predicted`, each `(features,)` float32.
        samples (`dict[str, np.ndarray]`): some `control`, `observed` and `predicted` cells.
        confidence (`float`, *optional*): the loss that the model expects.
        further (`dict[str, dict[str, np.ndarray]]`): for each method those of the figures [`FURTHER`] that were found, and the
            metrics of cell-eval, each `(1 + draws,)`, or `(1,)` if it is not found for resampled cells.
        changes (`dict[str, np.ndarray]`): the mean change of each method from the control cells, `(features,)` float32, if the
            discrimination score is asked for.
    """

    group: Group
    figures: dict[str, np.ndarray]
    reasons: dict[str, str]
    numbers: dict[str, int]
    means: dict[str, np.ndarray]
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    confidence: float | None = None
    further: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    changes: dict[str, np.ndarray] = field(default_factory=dict)

    def of(self, method: str, metric: str) -> np.ndarray | None:
        """A figure of a method, then those of each resampling, `(1 + draws,)` or `(1,)`. None if it is not known."""
        if metric in METRICS:
            return self.figures[method][:, METRICS.index(metric)] if method in self.figures else None
        return self.further.get(method, {}).get(metric)


def score_group(
    group: Group,
    predicted: Predicted | None,
    real: np.ndarray,
    controls: ControlCells,
    baselines: Baselines,
    seed: int = 0,
    metrics: tuple[str, ...] = (),
) -> GroupResult:
    """
    Score the model and each baseline on one group, and estimate the ceiling.

    Every change is measured from the mean of the same control cells. The baselines change these same cells. Resamplings draw
    real cells and control cells; a cell that was made from a control cell, by the model or a baseline, is drawn with it.

    The ceiling says what a perfect model would reach, one that knows the true distribution of the perturbed cells and is judged
    by n real cells. It is estimated from random halves of these cells:

    - correlation: the square root of `2r / (1 + r)`, where r is the correlation of the changes of both halves. This is the
      reliability of all cells (Spearman and Brown); its root is their correlation with the truth.
    - MAE: half of the MAE between the means of both halves, because that has twice the error of the mean of all cells.
    - energy distance and MMD: `(1 + n / m) / 4` of the distance of both halves, because it shrinks as the number of cells grows.
      The perfect model predicts m cells, as many as there are control cells.
    - MSE: a quarter of the MSE between the means of both halves.
    - variance ratio and share of zeros: those of the real cells.

    Args:
        group (`Group`): dataset, context, perturbation.
        predicted ([`Predicted`], *optional*): predicted cells; without them only the baselines are scored.
        real (`np.ndarray` of shape `(cells, features)`): real perturbed cells.
        controls ([`ControlCells`]): real control cells.
        baselines ([`Baselines`]): the baselines, which have learned from training cells.
        seed (`int`): seed of the resamplings and halves.
        metrics (`tuple[str, ...]`): those of the figures [`COSTLY`] that are asked for.

    Returns:
        [`GroupResult`].

    Raises:
        FloatingPointError: a figure is infinite, or is NaN and not an undefined correlation; the error names it.
    """
    controls = controls.first(max(FEWEST, CELLS_FOR_EACH * len(real))).prepare()
    control_means = controls.weighted.means[0]
    generator = generator_of(seed, *group[1:])
    weights = bootstrap_weights(generator, len(real), controls.draws)
    truth = WeightedCells(real, weights)
    observed = truth.means - control_means
    result = GroupResult(
        group,
        figures={},
        reasons={},
        numbers={"real_cells": len(real), "control_cells": len(controls.cells)},
        means={"control": control_means[0].astype(np.float32), "observed": truth.means[0].astype(np.float32)},
    )

    more = FurtherFigures(truth, lambda: controls.bandwidth, baselines.clip, metrics)

    def score(methods: list[str], found: WeightedCells):
        between = weighted_distances(found.cells, real, found.weights, weights)
        errors = found.means - truth.means
        further = more.of(found, errors)
        changes = found.means - control_means
        figures = [
            correlation(changes, observed),
            np.abs(errors, out=errors).mean(axis=-1),
            between - found.within / 2 - truth.within / 2,
        ]
        for i, method in enumerate(methods):
            result.figures[method], result.further[method] = np.stack([of[i] for of in figures], axis=1), further[i]
            if "discrimination" in metrics:
                result.changes[method] = changes[i, 0].astype(np.float32)

    if predicted is not None:
        cells = predicted.cells[: len(controls.cells)] if predicted.of_controls else predicted.cells
        alike = predicted.of_controls and len(cells) == len(controls.cells)
        drawn = (
            controls.weights
            if alike
            else bootstrap_weights(generator_of(seed, *group[1:], MODEL), len(cells), controls.draws)
        )
        found = WeightedCells(cells[None], drawn)
        score([MODEL], found)
        result.numbers["predicted_cells"], result.confidence = len(cells), predicted.confidence
        result.means["predicted"] = found.means[0, 0].astype(np.float32)
    known = baselines.of(group[2], control_means[0])
    result.reasons = {method: change for method, change in known.items() if isinstance(change, str)}
    shared: dict[str, WeightedCells] = {}
    own: dict[str, Change] = {}
    for method, change in known.items():
        if isinstance(change, str):
            continue
        if method == NO_CHANGE:
            shared[method] = controls.weighted
        elif method == MEAN_OF_ALL:
            # The same for all groups of the context.
            added = given("the mean change", change.added)
            shared[method] = controls.changed(added, partial(change.apply, controls.cells, baselines.clip))
        else:
            own[method] = change
    changed = ChangedCells(controls.cells, lambda: controls.expression, baselines.clip)
    # Few cells are scored for all baselines at once, many for one after another.
    together = max(1, _VALUES_TOGETHER // controls.cells.size)
    of_shared = WeightedCells.beside(list(shared.values())) if shared and len(known) <= together else None
    if of_shared is None:
        for method, found in shared.items():
            score([method], found)
    for start in range(0, len(own), together):
        some = dict(islice(own.items(), start, start + together))
        names = list(some)
        found = WeightedCells(np.stack([changed.of(change) for change in some.values()]), controls.weights)
        if of_shared is not None:
            names, found, of_shared = [*shared, *names], WeightedCells.beside([of_shared, found]), None
        score(names, found)
    if of_shared is not None:
        score(list(shared), of_shared)
    if len(real) < 4:
        result.reasons[CEILING] = "fewer than four real cells"
    else:
        first, second = _halves(len(real), generator)
        result.figures[CEILING] = _ceiling(real, controls, first, second)
        result.further[CEILING] = more.ceiling(first, second, len(controls.cells))
    for method, figures in result.figures.items():
        _check_finite(figures[0], method, group[2])
    return result


def _halves(cells: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How much each cell counts in the first and in the second half of each split, `(HALVES, cells)` float32 each."""
    halves = np.stack([generator.permutation(cells) < cells // 2 for _ in range(HALVES)])
    first, second = (
        part.astype(np.float32) / part.sum(axis=1, keepdims=True, dtype=np.float32) for part in (halves, ~halves)
    )
    return first, second


def _ceiling(real: np.ndarray, controls: ControlCells, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    means = [(part @ real).astype(np.float64) for part in (first, second)]
    of_halves = correlation(*(mean - controls.weighted.means[0, 0] for mean in means))
    r = float(of_halves[np.isfinite(of_halves)].mean()) if np.isfinite(of_halves).any() else np.nan
    between, a, b = (
        weighted_distances(real, real, u, v).mean() for u, v in ((first, second), (first, first), (second, second))
    )
    figures = [
        0.0 if r <= 0 else np.sqrt(2 * r / (1 + r)),
        np.abs(means[0] - means[1]).mean() / 2,
        (between - a / 2 - b / 2) * (1 + len(real) / len(controls.cells)) / 4,
    ]
    # The ceiling is an estimate itself, so it gets no interval.
    return np.vstack([figures, np.full((controls.draws, len(METRICS)), np.nan)])


def _check_finite(figures: np.ndarray, method: str, perturbation: str):
    for metric, value in zip(METRICS, figures):
        if np.isinf(value) or (np.isnan(value) and metric != "pearson"):
            raise FloatingPointError(
                f"{metric} of {method!r} for the perturbation {perturbation!r} is {value}: its predicted or real cells hold "
                "values that are NaN, infinite or too large"
            )


def score_groups(
    real: RealCells,
    groups: Iterable[tuple[Group, Predicted | None]],
    control: str,
    baselines: Baselines,
    seed: int = 0,
    max_cells: int | None = MAX_CELLS,
    samples: int = 0,
    draws: int = DRAWS,
    metrics: tuple[str, ...] = (),
    also: Callable[[Group, Predicted | None, np.ndarray, np.ndarray], None] | None = None,
    order: Sequence[Group] | None = None,
) -> Iterator[GroupResult]:
    """
    Score groups, as many at a time as torch has threads (`OMP_NUM_THREADS` sets how many). Each is scored by one thread alone, so the
    figures do not depend on their number. So many groups, and one that is read, are in memory.

    Args:
        real ([`RealCells`]): real cells and their controls.
        groups (iterable of `(Group, Predicted)`): the groups with their predicted cells. Groups of a context should follow one
            another, because they share what is computed of its control cells.
        control (`str`): the perturbation of control cells.
        baselines ([`Baselines`]): the baselines, which have learned from training cells.
        seed (`int`), max_cells (`int`, *optional*): the seed with which cells are drawn, and the largest number of cells of each
            kind; None takes all.
        samples (`int`): how many cells of each kind are kept for pictures.
        draws (`int`): resamplings of the bootstrap.
        metrics (`tuple[str, ...]`): those of the figures [`COSTLY`] that are asked for.
        also (`Callable`, *optional*): is given each group, its predicted and real cells, and the control cells of its context.
        order (`Sequence[Group]`, *optional*): the groups that `groups` will give. Real cells of small ones are then read together.

    Returns:
        Iterator of the [`GroupResult`] of each group, in the order of `groups`.
    """
    kept: dict[tuple[str, str], ControlCells] = {}
    waiting: deque[Future[GroupResult]] = deque()
    workers = torch.get_num_threads()

    def score(group: Group, predicted: Predicted | None, cells: np.ndarray, controls: ControlCells) -> GroupResult:
        result = score_group(group, predicted, cells, controls, baselines, seed, metrics)
        shown = {"control": controls.cells, "observed": cells}
        if predicted is not None:
            shown["predicted"] = predicted.cells
        result.samples = {name: of[:samples].astype(np.float32) for name, of in shown.items()}
        return result

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        ahead = None if order is None else read_ahead((real.rows(of, seed, max_cells) for of in order), real.scored)
        for group, predicted in groups:
            cells = real.scored(real.rows(group, seed, max_cells)) if ahead is None else next(ahead)
            place = group[:2]
            if place not in kept:
                rows = real.rows((*place, control), seed, max_cells)
                kept = {place: ControlCells(real.scored(rows), place, seed, draws)}
            if also is not None:
                also(group, predicted, cells, kept[place].cells)
            waiting.append(pool.submit(score, group, predicted, cells, kept[place]))
            if len(waiting) == workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def methods_of(results: list[GroupResult]) -> list[str]:
    """All methods that have figures or reasons, in the order of tables."""
    found = {name for result in results for name in (*result.figures, *result.reasons)}
    return [name for name in (MODEL, *BASELINES, CEILING) if name in found]


def metrics_of(results: list[GroupResult]) -> list[str]:
    """All figures that were found, in the order of tables."""
    further = dict.fromkeys(name for result in results for of_method in result.further.values() for name in of_method)
    return [
        *METRICS,
        *(name for name in FURTHER if name in further),
        *(name for name in further if name not in FURTHER),
    ]
