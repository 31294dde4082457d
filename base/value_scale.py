"""What the values of expression are: counts, log1p and of which total, or something else. Judged by evidence, in one place."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from .constants import Values
from .messages import some
from .value_evidence import LARGEST_LOG1P, Evidence, inverse_log1p, row_sums, stored


# Totals that differ by less than five times this part are one scale.
_SAME = 0.01
# See strays.
_FEWEST_STRAYS = 3
# Below these medians a cell says so little that a score is mostly noise.
_FEW_COUNTS, _FEW_GENES = 100, 10


# What to do about cells of several scales.
ALIKE = "scale all of them alike from their counts"


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
        """
        What a checkpoint remembers, for JSON: the total of log1p values where it is certain, or that values are fractional
        counts or linear. None otherwise.
        """
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
        """A warning if cells are so shallow that scores will be mostly noise; else None."""
        if self.median_genes is None:
            return None
        if self.median_genes >= _FEW_GENES and (self.median_counts is None or self.median_counts >= _FEW_COUNTS):
            return None
        counts = "" if self.median_counts is None else f"{self.median_counts:,.0f} counts and "
        return f"cells are shallow: {counts}{self.median_genes:,.0f} genes a cell (median); scores will be noisy"


def look_at(matrix, log_base: float | None = None) -> Scale:
    """
    What the values of some cells are. [`Evidence`] has the rules and their thresholds.

    Args:
        matrix (CSR or `np.ndarray` of shape `(cells, genes)`): finite values that are not negative, over all genes of the data.
        log_base (`float`, *optional*): base of the logarithm, where the data name it. Evidence for another base overrules it.

    Raises:
        ValueError: the cells are a mixture of several scales.
    """
    seen = Evidence(log_base)
    seen.add(matrix)
    if not seen.cells:
        return Scale(Values.ZEROS)
    counts, genes = seen.median("counts"), seen.median("genes")
    if seen.all_whole:
        return Scale(Values.COUNTS, None, None, counts, genes)
    mixture = seen.mixture()
    if mixture:
        raise ValueError(_of_several_scales(mixture, seen))
    total = seen.one_sum("linear")
    if total is not None:
        return Scale(Values.LINEAR, total, median_genes=genes)
    base, total, certain = seen.logarithm()
    if certain or seen.are_log1p_of_counts(base):
        return Scale(Values.LOG1P, total, base, median_genes=genes)
    if seen.are_scaled_counts():
        return Scale(Values.LINEAR, median_genes=genes)
    if seen.largest > LARGEST_LOG1P or seen.are_fractional_counts(base):
        return Scale(Values.FRACTIONAL, None, None, counts, genes)
    return Scale(Values.LOG1P, None, base, median_genes=genes)


def _of_several_scales(mixture: list, seen: Evidence) -> str:
    """What an error says of a mixture."""
    scales = []
    for name, total, cells in mixture:
        if name in ("counts", "linear"):
            scale = "counts" if name == "counts" else Scale(Values.LINEAR, total).describe()
        else:
            scale = Scale(Values.LOG1P, total, name).describe()
        scales.append(f"{scale} ({cells} of {seen.cells} cells looked at)")
    return f"cells are on several scales: {'; '.join(scales)}; {ALIKE}"


def differ(trained: Scale, found: Scale) -> bool:
    """Whether log1p values are certainly of another total or base than those that a model was trained on."""
    if not trained.values == found.values == Values.LOG1P:
        return False
    if trained.base != found.base:
        return True
    return trained.total is not None and found.total is not None and abs(found.total / trained.total - 1) > 5 * _SAME


def strays(matrix, scale: Scale) -> Scale | None:
    """
    The scale of those of some cells `(cells, genes)` that are on another one than the data that they belong to; None where
    there are fewer than three, or where the data's total or theirs is not known.

    Raises:
        ValueError: these cells are on several scales.
    """
    if scale.values != Values.LOG1P or scale.total is None:
        return None
    logged = stored(matrix).astype(np.float32)  # single precision suffices, and takes less time
    sums = row_sums(matrix, np.expm1(logged if scale.base is None else logged * np.float32(np.log(scale.base))))
    other = np.flatnonzero((sums > 0) & (np.abs(sums / scale.total - 1) > 5 * _SAME))
    if len(other) < _FEWEST_STRAYS:
        return None
    found = look_at(matrix[other], scale.base)
    return found if found.values == Values.COUNTS or found.total is not None else None


def other_scale(trained: Scale, found: Scale, source: str, advice: str) -> str:
    """What an error says of values on another scale than those of training; `advice` is how to have them converted."""
    return f"{source} holds {found.describe()}, the model was trained on {trained.describe()}; scale the data alike{advice}"


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
    raw = ["raw/X"] if adata.raw is not None else []
    return f"; other matrices are {some(raw + others)}: name one with input=" if raw or others else ""


__all__ = ["Scale", "converted", "look_at"]
