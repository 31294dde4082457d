"""Data as a model reads them: genes by the names that are meant, those of `raw`, each name once; and what the values are."""

from collections.abc import Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from .cell_values import matrix_of, take_rows
from .constants import Values
from .finite import within_reach, wrong
from .gene_names import texts_of, without_version
from .labels import MISSING
from .messages import closest, counted, some
from .value_evidence import inverse_log1p
from .value_scale import Scale, look_at


# Cells that show what kind the values are, and in how many places of the data; every cell is checked against it later.
LOOKED_AT, _PLACES = 2000, 8
DUPLICATES = ("error", "first", "sum")


class GeneView:
    """
    An AnnData, or what reads a file like one, with other names for its genes, and with the `X` of `raw` where `raw` is
    given.

    Args:
        data (`AnnData`): the cells.
        var_names (`pandas.Index`): the names of its genes.
        raw (`AnnData.raw`, *optional*): where `X` is taken from.
        duplicates (`str`): what becomes of genes that stand twice, see [`view_of`].
    """

    def __init__(self, data: ad.AnnData, var_names: pd.Index, raw=None, duplicates: str = "error"):
        self._data, self._raw, self._joins = data, raw, None
        self.var_names, self._all_names = var_names, var_names
        if duplicates != "error" and not var_names.is_unique:
            codes, names = pd.factorize(var_names)
            self.var_names = pd.Index(names)
            self._joins = (codes, duplicates)

    @property
    def X(self):
        return self._joined(self._data.X if self._raw is None else self._raw.X, "X")

    @property
    def layers(self) -> Mapping[str, Any]:
        return {name: self._joined(self._data.layers[name], name) for name in self._data.layers}

    @property
    def var(self) -> pd.DataFrame:
        """The var of the genes, by their names; the row of a gene that stands twice is its first one."""
        var = (self._data if self._raw is None else self._raw).var
        return var.set_axis(self._all_names)[~self._all_names.duplicated()]

    def _joined(self, matrix, place: str):
        if self._joins is None or matrix is None:
            return matrix
        codes, how = self._joins
        return JoinedGenes(matrix, codes, how, None if self._raw is not None else log_base_of(self._data, place))

    def __getattr__(self, name: str):
        return getattr(self._data, name)


class JoinedGenes:
    """
    A matrix of cells in which each gene stands once.

    Args:
        matrix: `(cells, columns)`, in memory or on disk.
        codes (`np.ndarray` of shape `(columns,)`): the gene of each column.
        how (`str`): `"first"`, the first column of a gene, or `"sum"`, the sum of its columns. Log1p values are summed before
            their logarithm.
        base (`float`, *optional*): of the logarithm, where the data say it.
    """

    def __init__(self, matrix, codes: np.ndarray, how: str, base: float | None = None):
        self._matrix, self._how = matrix, how
        self.shape = (matrix.shape[0], int(codes.max(initial=-1)) + 1)
        columns = np.arange(len(codes)) if how == "sum" else np.unique(codes, return_index=True)[1]
        ones = np.ones(len(columns), dtype=np.int8)
        self._to_genes = sp.csr_matrix((ones, (columns, codes[columns])), shape=(len(codes), self.shape[1]))
        self._said_base = base
        self._scale: Scale | None = None
        if hasattr(matrix, "blocks"):  # a matrix on disk chooses blocks that suit how it is stored
            self.blocks = matrix.blocks

    def __getitem__(self, rows) -> sp.csr_matrix:
        stored = sp.csr_matrix(take_rows(self._matrix, rows))
        if stored.dtype.kind != "f":
            stored = stored.astype(np.int64)  # a sum may not fit a small integer
        if self._how == "sum" and self._is_log1p():
            base = self._of_first().base
            stored = stored.astype(np.float64)
            stored.data = inverse_log1p(stored.data, base)
            summed = stored @ self._to_genes
            summed.data = np.log1p(summed.data) / (1.0 if base is None else np.log(base))
            return summed.astype(np.float32)
        return stored @ self._to_genes.astype(stored.dtype)

    def _of_first(self) -> Scale:
        if self._scale is None:
            self._scale = look_at(_valid(take_rows(self._matrix, rows_looked_at(self.shape[0]))), self._said_base)
        return self._scale

    def _is_log1p(self) -> bool:
        return self._of_first().values == Values.LOG1P


