"""The bootstrap: figures of resampled cells and groups, and the intervals that follow."""

import zlib

import numpy as np
import torch


# Resampled figures for each figure. With 200, the ends of a 95 % interval vary by about a tenth of its width.
DRAWS = 200
LEVEL = 0.95
# Below this share of the squared norms, a squared distance is measured again.
_NEAR = 1e-2


def generator_of(seed: int, *names: str) -> np.random.Generator:
    """A generator for something that has names. It does not depend on what else is drawn, or in which order."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode("utf-8", "surrogatepass")) for name in names)])


def bootstrap_weights(generator: np.random.Generator, cells: int, draws: int = DRAWS) -> np.ndarray:
    """
    How much each cell counts: `(1 + draws, cells)` float32, each row of sum 1. In row 0 all cells count alike. Each other row
    is a sample of `cells` cells with replacement.
    """
    drawn = generator.multinomial(cells, np.full(cells, 1 / cells), size=draws)
    return np.concatenate([np.ones((1, cells)), drawn]).astype(np.float32) / np.float32(cells)


def weighted_distances(
    x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray, block: int = 2048
) -> np.ndarray:
    """
    `sum_ij u_i v_j |x_i - y_j|` for each pair of rows u of `weights_x` and v of `weights_y`; Euclidean, in float32, added up
    in float64, in blocks of bounded memory. In a process that has a GPU at work they are computed there, in float64.

    Args:
        x, y (`np.ndarray` of shape `(cells, features)`): two sets of cells. If `y` is `x`, a cell's distance to itself is 0.
        weights_x, weights_y (`np.ndarray` of shape `(rows, cells)`): float32.

    Returns:
        `np.ndarray` of shape `(rows,)`: float64.
    """
    if torch.cuda.is_initialized():
        return distances_on(torch.device("cuda"), x, y, weights_x, weights_y, block)
    same = x is y
    # The matrix products behind the distances round less near the origin.
    center = y.mean(axis=0, dtype=np.float64)
    a = np.asarray(x - center, dtype=np.float32)
    b = a if same else np.asarray(y - center, dtype=np.float32)
    squares_a, squares_b = (np.einsum("ij,ij->i", v, v) for v in (a, b))
    total = np.zeros(len(weights_x))
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            distances = a[i : i + block] @ b[j : j + block].T
            distances *= -2
            distances += squares_a[i : i + block, None]
            distances += squares_b[j : j + block]
            near = distances < _NEAR * (squares_a[i : i + block, None] + squares_b[j : j + block])
            np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
            if same and i == j:
                np.fill_diagonal(distances, 0)
                np.fill_diagonal(near, False)
            if near.any():
                _measure_again(distances, near, a[i : i + block], b[j : j + block])
            rows = weights_x[:, i : i + block] @ distances
            total += np.einsum("ri,ri->r", rows, weights_y[:, j : j + block], dtype=np.float64)
    return total


def distances_on(
    device: torch.device, x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray, block: int = 2048
) -> np.ndarray:
    """[`weighted_distances`] on a device that has float64."""
    a, of_a = (torch.from_numpy(np.ascontiguousarray(v)).to(device).double() for v in (x, weights_x))
    b, of_b = (torch.from_numpy(np.ascontiguousarray(v)).to(device).double() for v in (y, weights_y))
    center = b.mean(dim=0)
    a, b = a - center, b - center
    total = of_a.new_zeros(len(of_a))
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            one, other = a[i : i + block], b[j : j + block]
            squared = torch.addmm(other.square().sum(dim=1).expand(len(one), -1), one, other.T, alpha=-2)
            distances = squared.add_(one.square().sum(dim=1, keepdim=True)).clamp_(min=0).sqrt_()
            if x is y and i == j:
                distances.fill_diagonal_(0)
            total += ((of_a[:, i : i + block] @ distances) * of_b[:, j : j + block]).sum(dim=1)
    return total.cpu().numpy()


def _measure_again(distances: np.ndarray, near: np.ndarray, a: np.ndarray, b: np.ndarray):
    """Compute the distances of near cells from their differences, because the matrix product has lost their digits."""
    rows, columns = np.nonzero(near)
    step = max(1, (1 << 22) // a.shape[1])
    for start in range(0, len(rows), step):
        i, j = rows[start : start + step], columns[start : start + step]
        distances[i, j] = np.sqrt(np.square(a[i] - b[j]).sum(axis=1))


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of the rows of two arrays `(rows, features)`. NaN if a row is the same for all features."""
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (x * y).sum(axis=1) / scale, np.nan)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """
    The 95 % interval of a figure. The mean of the resampled figures is moved onto the figure first: resampling repeats cells,
    which lowers distances within a set.

    Args:
        draws (`np.ndarray` of shape `(1 + draws,)`): the figure, then those of the resampled cells.

    Returns:
        `(float, float)`: lower and upper end; both NaN if fewer than half of the resampled figures are defined.
    """
    figure, resampled = draws[0], draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(figure) or 2 * len(resampled) < len(draws) - 1:
        return float("nan"), float("nan")
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(resampled, tails) + (figure - resampled.mean())
    return float(low), float(high)


def intervals(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    [`interval`] of many figures at once, all of them defined.

    Args:
        draws (`np.ndarray` of shape `(1 + draws, figures)`): the figures, then those of the resampled cells.

    Returns:
        `(np.ndarray, np.ndarray)` of shape `(figures,)`: lower and upper ends.
    """
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(draws[1:], tails, axis=0) + (draws[0] - draws[1:].mean(axis=0))
    return low, high


def resampled_average(figures: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """
    The average over all groups, then the averages over resampled groups.

    Args:
        figures (`np.ndarray` of shape `(groups, 1 + draws)`): the figures of each group; NaN if a figure is not defined.
        chosen (`np.ndarray` of shape `(draws, groups)`): the groups of each resampling.

    Returns:
        `np.ndarray` of shape `(1 + draws,)`.
    """
    whole = _mean(figures[:, 0])
    drawn = [_mean(figures[groups, 1 + i]) for i, groups in enumerate(chosen)]
    return np.array([whole, *drawn])


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
