"""Reading the values of cells: rows, genes, the kind of values and their normalisation. Errors name cell and gene."""

from collections.abc import Callable, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from .constants import Normalize, Values
from .finite import LARGEST, are_finite, check_totals, within_reach, wrong
from .gene_names import other_names
from .messages import closest, given, some
from .value_scale import LARGEST_LOG1P, Scale, converted, other_matrices


# Total counts that a cell is scaled to by default.
TARGET_SUM = 1e4
# Genes are chosen on all cells at once if these have at most so many values, zeros included; else block by block.
_SMALL = 1 << 26


def check_numbers(dtype: np.dtype, name: str):
    """ValueError unless values of a type are numbers. Complex ones, text and objects are not."""
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} holds values of type {dtype}, expected numbers")


def check_matrix(matrix, name: str):
    """ValueError unless it holds numbers in two dimensions."""
    if len(matrix.shape) != 2:
        raise ValueError(f"{name} has {len(matrix.shape)} dimensions, expected cells x features")
    check_numbers(matrix.dtype, name)


def native_numbers(values: np.ndarray) -> np.ndarray:
    """The values in a type that scipy can use: no half precision, no foreign byte order."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def take_rows(matrix, rows):
    """
    Some rows of an in-memory or backed, dense or sparse matrix, in memory: CSR or ndarray.

    Raises:
        ValueError: it does not hold numbers in two dimensions.
    """
    taken = matrix.iloc[rows].to_numpy() if isinstance(matrix, pd.DataFrame) else matrix[rows]
    if not sp.issparse(taken):
        taken = np.asarray(taken)
        check_matrix(taken, "the matrix")
        return native_numbers(taken)
    check_matrix(taken, "the matrix")
    taken = sp.csr_matrix(taken)
    if not taken.has_canonical_format:
        # One entry may be stored in several parts, which would be checked and log1p-transformed one by one. The sum of
        # parts may not fit a small integer type.
        taken = taken.copy() if taken.dtype.kind == "f" else taken.astype(np.int64)
        taken.sum_duplicates()
    return taken


def block_of_rows(matrix, values: int, cells: int = 1 << 14) -> list[slice]:
    """All rows of a matrix in order, cut into blocks of about `values` values and at most `cells` cells."""
    if hasattr(matrix, "blocks"):  # a matrix on disk chooses blocks that suit how it is stored
        return matrix.blocks(values)
    step = max(1, min(cells, values // max(1, matrix.shape[1])))
    return [slice(i, min(i + step, matrix.shape[0])) for i in range(0, matrix.shape[0], step)]


def matrix_of(adata: ad.AnnData, source: str):
    """
    The matrix that `"X"`, `"layers/NAME"` or `"obsm/NAME"` names.

    Raises:
        KeyError: there is none; the error lists those that exist.
        ValueError: the name is none of these, or an embedding has no dimensions.
    """
    if source == "X":
        if adata.X is None:
            raise KeyError(f"input 'X': the data have no X, found layers {some(adata.layers)}")
        return adata.X
    kind, _, name = source.partition("/")
    if kind not in ("layers", "obsm") or not name:
        raise ValueError(f"input={source!r}: expected 'X', 'raw/X', 'layers/NAME' or 'obsm/NAME'")
    holder = adata.layers if kind == "layers" else adata.obsm
    if name not in holder:
        raise KeyError(f"{kind} has no entry {name!r}, found {some(holder)}; {closest(name, ['X', *holder])}")
    matrix = holder[name]
    if kind == "obsm" and matrix.shape[1] == 0:
        raise ValueError(f"{source} has no dimensions, expected at least one")
    return matrix


def check_finite(matrix, adata: ad.AnnData, rows, source: str, nonnegative: bool = False):
    """ValueError that names cell and gene of the first value that is NaN, infinite in float32, or (optionally) negative."""
    data = matrix.data if sp.issparse(matrix) else matrix
    if data.size == 0:
        return
    if are_finite(data) and not (nonnegative and data.min() < 0):
        return
    bad = wrong(data) | (data < 0 if nonnegative else False)
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
        + (
            f" and non-negative expression (scaled or centred values are not expression){other_matrices(adata, source)}"
            if nonnegative
            else f" values, at most {LARGEST:.0e} (float32)"
        )
    )


def cell_of(adata: ad.AnnData, rows) -> Callable[[int], str]:
    """A function that says what errors call the cell at a place among `rows`."""
    return lambda place: f"cell {adata.obs_names[np.arange(adata.n_obs)[rows][place]]!r}"


def kind_of_values(matrix) -> str:
    """`"counts"` (whole numbers), `"log1p"`, `"linear"` (larger than any log1p value) or `"zeros"`."""
    data = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    if data.size == 0 or not data.any():
        return Values.ZEROS
    if np.issubdtype(data.dtype, np.integer) or np.array_equal(data, np.rint(data)):
        return Values.COUNTS
    return Values.LINEAR if data.max() > LARGEST_LOG1P else Values.LOG1P


def fits(expected: str, kind: str) -> bool:
    """Whether the kind that [`kind_of_values`] found in some cells agrees with the kind that is expected of all cells."""
    return kind in (expected, Values.ZEROS) or expected == Values.FRACTIONAL


def wrong_kind(source: str, expected: str, kind: str, total: float | None) -> str:
    """
    What an error says of values of another kind than expected.

    Args:
        total (`float`, *optional*): what a cell sums to before the logarithm, where log1p values are expected and it is known.
    """
    found = {
        Values.COUNTS: "whole numbers (counts)",
        Values.LOG1P: "fractional values (log1p already?)",
        Values.LINEAR: "fractional values too large for log1p (normalised, not yet log1p?)",
        Values.FRACTIONAL: "fractional counts (corrected or imputed?)",
    }[kind]
    if expected in Values.RAW:
        return (
            f"{source}: expected counts, found {found}; this processor normalises by itself, so give it the raw counts "
            "(input='layers/counts' where they lie in a layer)"
        )
    to = "" if total is None else f", target_sum={total:.10g}"
    if kind == Values.LINEAR:
        same = "the same" if total is None else f"{total:.10g}"
        fix = f"run sc.pp.log1p(adata) if all cells sum to {same}, or sc.pp.normalize_total(adata{to}) before it if they do not"
    else:
        fix = f"run sc.pp.normalize_total(adata{to}); sc.pp.log1p(adata)"
    if total is None:
        fix += " (cells should sum to what those of training sum to, which is not known)"
    return f"{source}: expected log1p expression, found {found}; {fix}, or read another layer with input="


def resolve_normalisation(asked: str, found: set[str], source: str) -> tuple[str, str]:
    """The settings (normalize, values), from what was asked for and the kinds of values in the files."""
    kinds = found - {Values.ZEROS}
    scalable = kinds <= {*Values.RAW, Values.LINEAR}
    if asked == Normalize.COUNTS_TO_LOG1P and kinds and scalable:
        return Normalize.COUNTS_TO_LOG1P, Values.LOG1P
    if len(kinds) > 1:
        raise ValueError(f"{source} holds {' in one file and '.join(sorted(kinds))} in another; make them alike")
    kind = kinds.pop() if kinds else Values.LOG1P
    if asked == Normalize.COUNTS_TO_LOG1P:
        raise ValueError(wrong_kind(source, Values.COUNTS, kind, None))
    if asked == Normalize.AUTO and kind in (Values.FRACTIONAL, Values.LINEAR):
        what = (
            "fractional counts (corrected, imputed ..)"
            if kind == Values.FRACTIONAL
            else "normalised values without log1p"
        )
        raise ValueError(
            f"{source} seems to hold {what}: set normalize='counts_to_log1p', which scales each cell to target_sum and takes "
            "log1p; or normalize='none', if they are log1p values all the same"
        )
    if asked == Normalize.NONE:
        return Normalize.NONE, Values.COUNTS if kind == Values.COUNTS else Values.LOG1P
    return (Normalize.COUNTS_TO_LOG1P, Values.LOG1P) if kind == Values.COUNTS else (Normalize.NONE, Values.LOG1P)


def describe_reading(normalize: str, values: str, target_sum: float | None) -> str:
    """What a model reads, in words, from settings of its processor."""
    if normalize == Normalize.COUNTS_TO_LOG1P:
        return f"counts, scaled to {target_sum:,g} per cell and log1p"
    return {Values.LOG1P: "log1p expression", Values.COUNTS: "counts, as they are", Values.EMBEDDING: "an embedding"}[
        values
    ]


def describe_values(values: str, scaled: bool, target_sum: float | None) -> str:
    """What values are, in words. For log1p expression made from counts (`scaled`), also what they were scaled to."""
    if values != Values.LOG1P:
        return values
    if not scaled:
        return "log1p expression"
    return "log1p expression " + ("(unscaled counts)" if target_sum is None else f"({target_sum:g} counts per cell)")


def cell_totals(counts) -> np.ndarray:
    """Counts of each cell over all genes, `(cells,)` float64, of a dense or sparse matrix `(cells, genes)`."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def normalize_counts(
    counts: np.ndarray, totals: np.ndarray, target_sum: float, stored: np.ndarray | None = None
) -> np.ndarray:
    """
    Counts scaled to `target_sum` a cell, then log1p. A cell without counts stays 0.

    Args:
        counts (`np.ndarray`): of shape `(cells, genes)`; or, with `stored`, the stored values of sparse rows, one
            cell's after another (the `data` of a CSR matrix). Any numeric type; left as it is.
        totals (`np.ndarray` of shape `(cells,)`): counts of each cell over all genes of the data ([`cell_totals`]), not
            only over those given.
        target_sum (`float`): counts a cell is scaled to.
        stored (`np.ndarray` of shape `(cells,)`, *optional*): how many of the values are each cell's
            (`np.diff(indptr)`).

    Returns:
        `np.ndarray` of the shape of `counts`, float32: log1p expression.
    """
    scale = count_scales(totals, target_sum)
    return scaled_log1p(counts, scale[:, None] if stored is None else np.repeat(scale, stored))


