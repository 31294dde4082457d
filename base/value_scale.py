"""What the values of expression are: counts, log1p and of which total, or something else. Judged by evidence, in one place."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from .constants import Values
from .messages import some


# log1p of 10,000 counts per cell stays below 9.3, and below 16 for any total in use.
LARGEST_LOG1P = 20.0
# Sums of all cells count as one number when 9 in 10 of them lie within this part of their median.
_SAME = 0.01
# expm1 of log1p values sums to much the same in all cells, also over 50 genes; of counts, the exponent makes it spread. Over
# fewer genes that says nothing.
_SPREAD, _FEWEST = 30.0, 50
# Below these medians a cell says so little that a score is mostly noise.
_FEW_COUNTS, _FEW_GENES = 100, 10


@dataclass(frozen=True)
class Scale:
    """
    What values are.

    Args:
        values (`str`): their kind, see [`Values`].
        total (`float`, *optional*): what a cell sums to, where all cells sum to the same: log1p values after `expm1`, values
            that are normalised without a logarithm as they are.
        base (`float`, *optional*): of the logarithm; None is the natural one.
        median_counts, median_genes (`float`, *optional*): of a cell: its counts, if they are counts, and its expressed genes.
    """

    values: str
    total: float | None = None
    base: float | None = None
    median_counts: float | None = None
    median_genes: float | None = None

    def for_checkpoint(self) -> dict | None:
        """What a checkpoint remembers, for JSON: of log1p values their total, where it is certain, and that counts are not whole."""
        if self.values == Values.LOG1P and self.total is not None:
            return {"values": self.values, "total": float(f"{self.total:.4g}")}
        return {"values": self.values} if self.values in (Values.FRACTIONAL, Values.LINEAR) else None

    def describe(self) -> str:
        """In words."""
        of = "" if self.total is None else f" of {self.total:,.0f} counts per cell"
        if self.values == Values.COUNTS:
            return f"counts, {self.median_counts or 0:,.0f} per cell (median)"
        if self.values == Values.FRACTIONAL:
            return f"fractional counts (corrected or imputed?), {self.median_counts or 0:,.0f} per cell (median)"
        if self.values == Values.LINEAR:
            return f"normalised{of.replace(' of', ' to')}, not log1p"
        if self.values == Values.LOG1P:
            return f"log1p{of}" + ("" if self.base is None else f", to the base {self.base:g}")
        return {Values.ZEROS: "only zeros", Values.EMBEDDING: "an embedding"}[self.values]

    def too_shallow(self) -> str | None:
        """A sentence where cells are so shallow that scores will be mostly noise."""
        if self.median_genes is None:
            return None
        if self.median_genes >= _FEW_GENES and (self.median_counts is None or self.median_counts >= _FEW_COUNTS):
            return None
        counts = "" if self.median_counts is None else f"{self.median_counts:,.0f} counts and "
        return f"cells are shallow: {counts}{self.median_genes:,.0f} genes a cell (median); scores will be noisy"


def look_at(matrix, log_base: float | None = None) -> Scale:
    """
    What the values of some cells are.

    Whole numbers are counts. Rows that sum to the same are normalised. Values are log1p if `expm1` of them is a multiple of
    the cell's smallest (they were whole counts once), or sums to the same in all cells, or at least does not spread over
    orders of magnitude, as it does for counts that are not whole.

    Args:
        matrix (CSR or `np.ndarray` of shape `(cells, genes)`): finite values that are not negative, over all genes of the data.
        log_base (`float`, *optional*): base of the logarithm, where the data say it.
    """
    matrix = sp.csr_matrix(matrix)
    data = matrix.data
    if data.size == 0 or not data.any():
        return Scale(Values.ZEROS)
    genes = float(np.median(np.diff(matrix.indptr)))
    sums = _sums(matrix, data)
    sums = sums[sums > 0]
    if np.issubdtype(data.dtype, np.integer) or np.array_equal(data, np.rint(data)):
        return Scale(Values.COUNTS, None, None, float(np.median(sums)), genes)
    total = _one_number(sums)
    if total is not None and len(sums) > 1:
        return Scale(Values.LINEAR, total, median_genes=genes)
    if data.max() > LARGEST_LOG1P:
        return Scale(Values.FRACTIONAL, None, None, float(np.median(sums)), genes)
    bases = (log_base,) if log_base is not None else (None, 2.0, 10.0)
    linear = {base: inverse_log1p(data.astype(np.float64), base) for base in bases}
    for base, values in linear.items():
        of_cells = _sums(matrix, values)
        total = _one_number(of_cells[of_cells > 0])
        if total is not None:
            return Scale(Values.LOG1P, total, base, median_genes=genes)
    for base, values in linear.items():
        if _are_multiples(matrix, values):
            return Scale(Values.LOG1P, None, base, median_genes=genes)
    of_cells = _sums(matrix, linear[bases[0]])
    low, high = np.percentile(of_cells[of_cells > 0], [5, 95])
    if high > _SPREAD * low and matrix.shape[1] >= _FEWEST:
        return Scale(Values.FRACTIONAL, None, None, float(np.median(sums)), genes)
    return Scale(Values.LOG1P, None, log_base, median_genes=genes)


def inverse_log1p(values: np.ndarray, base: float | None = None) -> np.ndarray:
    """What log(1 + x) to a base was taken of."""
    return np.expm1(values if base is None else values * np.log(base))


def _sums(matrix: sp.csr_matrix, data: np.ndarray) -> np.ndarray:
    """Sums of the rows of a matrix with other values, float64."""
    return np.asarray(
        sp.csr_matrix((data, matrix.indices, matrix.indptr), matrix.shape).sum(axis=1, dtype=np.float64)
    ).ravel()


def _one_number(sums: np.ndarray) -> float | None:
    """The number that nearly all of some sums are, or None. One sum says nothing."""
    if len(sums) < 2:
        return None
    low, middle, high = np.percentile(sums, [5, 50, 95])
    return float(middle) if high - low <= 2 * _SAME * middle else None


def _are_multiples(matrix: sp.csr_matrix, values: np.ndarray) -> bool:
    """Whether the values of most cells are whole multiples of the cell's smallest value, and not all the same."""
    judged = right = 0
    for start, stop in zip(matrix.indptr[:200], matrix.indptr[1:201]):
        row = values[start:stop]
        row = row[row > 0]
        ratios = row / row.min() if len(row) else row
        if len(ratios) < 3 or ratios.max() < 1.5:
            continue
        judged += 1
        small = ratios[ratios < 20]  # larger ones are near whole numbers by chance
        right += bool((np.abs(small - np.rint(small)) < 0.01 * small).all())
    return judged > 0 and right > judged / 2


