"""Reading the values of cells: rows in memory, what kind of values they are, and errors that name cell and gene."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


# log1p of 10,000 counts per cell stays below 9.3, and below 16 for any target sum in use.
_LARGEST_LOG1P = 20.0


def some(names, count: int = 10) -> str:
    """The first few of some names, and how many there are."""
    names = [str(name) for name in names]
    return f"{names[:count]}" + (f" and {len(names) - count} more" if len(names) > count else "")


def take_rows(matrix, rows):
    """Some rows of an in-memory or backed, dense or sparse matrix, in memory: CSR or ndarray."""
    taken = matrix.iloc[rows].to_numpy() if isinstance(matrix, pd.DataFrame) else matrix[rows]
    if not sp.issparse(taken):
        return np.asarray(taken)
    taken = sp.csr_matrix(taken)
    if not taken.has_canonical_format:
        # An entry that stands in parts would be checked, and log1p-transformed, part by part.
        taken = taken.copy()
        taken.sum_duplicates()
    return taken


def check_finite(matrix, adata: ad.AnnData, rows, source: str, nonnegative: bool = False):
    """ValueError that names cell and gene of the first NaN, infinite or (optionally) negative value."""
    data = matrix.data if sp.issparse(matrix) else matrix
    if data.size == 0:
        return
    if np.isfinite(data.min()) and np.isfinite(data.max()) and not (nonnegative and data.min() < 0):
        return
    bad = ~np.isfinite(data) | (data < 0 if nonnegative else False)
    if sp.issparse(matrix):
        first = np.flatnonzero(bad)[0]
        row, column = np.searchsorted(matrix.indptr, first, side="right") - 1, matrix.indices[first]
        value = data[first]
    else:
        row, column = np.argwhere(bad)[0]
        value = matrix[row, column]
    cell = adata.obs_names[np.arange(adata.n_obs)[rows][row]]
    feature = f"dimension {column}" if source.startswith("obsm/") else f"gene {adata.var_names[column]!r}"
    raise ValueError(
        f"{source} holds {value} in cell {cell!r}, {feature} ({int(bad.sum())} such values read); expected finite"
        + (" and non-negative expression (scaled or centred values are not expression)" if nonnegative else " values")
    )


def kind_of_values(matrix) -> str:
    """`"counts"` (whole numbers), `"log1p"`, `"linear"` (larger than any log1p value) or `"zeros"`."""
    data = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    if data.size == 0 or not data.any():
        return "zeros"
    if np.issubdtype(data.dtype, np.integer) or np.array_equal(data, np.rint(data)):
        return "counts"
    return "linear" if data.max() > _LARGEST_LOG1P else "log1p"


def wrong_kind(source: str, expected: str, kind: str, target_sum: float) -> str:
    found = {
        "counts": "whole numbers (counts)",
        "log1p": "fractional values (log1p already?)",
        "linear": "fractional values too large for log1p (normalised, not yet log1p?)",
    }[kind]
    if expected == "counts":
        return (
            f"{source}: expected counts, found {found}; this processor normalises by itself, so give it the raw counts "
            "(input='layers/counts' where they lie in a layer)"
        )
    if kind == "counts":
        fix = f"sc.pp.normalize_total(adata, target_sum={target_sum:g}); sc.pp.log1p(adata)"
    else:
        fix = "sc.pp.log1p(adata)"
    return f"{source}: expected log1p expression, found {found}; run {fix}, or read another layer with input="


def normalize_counts(
    counts: np.ndarray, totals: np.ndarray, target_sum: float, stored: np.ndarray | None = None
) -> np.ndarray:
    """
    Counts scaled to `target_sum` a cell, then log1p. A cell without counts stays 0.

    Args:
        counts (`np.ndarray`): of shape `(cells, genes)`; or, with `stored`, the stored values of sparse rows, one
            cell's after another (the `data` of a CSR matrix). Any numeric type; left as it is.
        totals (`np.ndarray` of shape `(cells,)`): counts of each cell over all genes of the data, not only over those
            given.
        target_sum (`float`): counts a cell is scaled to.
        stored (`np.ndarray` of shape `(cells,)`, *optional*): how many of the values are each cell's
            (`np.diff(indptr)`).

    Returns:
        `np.ndarray` of the shape of `counts`, float32: log1p expression.
    """
    totals = np.asarray(totals, dtype=np.float64)
    scale = (target_sum / np.where(totals == 0, 1, totals)).astype(np.float32)
    values = counts.astype(np.float32)
    values *= scale[:, None] if stored is None else np.repeat(scale, stored)
    return np.log1p(values, out=values)


def resolve_normalisation(asked: str, found: set[str], source: str) -> tuple[str, str]:
    """(normalize, values) from what was asked for and the kinds of values that the files hold."""
    kinds = found - {"zeros"}
    if len(kinds) > 1:
        raise ValueError(f"{source} holds {' in one file and '.join(sorted(kinds))} in another; make them alike")
    kind = kinds.pop() if kinds else "log1p"
    if kind == "linear":
        raise ValueError(wrong_kind(source, "log1p", kind, 1e4))
    if asked == "log1p_cp10k" and kind != "counts":
        raise ValueError(wrong_kind(source, "counts", kind, 1e4))
    if asked == "none":
        return "none", kind
    return ("log1p_cp10k", "log1p") if kind == "counts" else ("none", "log1p")