def view_of(
    data: ad.AnnData, source: str, gene_key: str | None, ignore_versions: bool, duplicates: str = "error"
) -> tuple[ad.AnnData, str]:
    """
    The data with the names of genes that are meant, and where the values then are.

    Args:
        source (`str`): `"X"`, `"layers/NAME"`, `"obsm/NAME"`, or `"raw/X"`, whose genes are those of `raw`.
        gene_key (`str`, *optional*): the column of var that holds the names.
        ignore_versions (`bool`): leave the versions of Ensembl ids out.
        duplicates (`str`): what becomes of genes that stand twice.

            - `"error"`: they are refused where they are used
            - `"first"`: the first column of each is read
            - `"sum"`: their columns are summed (log1p values before their logarithm)

    Raises:
        KeyError: there is no such column, or no `raw`.
        ValueError: a gene has no name in the column.
    """
    of_raw = source == "raw/X"
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicate_genes={duplicates!r}; {closest(duplicates, DUPLICATES)}")
    if not (of_raw or gene_key or ignore_versions or (duplicates != "error" and not data.var_names.is_unique)):
        return data, source
    raw: Any = data.raw if of_raw else None
    if of_raw and raw is None:
        raise KeyError(f"input 'raw/X': the data have no raw, found X and layers {some(data.layers)}")
    var_names = pd.Index(raw.var_names if of_raw else data.var_names)
    if gene_key is not None:
        var = raw.var if of_raw else data.var
        if gene_key not in var:
            raise KeyError(
                f"var has no column {gene_key!r} (gene_key), found {some(var.columns)}; "
                f"{closest(gene_key, var.columns) if len(var.columns) else 'leave gene_key out'}"
            )
        names = texts_of(var[gene_key])
        missing = names.str.strip().str.lower().isin(MISSING)
        missing &= names.duplicated(keep=False) | (names.str.strip() == "")  # one gene may well be called nan
        missing |= var[gene_key].isna()
        if missing.any():
            raise ValueError(
                f"var[{gene_key!r}] has no name for {counted(int(missing.sum()), 'gene')}, first for {var.index[missing][0]!r}; name "
                "them, for example by the names of var"
            )
        var_names = pd.Index(names.to_numpy())
    if ignore_versions:
        var_names = pd.Index([without_version(str(name)) for name in var_names])
    return GeneView(data, var_names, raw, duplicates), "X" if of_raw else source


def rows_looked_at(cells: int) -> np.ndarray:
    """The rows of so many cells that show what kind the values are: a few ranges, from the first to the last of the cells."""
    if cells <= LOOKED_AT:
        return np.arange(cells)
    size = LOOKED_AT // _PLACES
    starts = np.linspace(0, cells - size, _PLACES).astype(np.int64)
    return (starts[:, None] + np.arange(size)).ravel()


def scale_of(data: ad.AnnData, source: str, taken=None) -> Scale:
    """
    The scale of expression, judged by some cells of the data, without cells that hold wrong values.

    Args:
        taken (CSR or `np.ndarray`, *optional*): the values of these cells, where they were read already.

    Raises:
        ValueError: the cells are a mixture of several scales.
    """
    if taken is None:
        matrix = matrix_of(data, source)
        taken = take_rows(matrix, rows_looked_at(matrix.shape[0]))
    return look_at(_valid(taken), log_base_of(data, source))


def log_base_of(data: ad.AnnData, source: str) -> float | None:
    """
    The base of the logarithm that the data name in `uns["log1p"]`; None where they name none: the natural logarithm.

    Raises:
        ValueError: what they name is not the base of a logarithm.
    """
    said = data.uns.get("log1p", {}) if source == "X" else {}
    base = said.get("base") if isinstance(said, Mapping) else None
    if base is None:
        return None
    number = base.item() if isinstance(base, (np.ndarray, np.generic)) and base.size == 1 else base
    if not within_reach(number) or number <= 1:
        raise ValueError(
            f"uns['log1p']['base'] is {base!r}, expected the base of a logarithm, above 1; correct it, or delete it for the "
            "natural logarithm"
        )
    return float(number)


def _valid(taken) -> sp.csr_matrix:
    """The cells that hold no wrong values."""
    matrix = sp.csr_matrix(taken)
    bad = wrong(matrix.data) | (matrix.data < 0)
    return matrix[np.diff(np.r_[0, np.cumsum(bad)][matrix.indptr]) == 0] if bad.any() else matrix


__all__ = ["GeneView", "JoinedGenes", "log_base_of", "rows_looked_at", "scale_of", "view_of"]