def differ(trained: Scale, found: Scale) -> bool:
    """Whether log1p values are certainly of another total or base than those that a model was trained on."""
    if not trained.values == found.values == Values.LOG1P:
        return False
    if trained.base != found.base:
        return True
    return trained.total is not None and found.total is not None and abs(found.total / trained.total - 1) > 5 * _SAME


def other_scale(trained: Scale, found: Scale, source: str) -> str:
    """What an error says of values on another scale than those of training."""
    return (
        f"{source} holds {found.describe()}, the model was trained on {trained.describe()}; scale the data alike, or convert them "
        "with convert_scale=true (--convert-scale)"
    )


def converted(matrix, found: Scale, wanted: Scale):
    """
    log1p values `(cells, genes)` on another scale: log(1 + x t/s), where x is what the logarithm was taken of, s what a cell
    sums to and t what it should sum to. Natural logarithm, float32; CSR or dense as given.
    """
    factor = 1.0
    if found.total is not None and wanted.total is not None and abs(found.total / wanted.total - 1) > 5 * _SAME:
        factor = wanted.total / found.total
    if found.base is None and factor == 1.0:
        return matrix
    data = matrix.data if sp.issparse(matrix) else matrix
    values = np.log1p(inverse_log1p(data.astype(np.float64), found.base) * factor).astype(np.float32)
    if not sp.issparse(matrix):
        return values
    return type(matrix)((values, matrix.indices, matrix.indptr), shape=matrix.shape)


def other_matrices(adata, source: str) -> str:
    """Which other matrices of the data may hold the right values, for errors."""
    others = [f"layers/{name}" for name in adata.layers if f"layers/{name}" != source]
    others += [] if source == "X" or adata.X is None else ["X"]
    raw = ["raw/X"] if getattr(adata, "raw", None) is not None else []
    return f"; other matrices are {some(raw + others)}: name one with input=" if raw or others else ""


__all__ = ["Scale", "converted", "look_at"]
