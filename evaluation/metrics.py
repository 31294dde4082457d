"""How well predicted cells match observed ones: the same figures in training, benchmarks and the command line."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from pertstate.data.group_sums import GroupSums
from pertstate.processing import StateProcessor


# One row of figures: correlation of the mean change, error of the mean, distance of the distributions.
METRICS = ("pearson", "mae", "energy")
MODEL, NO_CHANGE, PERTURBATION_MEAN, ADDITIVE = "model", "no change", "perturbation mean", "additive"
# The name of a model that was given the observed cells.
CEILING_MODEL = "model (ceiling)"


def pearson_of_change(predicted_mean: np.ndarray, real_mean: np.ndarray, control_mean: np.ndarray) -> float:
    """
    Pearson correlation over features between two mean changes, predicted - control and real - control; NaN if one of
    them is the same for all features.
    """
    x, y = predicted_mean - control_mean, real_mean - control_mean
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def mean_distance(x: np.ndarray, y: np.ndarray, block: int = 2048) -> float:
    """Mean Euclidean distance of all pairs of rows, in float64, in blocks of bounded memory."""
    # Near the origin, the matrix products behind the distances round less.
    center = x.mean(axis=0, dtype=np.float64)
    a, b = (torch.from_numpy(np.asarray(v, dtype=np.float64) - center) for v in (x, y))
    total = torch.zeros((), dtype=torch.float64)
    same = x is y
    for i in range(0, len(a), block):
        for j in range(i if same else 0, len(b), block):
            twice = 2 if same and j > i else 1  # the block of j and i is that of i and j
            total += twice * torch.cdist(a[i : i + block], b[j : j + block]).sum()
    return float(total / (len(a) * len(b)))


def energy_between(x: np.ndarray, y: np.ndarray, within_y: float | None = None, within_x: float | None = None) -> float:
    """
    Energy distance (Székely & Rizzo 2013) of two sets of cells, `mean|x-y| - mean|x-x'|/2 - mean|y-y'|/2`, diagonals
    included, in the units of the cells. It reports: float64, any number of cells, no gradient. Training minimises
    [`pertstate.losses.energy_distance`], the same quantity for pairs of weighted sets in their own precision.

    Args:
        x, y (`np.ndarray` of shape `(cells, features)`): the two sets.
        within_y, within_x (`float`, *optional*): `mean|y-y'|` and `mean|x-x'|`, where they are known already.
    """
    within_y = mean_distance(y, y) if within_y is None else within_y
    within_x = mean_distance(x, x) if within_x is None else within_x
    return mean_distance(x, y) - within_x / 2 - within_y / 2


class Controls:
    """
    The control cells of a context, and what is computed of them alone, once for all perturbations.

    Args:
        cells (`np.ndarray` of shape `(cells, features)`): the cells.
    """

    def __init__(self, cells: np.ndarray):
        self.cells, self.mean = cells, cells.mean(axis=0, dtype=np.float64)

    @cached_property
    def within(self) -> float:
        """The mean distance of all pairs."""
        return mean_distance(self.cells, self.cells)


@dataclass
class AsPredicted:
    """
    Real cells in the units of a model's predictions, read when they are asked for.

    Args:
        features (of shape `(cells, features)`): the model's features; `features[rows]` gives an array.
        processor ([`StateProcessor`]): of the model.
    """

    features: Any
    processor: StateProcessor

    def __getitem__(self, rows: "slice | np.ndarray") -> np.ndarray:
        return self.processor.as_predicted(self.features[rows])


@dataclass
class MeanChanges:
    """
    The mean change of each perturbation, learned from training cells. The baselines add it to control cells.

    Args:
        changes (`dict[str, np.ndarray]`): perturbation to the unweighted mean over contexts of (mean perturbed - mean
            control), `(features,)`.
        clip (`bool`): clip the baselines at 0, for expression.
    """

    changes: dict[str, np.ndarray] = field(default_factory=dict)
    clip: bool = True

    @classmethod
    def fit(cls, features, groups: pd.DataFrame, control: str, clip: bool = True) -> "MeanChanges":
        """
        Args:
            features (of shape `(cells, features)`): training cells and controls; `features[start:stop]` gives an array.
            groups (`pandas.DataFrame`): columns `dataset`, `context`, `perturbation`, and the rows of the cells, `start`
                and `stop`. No other rows are read.
            control (`str`): the perturbation of control cells.
        """
        return cls(GroupSums.of_cells(features, groups, control).changes(), clip)

    def perturbation_mean(self, perturbation: str, controls: np.ndarray) -> np.ndarray | None:
        """Control cells plus the perturbation's mean change; None for a perturbation without training cells."""
        return self._add(controls, self.changes[perturbation]) if perturbation in self.changes else None

    def additive(self, parts: list[str], controls: np.ndarray) -> np.ndarray | None:
        """Control cells plus the mean changes of the parts of a combination; None if it is none, or a part is unknown."""
        if len(parts) < 2 or not all(part in self.changes for part in parts):
            return None
        return self._add(controls, sum(self.changes[part] for part in parts))

    def _add(self, controls: np.ndarray, change) -> np.ndarray:
        moved = controls + change
        return np.maximum(moved, 0) if self.clip else moved


