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
    x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray, block: int = 256
) -> np.ndarray:
    """
    `sum_ij u_i v_j |x_i - y_j|` for each pair of rows u of `weights_x` and v of `weights_y`; Euclidean, in float32, added up
    in float64, in blocks of bounded memory. Distances within a set are found once for both orders. In a process that has a GPU at
    work they are computed there, in float64.

    Args:
        x, y (`np.ndarray` of shape `(.., cells, features)`): two sets of cells, or several of them side by side. If `y` is `x`, a cell's
            distance to itself is 0.
        weights_x, weights_y (`np.ndarray` of shape `(rows, cells)`): float32.

    Returns:
        `np.ndarray` of shape `(.., rows)`: float64.
    """
    if torch.cuda.is_initialized():
        return distances_on(torch.device("cuda"), x, y, weights_x, weights_y, block)
    same, alike = x is y, x is y and weights_x is weights_y
    # The matrix products behind the distances round less near the origin.
    center = y.mean(axis=-2, dtype=np.float64, keepdims=True).astype(np.float32)
    a = np.subtract(x, center, dtype=np.float32)
    b = a if same else np.subtract(y, center, dtype=np.float32)
    if b.ndim < a.ndim:
        b = np.broadcast_to(b, (*a.shape[:-2], *b.shape))
    squares_a = np.einsum("...ij,...ij->...i", a, a)
    squares_b = squares_a if same else np.einsum("...ij,...ij->...i", b, b)
    total = np.zeros((*a.shape[:-2], len(weights_x)))
    for i in range(0, a.shape[-2], block):
        for j in range(i if same else 0, b.shape[-2], block):
            distances = a[..., i : i + block, :] @ b[..., j : j + block, :].swapaxes(-1, -2)
            squares = squares_a[..., i : i + block, None] + squares_b[..., None, j : j + block]
            distances *= -2
            distances += squares
            squares *= np.float32(_NEAR)
            near = distances < squares
            np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
            if same and i == j:
                own = np.arange(distances.shape[-1])
                distances[..., own, own] = 0
                near[..., own, own] = False
            if near.any():
                _measure_again(distances, near, a[..., i : i + block, :], b[..., j : j + block, :])
            found = _weighted(weights_x[:, i : i + block], distances, weights_y[:, j : j + block])
            if same and j > i:
                # Block (j, i) has the same distances.
                turned = distances.swapaxes(-1, -2)
                found += found if alike else _weighted(weights_x[:, j : j + block], turned, weights_y[:, i : i + block])
            total += found
    return total


def _weighted(weights_x: np.ndarray, distances: np.ndarray, weights_y: np.ndarray) -> np.ndarray:
    """The sum of distances for each pair of rows of weights, added up in float64, `(.., rows)`."""
    rows = (weights_x @ distances).astype(np.float64)
    return np.einsum("...ri,ri->...r", rows, weights_y.astype(np.float64))


def distances_on(
    device: torch.device, x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray, block: int = 2048
) -> np.ndarray:
    """[`weighted_distances`] on a device that has float64."""
    if x.ndim > 2:
        ys = [x_of if y is x else y if y.ndim == 2 else y[i] for i, x_of in enumerate(x)]
        return np.stack([distances_on(device, *pair, weights_x, weights_y, block) for pair in zip(x, ys)])
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
    *sets, rows, columns = np.nonzero(near)
    step = max(1, (1 << 22) // a.shape[-1])
    for start in range(0, len(rows), step):
        of, i, j = (tuple(s[start : start + step] for s in sets), *(at[start : start + step] for at in (rows, columns)))
        distances[(*of, i, j)] = np.sqrt(np.square(a[(*of, i)] - b[(*of, j)]).sum(axis=-1))


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of the rows of two arrays `(.., rows, features)`. NaN if a row is the same for all features."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    squares_x, squares_y, products = (np.einsum("...i,...i->...", a, b) for a, b in ((x, x), (y, y), (x, y)))
    scale = np.sqrt(squares_x * squares_y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, products / scale, np.nan)


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
    drawn = np.take_along_axis(figures[:, 1:].T, chosen, axis=1)
    return np.concatenate([_means(figures[None, :, 0]), _means(drawn)])


def _means(values: np.ndarray) -> np.ndarray:
    """The mean of the finite values of each row, `(rows,)`; NaN where there are none."""
    finite = np.isfinite(values)
    counts = finite.sum(axis=1)
    sums = np.where(finite, values, 0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
