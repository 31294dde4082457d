"""How well predicted cells match observed ones: the same figures in training, benchmarks and the command line."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pertstate.processing import StateProcessor


# One row of figures: correlation of the mean change, error of the mean, distance of the distributions.
METRICS = ("pearson", "mae", "energy")
# Further figures. Those that cost little are always found; the others are found if they are asked for.
CHEAP, COSTLY = ("mse", "variance_ratio", "zeros"), ("mmd", "sinkhorn", "discrimination")
FURTHER = (*CHEAP, *COSTLY)
# Of the figures that are not here, `variance_ratio` and `zeros`, the best value is that of the real cells.
HIGHER_IS_BETTER = {
    "pearson": True,
    "mae": False,
    "energy": False,
    "mse": False,
    "mmd": False,
    "sinkhorn": False,
    "discrimination": True,
}
# What the names of the metrics of the package cell-eval begin with.
CELL_EVAL = "cell_eval_"
# What each is, for readers.
ABOUT = {
    "pearson": "correlation over genes of the predicted with the observed mean change from the control cells; 1 is best",
    "mae": "mean absolute error of the mean cell; 0 is best",
    "energy": "energy distance of the predicted from the real cells; 0 is best",
    "mse": "mean squared error of the mean cell; 0 is best",
    "variance_ratio": "variance of the predicted cells, summed over genes, divided by that of the real cells; 1 is best",
    "zeros": "share of predicted values that are 0; best is that of the real cells, in the row of the ceiling",
    "mmd": "squared maximum mean discrepancy of the predicted from the real cells, with a Gaussian kernel; 0 is best",
    "sinkhorn": "Sinkhorn divergence of the predicted from the real cells; 0 is best",
    "discrimination": "share of the context's perturbations whose observed change is not nearer to the predicted one than the "
    "perturbation's own; 1 is best, about 0.5 is chance",
}
# What each is called in sentences.
NAMES = {"pearson": "correlation of the mean change", "mae": "MAE of the mean", "energy": "energy distance"}
# The rows of a table that are not baselines: the model, and what a perfect model would reach.
MODEL, CEILING = "model", "ceiling"
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
    # The matrix products behind the distances round less near the origin.
    center = x.mean(axis=0, dtype=np.float64)
    a, b = (torch.from_numpy(np.asarray(v, dtype=np.float64) - center) for v in (x, y))
    total = torch.zeros((), dtype=torch.float64)
    same = x is y
    for i in range(0, len(a), block):
        for j in range(i if same else 0, len(b), block):
            twice = 2 if same and j > i else 1  # block (j, i) has the distances of block (i, j)
            total += twice * torch.cdist(a[i : i + block], b[j : j + block]).sum()
    return float(total / (len(a) * len(b)))


def energy_between(x: np.ndarray, y: np.ndarray, within_y: float | None = None, within_x: float | None = None) -> float:
    """
    Energy distance (Székely & Rizzo 2013) of two sets of cells, `mean|x-y| - mean|x-x'|/2 - mean|y-y'|/2`, diagonals
    included, in the units of the cells. It is for reports: float64, any number of cells, no gradient. Training minimises
    [`pertstate.losses.energy_distance`], the same quantity for pairs of weighted sets in their own precision.

    Args:
        x, y (`np.ndarray` of shape `(cells, features)`): the two sets.
        within_y, within_x (`float`, *optional*): `mean|y-y'|` and `mean|x-x'|`, if they are known already.
    """
    within_y = mean_distance(y, y) if within_y is None else within_y
    within_x = mean_distance(x, x) if within_x is None else within_x
    return mean_distance(x, y) - within_x / 2 - within_y / 2


@dataclass
class AsPredicted:
    """
    Real cells in the units of a model's predictions, read when they are asked for.

    Args:
        features (of shape `(cells, features)`): the model's features; `features[rows]` gives an array.
        processor ([`StateProcessor`]): the processor of the model.
    """

    features: Any
    processor: StateProcessor

    def __getitem__(self, rows: "slice | np.ndarray") -> np.ndarray:
        return self.processor.as_predicted(self.features[rows])