def score(
    predicted: np.ndarray,
    real: np.ndarray,
    controls_mean: np.ndarray,
    within_real: float,
    within_predicted: float | None = None,
) -> dict[str, float]:
    """[`METRICS`] of predicted against real cells, `(cells, features)` each."""
    predicted_mean, real_mean = predicted.mean(axis=0, dtype=np.float64), real.mean(axis=0, dtype=np.float64)
    return {
        "pearson": pearson_of_change(predicted_mean, real_mean, controls_mean),
        "mae": float(np.abs(predicted_mean - real_mean).mean()),
        "energy": energy_between(predicted, real, within_real, within_predicted),
    }


def score_group(
    predicted: np.ndarray | None,
    real: np.ndarray,
    controls: "np.ndarray | Controls",
    perturbation: str,
    parts,
    changes: MeanChanges,
) -> dict[str, dict[str, float]]:
    """
    Scores of the model and of every baseline for one (context, perturbation), on the same real and control cells. A baseline
    that has learned nothing of the perturbation has no score.

    Args:
        predicted (`np.ndarray` of shape `(cells, features)`, *optional*): predicted cells; without them only the baselines
            are scored.
        real (`np.ndarray` of shape `(cells, features)`): real perturbed cells.
        controls ([`Controls`] or `np.ndarray` of shape `(cells, features)`): real control cells.
        perturbation (`str`), parts (`list[str]`): its name, and the perturbations that it combines.
        changes ([`MeanChanges`]): of the training cells.

    Raises:
        FloatingPointError: a figure is infinite, or NaN where it is no undefined correlation; the error names it.
    """
    known = controls if isinstance(controls, Controls) else Controls(controls)
    within = mean_distance(real, real)
    candidates = {
        MODEL: predicted,
        NO_CHANGE: known.cells,
        PERTURBATION_MEAN: changes.perturbation_mean(perturbation, known.cells),
        ADDITIVE: changes.additive(parts, known.cells),
    }
    scores = {
        method: score(cells, real, known.mean, within, known.within if method == NO_CHANGE else None)
        for method, cells in candidates.items()
        if cells is not None
    }
    for method, figures in scores.items():
        for metric, value in figures.items():
            if np.isinf(value) or (np.isnan(value) and metric != "pearson"):
                raise FloatingPointError(
                    f"{metric} of {method!r} for the perturbation {perturbation!r} is {value}: its predicted or real cells hold "
                    "values that are NaN, infinite or too large"
                )
    return scores


def average(scores: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The unweighted mean over groups of each method's figures, without undefined correlations."""
    methods = {method: None for group in scores for method in group}
    averages = {}
    for method in methods:
        rows = pd.DataFrame([group[method] for group in scores if method in group])
        averages[method] = {metric: float(rows[metric].mean()) for metric in METRICS}
    return averages
