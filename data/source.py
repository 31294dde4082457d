"""The files that a store is made of, read block by block, with checked values and the group of every cell."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.base.cell_values import (
    cell_totals,
    check_finite,
    kind_of_values,
    matrix_of,
    normalize_counts,
    take_rows,
    wrong_kind,
)
from pertstate.base.constants import Values
from pertstate.data.cells import GROUP_KEYS
from pertstate.data.matrices import RowReader
from pertstate.data.reading import AnnDataFile, naming, read_labels
from pertstate.processing import StateProcessor


LARGEST_COUNT = 2**32 - 1  # a store keeps counts in 32 bits at most
VALUES_OF_BLOCK = 1 << 22
LABELS_OF_BLOCK = 1 << 16


@dataclass
class Source:
    """
    One file.

    Args:
        dataset (`str`): its dataset.
        path (`Path`): where it is.
        var_names (`pandas.Index`): its genes.
        codes (`np.ndarray` of shape `(cells,)`): number of the group of each of its cells; -1 for one left out.
    """

    dataset: str
    path: Path
    var_names: pd.Index
    codes: np.ndarray


@dataclass
class Recipe:
    """
    What is read from each file.

    Args:
        expression (`str`, *optional*): where expression is, `"X"` or `"layers/NAME"`.
        embedding (`str`, *optional*): where the embedding is, `"obsm/NAME"`.
        kind (`str`, *optional*): what the expression is, `"counts"` or `"log1p"`.
        genes (`list[str]`): the genes that are taken, in order.
    """

    expression: str | None
    embedding: str | None
    kind: str | None
    genes: list[str]

    @property
    def matrices(self) -> list[str]:
        """The names of what is read, one or both."""
        return [name for name in (self.expression, self.embedding) if name is not None]


@dataclass
class Block:
    """
    Some cells of a file.

    Args:
        rows (`np.ndarray`): their rows in the file.
        codes (`np.ndarray`): their groups.
        expression (`scipy.sparse.csr_matrix`, *optional*): `(cells, genes)`, as it stands in the file.
        totals (`np.ndarray`, *optional*): of counts, each cell's sum over all genes of the file, float64.
        embedding (`np.ndarray`, *optional*): `(cells, dimensions)` float32.
    """

    rows: np.ndarray
    codes: np.ndarray
    expression: sp.csr_matrix | None
    totals: np.ndarray | None
    embedding: np.ndarray | None

    def log1p(self, target_sum: float) -> sp.csr_matrix:
        """The block's expression as a model sees it; the block must have some."""
        stored: sp.csr_matrix = self.expression
        if self.totals is None:
            return stored
        scaled = stored.astype(np.float32)
        scaled.data = normalize_counts(stored.data, self.totals, target_sum, np.diff(scaled.indptr))
        return scaled


def find_groups(
    datasets: dict[str, list[Path]], reader: StateProcessor, contexts: list[str] | None
) -> tuple[list[Source], pd.DataFrame]:
    """
    The files with the group of each of their cells, and the groups, sorted: one row for each dataset, context,
    perturbation (and batch).

    Args:
        contexts (`list[str]`, *optional*): leave out the cells of all other contexts.
    """
    keys = [name for name in GROUP_KEYS if name != "batch" or reader.batch_key is not None]
    numbers: dict[tuple, int] = {}
    sources = []
    for dataset, paths in datasets.items():
        for path in paths:
            with AnnDataFile(path) as data, naming(path):
                codes = np.empty(data.n_obs, dtype=np.int32)
                for start in range(0, data.n_obs, LABELS_OF_BLOCK):
                    rows = slice(start, min(start + LABELS_OF_BLOCK, data.n_obs))
                    labels = read_labels(data, reader, rows).assign(dataset=dataset).reset_index(drop=True)
                    grouped = labels.groupby(keys, sort=False, observed=True)
                    names = [tuple(name) for name in grouped.size().index]
                    of_block = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int32)
                    codes[rows] = of_block[grouped.ngroup().to_numpy()] if len(names) else -1
                sources.append(Source(dataset, path, data.var_names, codes))
    if contexts is not None:
        for source in sources:
            left = np.array([name[1] not in contexts for name in numbers], dtype=bool)
            source.codes[left[source.codes]] = -1
    groups = pd.DataFrame(list(numbers), columns=keys, dtype=object)
    order = groups.sort_values(keys, kind="stable").index.to_numpy()
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    for source in sources:
        source.codes = np.where(source.codes >= 0, rank[source.codes], -1).astype(np.int32)
    return sources, groups.iloc[order].reset_index(drop=True)


