"""Further figures of merit: squared error, variance, zeros, two more distances of distributions, and discrimination."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial.distance import cdist

from pertstate.base.messages import closest
from pertstate.evaluation.bootstrap import weighted_distances
from pertstate.losses import sinkhorn


# Control cells of a context whose median distance is the bandwidth of the kernel.
_BANDWIDTH_CELLS = 1000
# Entropic blur of the Sinkhorn divergence: that of training, by default.
BLUR = 0.05


def check_metrics(names: Sequence[str], known: Sequence[str]):
    """
    Check the names of figures that are asked for.

    Raises:
        ValueError: a name is unknown.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"no figure is called {name!r}, expected some of {list(known)}; {closest(name, known)}")


def bandwidth_of(cells: np.ndarray) -> float:
    """
    The bandwidth of the kernel of the MMD: the median distance between control cells of the context, or of its first 1,000
    cells. This is the median heuristic of Gretton et al. 2012 (A kernel two-sample test, JMLR 13), with control cells in place of both samples, so
    that the kernel is the same for all predictions and perturbations of a context. NaN if there are no two different cells.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    cells = cells[:_BANDWIDTH_CELLS]
    if len(cells) < 2:
        return float("nan")
    median = float(np.median(euclidean_distances(cells)[np.triu_indices(len(cells), 1)]))
    return median if median > 0 else float("nan")


def weighted_kernel(
    x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray, bandwidth: float, block: int = 2048
) -> np.ndarray:
    """
    `sum_ij u_i v_j exp(-|x_i - y_j|^2 / (2 bandwidth^2))` for each pair of rows u of `weights_x` and v of `weights_y`, in blocks of
    bounded memory.

    Args:
        x, y (`np.ndarray` of shape `(cells, features)`): two sets of cells.
        weights_x, weights_y (`np.ndarray` of shape `(rows, cells)`): float32.
        bandwidth (`float`): in the units of the cells; NaN if it is not defined.

    Returns:
        `np.ndarray` of shape `(rows,)`: float64; NaN without a bandwidth.
    """
    if np.isnan(bandwidth):
        return np.full(len(weights_x), np.nan)
    from sklearn.metrics.pairwise import rbf_kernel

    total = np.zeros(len(weights_x))
    for i in range(0, len(x), block):
        for j in range(0, len(y), block):
            kernel = rbf_kernel(x[i : i + block], y[j : j + block], gamma=1 / (2 * bandwidth**2))
            rows = weights_x[:, i : i + block] @ kernel.astype(np.float32, copy=False)
            total += np.einsum("ri,ri->r", rows, weights_y[:, j : j + block], dtype=np.float64)
    return total


def sinkhorn_divergence(x: np.ndarray, y: np.ndarray, blur: float = BLUR) -> float:
    """
    The debiased Sinkhorn divergence of two sets of cells with squared Euclidean cost (Feydy et al. 2019), in squared
    units of the cells. A training with the Sinkhorn loss minimises the same quantity.
    """
    first, second = (torch.from_numpy(np.ascontiguousarray(of, dtype=np.float32)).unsqueeze(0) for of in (x, y))
    with torch.no_grad():
        return float(sinkhorn.sinkhorn_divergence(first, second, blur=blur))


def total_variance(cells: np.ndarray, weights: np.ndarray, means: np.ndarray) -> np.ndarray:
    """
    The sum over features of the variance of weighted cells, for each row of weights, `(.., rows)`.

    Args:
        cells (`np.ndarray` of shape `(.., cells, features)`), weights (`np.ndarray` of shape `(rows, cells)`), means (`np.ndarray` of
            shape `(.., rows, features)`): the cells, how much each counts, and their means.
    """
    away = cells - means[..., :1, :].astype(np.float32)
    squares = np.square(away, out=away).sum(axis=-1, dtype=np.float64)
    moved = means - means[..., :1, :].astype(np.float32)
    return squares @ weights.T.astype(np.float64) - np.einsum("...i,...i->...", moved, moved)


@dataclass
class WeightedCells:
    """
    Cells with how much each counts in each resampling, and what follows from them alone; or several sets of cells side by side.

    Args:
        cells (`np.ndarray` of shape `(.., cells, features)`), weights (`np.ndarray` of shape `(1 + draws, cells)`): float32.
    """

    cells: np.ndarray
    weights: np.ndarray

    @classmethod
    def beside(cls, several: "list[WeightedCells]") -> "WeightedCells":
        """Several sets of cells of shape `(sets, cells, features)` and equal weights as one, with what was found of them."""
        joined = cls(np.concatenate([of.cells for of in several]), several[0].weights)
        for name in ("means", "within", "variance", "zeros"):
            joined.__dict__[name] = np.concatenate([getattr(of, name) for of in several])
        return joined

    @cached_property
    def means(self) -> np.ndarray:
        """The means of the cells, `(.., 1 + draws, features)` float64. The first row, the plain mean, is summed in float64."""
        means = (self.weights @ self.cells).astype(np.float64)
        means[..., 0, :] = self.cells.mean(axis=-2, dtype=np.float64)
        return means

    @cached_property
    def within(self) -> np.ndarray:
        """The mean distance of all pairs, `(.., 1 + draws)`."""
        return weighted_distances(self.cells, self.cells, self.weights, self.weights)

    @cached_property
    def variance(self) -> np.ndarray:
        """See [`total_variance`], `(.., 1 + draws)`."""
        return total_variance(self.cells, self.weights, self.means)

    @cached_property
    def zeros(self) -> np.ndarray:
        """The share of values that are 0, `(.., 1 + draws)`."""
        shares = 1 - np.count_nonzero(self.cells, axis=-1) / self.cells.shape[-1]
        return shares @ self.weights.T.astype(np.float64)


class FurtherFigures:
    """
    The figures [`FURTHER`] of predictions for one group, except the discrimination score, which takes all groups:

    - mse: the mean squared error of the mean cell.
    - variance_ratio: the sum over features of the variance of the predicted cells, divided by that of the real cells.
    - zeros: the share of predicted values that are 0.
    - mmd: the squared maximum mean discrepancy with a Gaussian kernel, see [`bandwidth_of`], diagonals included.
    - sinkhorn: see [`sinkhorn_divergence`]. It is not found for resampled cells.

    Args:
        real ([`WeightedCells`]): the real cells of the group.
        bandwidth (`Callable`): gives the bandwidth of the kernel.
        expression (`bool`): the values are expression or counts, which may be 0.
        metrics (`tuple[str, ...]`): those of the figures [`COSTLY`] that are asked for.
    """

    def __init__(
        self,
        real: WeightedCells,
        bandwidth: Callable[[], float],
        expression: bool,
        metrics: tuple[str, ...],
    ):
        self.real, self.bandwidth, self.expression, self.metrics = real, bandwidth, expression, metrics

    @cached_property
    def _within(self) -> np.ndarray:
        real = self.real
        return weighted_kernel(real.cells, real.cells, real.weights, real.weights, self.bandwidth())

    def of(self, predicted: WeightedCells, errors: np.ndarray) -> list[dict[str, np.ndarray]]:
        """
        The figures of several sets of predicted cells, each `(1 + draws,)` or `(1,)`.

        Args:
            predicted ([`WeightedCells`]): the predicted cells, of shape `(sets, cells, features)`.
            errors (`np.ndarray` of shape `(sets, 1 + draws, features)`): their means minus those of the real cells.
        """
        real, weights = self.real, predicted.weights
        several = {"mse": np.einsum("...i,...i->...", errors, errors) / errors.shape[-1]}
        with np.errstate(invalid="ignore", divide="ignore"):
            several["variance_ratio"] = np.where(real.variance > 0, predicted.variance / real.variance, np.nan)
        if self.expression:
            several["zeros"] = predicted.zeros
        figures = [{name: values[i] for name, values in several.items()} for i in range(len(errors))]
        for found, cells in zip(figures, predicted.cells):
            if "mmd" in self.metrics:
                width = self.bandwidth()
                own = weighted_kernel(cells, cells, weights, weights, width)
                found["mmd"] = own + self._within - 2 * weighted_kernel(cells, real.cells, weights, real.weights, width)
            if "sinkhorn" in self.metrics:
                found["sinkhorn"] = np.array([sinkhorn_divergence(cells, real.cells)])
        return figures

    def ceiling(self, first: np.ndarray, second: np.ndarray, cells: int) -> dict[str, np.ndarray]:
        """
        What a perfect model would reach, see [`score_group`].

        Args:
            first, second (`np.ndarray` of shape `(splits, cells)`): how much each real cell counts in both halves of each split.
            cells (`int`): how many cells the perfect model predicts.
        """
        real = self.real.cells
        means = [(part @ real).astype(np.float64) for part in (first, second)]
        found = {"mse": np.square(means[0] - means[1]).mean() / 4, "variance_ratio": 1.0}
        if self.expression:
            found["zeros"] = (real == 0).mean()
        if "mmd" in self.metrics:
            between, a, b = (
                weighted_kernel(real, real, u, v, self.bandwidth()).mean()
                for u, v in ((first, second), (first, first), (second, second))
            )
            found["mmd"] = (a + b - 2 * between) * (1 + len(real) / cells) / 4
        # The ceiling is an estimate itself, so it gets no interval.
        undefined = np.full(len(self.real.weights) - 1, np.nan)
        return {name: np.r_[figure, undefined] for name, figure in found.items()}


def discrimination(
    predicted: np.ndarray, observed: np.ndarray, perturbations: list[str], features: list[str]
) -> np.ndarray:
    """
    The discrimination score of each perturbation of a context: how many of the n observed changes lie nearer to its predicted
    change than its own observed change does, as `1 - nearer / n`. 1 is best; a prediction that tells nothing of the perturbation gets
    about 0.5. Distances are sums of absolute differences. The gene that has the perturbation's name is left out. `cell-eval` calls
    it `discrimination_score_l1`. Another change that is exactly as near counts half.

    Args:
        predicted, observed (`np.ndarray` of shape `(perturbations, features)`): mean changes from the control cells.
        perturbations (`list[str]`), features (`list[str]`): their names.

    Returns:
        `np.ndarray` of shape `(perturbations,)`.
    """
    column_of = {name: i for i, name in enumerate(features)}
    predicted, observed = predicted.astype(np.float64), observed.astype(np.float64)
    found = np.empty(len(perturbations))
    for i, name in enumerate(perturbations):
        distances = cdist(predicted[i : i + 1], observed, "cityblock")[0]
        if name in column_of:
            distances -= np.abs(predicted[i, column_of[name]] - observed[:, column_of[name]])
        nearer, alike = (distances < distances[i]).sum(), (distances == distances[i]).sum() - 1
        found[i] = 1 - (nearer + alike / 2) / len(perturbations)
    return found