def count_scales(totals: np.ndarray, target_sum: float) -> np.ndarray:
    """What the counts of each cell are multiplied by, so that they sum to `target_sum`, `(cells,)` float32; see [`normalize_counts`]."""
    totals = np.asarray(totals, dtype=np.float64)
    return (target_sum / np.where(totals == 0, 1, totals)).astype(np.float32)


def scaled_log1p(counts: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`log1p(counts * scale)` float32; `scale` float32, of a shape that goes with that of the counts."""
    values = counts.astype(np.float32)
    values *= scale
    return np.log1p(values, out=values)


def read_expression(
    adata: ad.AnnData,
    source: str,
    rows,
    columns,
    expected: str,
    as_log1p: bool,
    target_sum: float | None,
    scales: tuple[Scale, Scale] | None = None,
    total: float | None = None,
) -> "sp.csr_matrix | np.ndarray":
    """
    Checked expression of some rows and columns, `(rows, columns)` float32, CSR or dense as it is stored.

    Args:
        source (`str`): `"X"` or `"layers/NAME"`.
        expected (`str`): `"counts"` or `"log1p"`, the values that are there.
        as_log1p (`bool`): scale counts to `target_sum` a cell (over all genes) and log1p-transform them.
        target_sum (`float` or None): what counts are scaled to; not needed where none are.
        scales (`tuple[Scale, Scale]`, *optional*): convert log1p values from the first scale to the second.
        total (`float`, *optional*): what the cells of log1p values should sum to, for errors.

    Raises:
        KeyError: nothing is there.
        ValueError: the values are of another kind than `expected`.
    """
    matrix = take_rows(matrix_of(adata, source), rows)
    check_finite(matrix, adata, rows, source, nonnegative=True)
    kind = kind_of_values(matrix)
    if not fits(expected, kind):
        raise ValueError(wrong_kind(source, expected, kind, total))
    if scales is not None:
        matrix = converted(matrix, *scales)
    if expected not in Values.RAW:
        return matrix[:, columns].astype(np.float32)
    totals, matrix = cell_totals(matrix), matrix[:, columns]
    check_totals(totals, source, cell_of(adata, rows))
    if not as_log1p:
        return matrix.astype(np.float32)
    target_sum = given("target_sum", target_sum)
    if not sp.issparse(matrix):
        return normalize_counts(matrix, totals, target_sum)
    matrix.data = normalize_counts(matrix.data, totals, target_sum, stored=np.diff(matrix.indptr))
    return matrix


def resolve_target_sum(asked: float | str, normalize: str, source: str, totals: Callable[[], np.ndarray]) -> float:
    """
    What counts are scaled to: the number asked for, or with `"median"` the median total of the cells that have counts.

    Args:
        source (`str`): where the values are read, for errors.
        totals (`Callable`): gives the counts of every training cell; called for the median alone.

    Raises:
        ValueError: it is neither a number above 0 nor `"median"`, or the values are not counts that are scaled.
    """
    if asked != "median" and not within_reach(asked):
        raise ValueError(f"target_sum={asked!r}: expected a number of counts above 0, or 'median'")
    if normalize != Normalize.COUNTS_TO_LOG1P:
        raise ValueError(
            f"target_sum={asked!r} is what counts are scaled to, but {source} is used as it is; leave target_sum out, "
            "or read raw counts with normalize='auto'"
        )
    if asked != "median":
        return float(asked)
    found = totals()
    if not found.any():
        raise ValueError(f"target_sum='median': no training cell has counts in {source}; give a number")
    return float(np.median(found[found > 0]))


def shared_genes(adatas: list[ad.AnnData]) -> pd.Index:
    """The genes that all data have, in the order of the first. ValueError if a name occurs twice or none is common."""
    shared = adatas[0].var_names
    for data in adatas:
        if len(data.var_names) == 0:
            raise ValueError("the data have no genes, expected at least one name in var")
        if not data.var_names.is_unique:
            duplicates = data.var_names[data.var_names.duplicated()].unique()
            raise ValueError(
                f"gene names are not unique, found {some(duplicates)} twice; say with duplicate_genes: first, or sum, what is "
                "read of them, or name them apart (adata.var_names_make_unique())"
            )
        if not shared.isin(data.var_names).any():
            raise ValueError(
                f"the files have no gene name in common, found {some(shared, 3)} and {some(data.var_names, 3)}; give all of them the "
                f"same kind of gene names{other_names(data, [str(gene) for gene in shared])}"
            )
        shared = shared[shared.isin(data.var_names)]
    return shared


def gene_columns(adata: ad.AnnData, genes: list[str], missing_genes: str) -> np.ndarray:
    """
    The column of each gene in the data, int64, -1 where it has none.

    Raises:
        KeyError: genes are missing and `missing_genes` is `"error"`, or all are.
        ValueError: a gene occurs twice in the data, or `missing_genes` is neither `"error"` nor `"zero"`.
    """
    if missing_genes not in ("error", "zero"):
        raise ValueError(f"missing_genes={missing_genes!r}; expected 'error' or 'zero'")
    if not adata.var_names.is_unique:
        names = pd.Index(adata.var_names)
        duplicates = names[names.duplicated()].unique().intersection(pd.Index(genes))
        duplicates = duplicates.tolist()
        if duplicates:
            raise ValueError(
                f"genes of the model stand twice in the data: {some(duplicates)}; say with duplicate_genes: first, or sum, what "
                "is read of them, or name them apart (adata.var_names_make_unique())"
            )
        columns = pd.Series(np.arange(len(names)), index=names)[lambda s: ~s.index.duplicated()]
        columns = columns.reindex(genes, fill_value=-1).to_numpy()
    else:
        columns = adata.var_names.get_indexer(genes)
    missing = [g for g, column in zip(genes, columns) if column < 0]
    if missing and (missing_genes == "error" or len(missing) == len(genes)):
        raise KeyError(
            f"{len(missing)} of the model's {len(genes)} genes are missing from the data: {missing[:10]}"
            + (
                "; a prediction may read them as unexpressed (missing_genes='zero', --missing-genes zero)"
                if len(missing) < len(genes)
                else ""
            )
            + f" (the data's genes look like {some(adata.var_names, 3)}){other_names(adata, missing)}"
        )
    return columns


def dense_genes(present, columns: np.ndarray) -> np.ndarray:
    """Dense expression `(cells, genes)` float32 of all genes; 0 for those that the data lack, where `columns` is -1."""
    dense = present.toarray() if sp.issparse(present) else np.asarray(present)
    if dense.shape[1] == len(columns):
        return np.ascontiguousarray(dense, dtype=np.float32)
    full = np.zeros((dense.shape[0], len(columns)), dtype=np.float32)
    full[:, columns >= 0] = dense
    return full


def listed_genes(genes, shared: pd.Index) -> list[str]:
    """The genes of a list, in its order. KeyError for those that the data lack."""
    genes = [str(g) for g in genes]
    missing = [g for g, there in zip(genes, pd.Index(genes).isin(shared)) if not there]
    if missing:
        raise KeyError(f"{len(missing)} of {len(genes)} listed genes are not in the data: {missing[:10]}")
    return genes


def highly_variable_genes(expression, genes, count: int) -> list[str]:
    """
    The `count` most variable genes of log1p expression `(cells, genes)`, CSR or a dask array of CSR blocks, in the data's
    order (scanpy, "seurat").
    """
    # A checkpoint's user never chooses genes: scanpy is not needed to load this file.
    try:
        import scanpy as sc
    except ImportError as error:
        raise ImportError("choosing highly variable genes needs scanpy: pip install scanpy") from error
    joined = ad.AnnData(expression, var=pd.DataFrame(index=genes))
    # numba, which scanpy computes with, resets the number of threads that torch shares with it.
    threads = torch.get_num_threads()
    sc.pp.highly_variable_genes(joined, n_top_genes=count)
    torch.set_num_threads(threads)
    return [str(g) for g, chosen in zip(genes, joined.var["highly_variable"]) if chosen]


def variable_genes(
    blocks: Sequence[tuple[int, Callable[[], sp.csr_matrix]]], genes: list[str], number: int
) -> list[str]:
    """
    [`highly_variable_genes`] of cells that are read block by block.

    Args:
        blocks (`list[tuple[int, Callable]]`): for each block, its number of cells and a function that reads its log1p
            expression, CSR.
        genes (`list[str]`): names of the columns.
        number (`int`): how many to choose.
    """
    if sum(cells for cells, _ in blocks) * len(genes) <= _SMALL:
        return highly_variable_genes(sp.vstack([read() for _, read in blocks], format="csr"), genes, number)
    try:
        import dask
        import dask.array as da
    except ImportError as error:
        raise ImportError("choosing highly variable genes needs dask: pip install dask") from error

    empty = sp.csr_matrix((0, len(genes)), dtype=np.float64)

    def exact(read) -> sp.csr_matrix:
        return read().astype(np.float64)  # so that sums do not depend on the blocks

    parts = [
        da.from_delayed(dask.delayed(exact, pure=False)(read), shape=(cells, len(genes)), dtype=np.float64, meta=empty)
        for cells, read in blocks
    ]
    # One block at a time: memory matters more here than time.
    with dask.config.set(scheduler="synchronous"):
        return highly_variable_genes(da.concatenate(parts), genes, number)