def drop_empty(sources: list[Source], groups: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The groups that have cells, with their sizes. The codes of the sources are changed to the new numbers."""
    sizes = np.sum([np.bincount(s.codes[s.codes >= 0], minlength=len(groups)) for s in sources], axis=0)
    number = (np.cumsum(sizes > 0) - 1).astype(np.int32)
    for source in sources:
        source.codes = np.where(source.codes >= 0, number[source.codes], -1).astype(np.int32)
    return groups[sizes > 0].reset_index(drop=True), sizes[sizes > 0]


class SourceReader:
    """Blocks of the cells of an open file."""

    def __init__(self, data: AnnDataFile, source: Source, recipe: Recipe):
        self.data, self.source, self.recipe = data, source, recipe
        if len(source.codes) != data.n_obs:
            raise ValueError(
                f"{source.path} changed while it was read: it had {len(source.codes)} cells, now {data.n_obs}"
            )
        self._matrices: dict[str, RowReader] = {name: matrix_of(data, name) for name in recipe.matrices}
        self._columns = data.var_names.get_indexer(recipe.genes)
        if (self._columns < 0).any():
            raise ValueError(f"{source.path} changed while it was read: it lacks genes that it had")
        self._all_genes = np.array_equal(self._columns, np.arange(len(data.var_names)))

    def slices(self) -> list[slice]:
        """Ranges of rows that fit in memory."""
        return self._matrices[self.recipe.matrices[0]].blocks(VALUES_OF_BLOCK)

    def read(self, rows: slice, wanted: np.ndarray | None = None) -> Block:
        """
        The cells in a range of rows, without those that are left out.

        Args:
            wanted (`np.ndarray` of shape `(groups,)`, *optional*): whether a group's cells are wanted.
        """
        codes = self.source.codes[rows]
        keep = codes >= 0
        if wanted is not None:
            keep &= wanted[codes]
        taken = np.flatnonzero(keep) + rows.start
        expression = totals = embedding = None
        name, kind = self.recipe.expression, str(self.recipe.kind)
        if name is not None:
            matrix = sp.csr_matrix(take_rows(self._matrices[name], rows))
            matrix = matrix if keep.all() else matrix[keep]
            check_finite(matrix, self.data, taken, name, nonnegative=True)
            if kind_of_values(matrix) not in (kind, Values.ZEROS):
                error = wrong_kind(name, kind, kind_of_values(matrix), 1e4)
                raise ValueError(f"{error} (in cells {rows.start} to {rows.stop - 1})")
            if kind == Values.COUNTS and matrix.nnz and matrix.data.max() > LARGEST_COUNT:
                raise ValueError(
                    f"{name} holds a count of {matrix.data.max()} in cells {rows.start} to {rows.stop - 1}; expected "
                    f"at most {LARGEST_COUNT:,} (2^32 - 1)"
                )
            if kind == Values.COUNTS:
                totals = cell_totals(matrix)
            expression = matrix if self._all_genes else matrix[:, self._columns]
            expression.eliminate_zeros()
        if self.recipe.embedding is not None:
            values = take_rows(self._matrices[self.recipe.embedding], rows)
            values = np.asarray(values.toarray() if sp.issparse(values) else values, dtype=np.float32)[keep]
            check_finite(values, self.data, taken, self.recipe.embedding)
            embedding = values
        return Block(taken, codes[keep], expression, totals, embedding)

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, Block]]:
        """The blocks that hold wanted cells, in order, each with its range of rows."""
        for rows in self.slices():
            codes = self.source.codes[rows]
            if ((codes >= 0) if wanted is None else (codes >= 0) & wanted[codes]).any():
                yield rows, self.read(rows, wanted)


@contextmanager
def open_source(source: Source, recipe: Recipe) -> Iterator[SourceReader]:
    """A reader of one file."""
    with AnnDataFile(source.path) as data, naming(source.path):
        yield SourceReader(data, source, recipe)
