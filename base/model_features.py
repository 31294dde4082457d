"""What a model reads of cells: genes in its order, normalised, on the scale of its training."""

from collections.abc import Callable, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from .cell_source import Block
from .cell_values import check_finite, dense_genes, gene_columns, matrix_of, read_expression, take_rows
from .constants import CONTROL_COUNTS, CONTROL_EXPRESSION, Normalize, Values
from .gene_names import MAX_MISSING_GENES, missing_note
from .gene_view import scale_of, view_of
from .messages import given, instead
from .value_scale import Scale, differ, other_scale
from .vocabulary import Vocabulary


class ModelFeatures:
    """How a processor reads values; a part of [`StateProcessor`], whose attributes these are."""

    vocabulary: Vocabulary
    input: str
    gene_input: str | None
    gene_key: str | None
    ignore_gene_versions: bool
    duplicate_genes: str
    values: str
    normalize: str
    target_sum: float | None
    feature_dim: int
    trained_scale: Scale | None
    control_expression: bool
    _scales: tuple[Scale, Scale] | None

    def features(self, adata: ad.AnnData, rows=slice(None), missing_genes: str = "error", input: str | None = None):
        """
        The model's features of some cells, `(cells, feature_dim)` float32: read, checked, put into the model's gene
        order and normalised. Works on a backed AnnData and reads only the rows asked for.

        Args:
            rows (`slice` or sorted integer array): which cells.
            missing_genes (`str`): `"error"`, or `"zero"` to read genes that the data lack as unexpressed.
            input (`str`, *optional*): read from here instead of the processor's `input`.
        """
        source = input or self.input
        if self.values == Values.EMBEDDING:
            matrix = take_rows(matrix_of(adata, source), rows)
            matrix = np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix)
            if matrix.shape[1] != self.feature_dim:
                raise ValueError(f"{source}: expected {self.feature_dim} dimensions, found {matrix.shape[1]}")
            check_finite(matrix, adata, rows, source)
            return matrix.astype(np.float32, copy=False)
        return self._genes(adata, source, rows, missing_genes, as_log1p=self.values == Values.LOG1P)

    def gene_features(self, adata: ad.AnnData, rows=slice(None)) -> np.ndarray:
        """The gene decoder's target, `(cells, genes)` float32 log1p expression, for a model on embeddings."""
        return self._genes(adata, given("gene_input", self.gene_input), rows, "error", as_log1p=True)

    def features_of(self, block: Block) -> np.ndarray:
        """The model's features of a block that a source read with the model's genes; as `features` gives them."""
        if self.values == Values.EMBEDDING:
            return given("embedding", block.embedding)
        as_log1p = self.values == Values.LOG1P
        return (block.log1p(self.target_sum) if as_log1p else given("expression", block.expression)).toarray()

    def _genes(self, adata, source, rows, missing_genes, as_log1p) -> np.ndarray:
        adata, source = self._view(adata, source)
        columns = gene_columns(adata, self.vocabulary.genes, missing_genes)
        present = columns[columns >= 0]
        read = read_expression(
            adata, source, rows, present, self.expects, as_log1p, self.target_sum, self._scales, self.trained_total
        )
        return dense_genes(read, columns)

    def _view(self, adata: ad.AnnData, source: str) -> tuple[ad.AnnData, str]:
        return view_of(adata, source, *self.gene_names)

    def control_values(
        self,
        contexts: Sequence,
        read: Callable[[np.ndarray], np.ndarray],
        rows_of: Callable[[Any], np.ndarray],
        known: dict,
    ) -> dict[str, np.ndarray]:
        """
        What all control cells of the contexts of some sentences express, by the keys of a batch; nothing for a model that does
        not read it.

        Args:
            contexts (sequence): the context of each sentence.
            read (`Callable`): gives the model's features of some rows, `(rows, feature_dim)`.
            rows_of (`Callable`): gives the rows of all control cells of a context.
            known (`dict`): keeps what was found of a context for the next call.

        Returns:
            `control_expression` (B, feature_dim) float32, the mean of `expm1` of log1p expression, and `control_counts` (B,)
            int64, the number of cells.
        """
        if not self.control_expression:
            return {}
        for context in contexts:
            if context not in known:
                known[context] = mean_expression(read, rows_of(context))
        found = [known[context] for context in contexts]
        return {
            CONTROL_EXPRESSION: np.stack([expression for expression, _ in found]),
            CONTROL_COUNTS: np.array([count for _, count in found], dtype=np.int64),
        }

    @property
    def gene_names(self) -> tuple[str | None, bool, str]:
        """Which names of genes are meant, as [`view_of`] takes it."""
        return self.gene_key, self.ignore_gene_versions, self.duplicate_genes

    def check_genes(
        self, adata: ad.AnnData, input: str | None = None, max_missing: float = MAX_MISSING_GENES
    ) -> str | None:
        """
        What a model reads as unexpressed because the data lack it, in words; None where they lack nothing.

        Args:
            input (`str`, *optional*): where the cells are read, instead of the processor's `input`.
            max_missing (`float`): the largest share of the model's genes that may be missing.

        Raises:
            ValueError: more are missing.
        """
        if self.values == Values.EMBEDDING:
            return None
        view, _ = self._view(adata, input or self.input)
        return missing_note(gene_columns(view, self.vocabulary.genes, "zero"), max_missing)

    def output_var(self, adata: ad.AnnData, input: str | None = None) -> pd.DataFrame:
        """
        The var of predicted cells: the model's genes, with the columns of var of the data that they are predicted from. Genes
        that the data lack have missing values there.

        Args:
            input (`str`, *optional*): where the cells are read, instead of the processor's `input`.
        """
        genes = pd.Index(self.vocabulary.genes, dtype=object)
        if self.values == Values.EMBEDDING:
            view = adata  # whose expression need not be there
        else:
            view, _ = self._view(adata, input or self.input)
        names = pd.Index(view.var_names)
        found = view.var.set_axis(names)[~names.duplicated()].reindex(genes)
        columns = {str(name): storable(found[name]) for name in found.columns if str(name) != "_index"}
        return pd.DataFrame(columns, index=genes)

    @property
    def expects(self) -> str:
        """What expression must be where it is read: `"counts"` or `"log1p"`."""
        if self.normalize != Normalize.COUNTS_TO_LOG1P and self.values != Values.COUNTS:
            return Values.LOG1P
        whole = self.trained_scale is None or self.trained_scale.values not in (Values.FRACTIONAL, Values.LINEAR)
        return Values.COUNTS if whole else Values.FRACTIONAL

    @property
    def trained_total(self) -> float | None:
        """What a training cell's log1p values sum to before the logarithm, where it is known."""
        return None if self.trained_scale is None else self.trained_scale.total

    def check_scale(self, adata: ad.AnnData, input: str | None = None, convert: bool = False):
        """
        Check, by some cells of the data, that log1p values have the total and the base of the training cells.

        Args:
            input (`str`, *optional*): where the cells are read, instead of the processor's `input`.
            convert (`bool`): convert the values that are read of these data, until other data are checked.

        Raises:
            ValueError: they have another total or base, and `convert` is not set.
        """
        self._scales = None  # those of data that were checked before
        source = self.gene_input if self.values == Values.EMBEDDING else input or self.input
        if self.trained_scale is None or source is None or source.startswith("obsm/"):
            return
        found = scale_of(*self._view(adata, source))
        if differ(self.trained_scale, found):
            if not convert:
                raise ValueError(
                    other_scale(
                        self.trained_scale, found, source, ", or convert them with convert_scale=True (--convert-scale)"
                    )
                )
            self._scales = (found, self.trained_scale)


def mean_expression(read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, block: int = 4096):
    """
    The mean of `expm1` of log1p expression, `(features,)` float32 of sums in float64, and the number of cells.

    Args:
        read (`Callable`): gives the cells of some rows, `(rows, features)`.
        rows (`np.ndarray`): of all cells.
        block (`int`): cells that are read at once.
    """
    rows = np.sort(rows)
    blocks = (read(rows[start : start + block]) for start in range(0, len(rows), block))
    total = sum(np.expm1(cells).sum(axis=0, dtype=np.float64) for cells in blocks)
    return (total / len(rows)).astype(np.float32), len(rows)


def storable(column: pd.Series) -> pd.Series:
    """A column of obs or var as every version of anndata can write and read it: mixed and missing values as texts."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        numbers = isinstance(column.cat.categories.dtype, np.dtype) and column.cat.categories.dtype.kind in "biuf"
        return column if numbers else column.cat.rename_categories([str(of) for of in column.cat.categories])
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        return column
    return column.map(str, na_action="ignore").astype(object).astype("category")


def carried_columns(obs: pd.DataFrame, names: list[str] | None, rows: np.ndarray) -> pd.DataFrame | None:
    """
    Some columns of obs, of some cells, as they are written to an output; None where none is asked for.

    Raises:
        KeyError: there is no such column.
    """
    for name in names or ():
        if name not in obs:
            raise KeyError(f"obs_columns: obs has no column {name!r}, {instead(name, obs.columns)}")
    return None if not names else pd.DataFrame({name: storable(obs[name].iloc[rows]) for name in names})


__all__ = ["ModelFeatures", "carried_columns", "mean_expression", "storable"]
