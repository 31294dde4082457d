"""Cells of AnnData objects, in memory or read from files, as a source."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from .cell_source import GROUP_KEYS, ROOM, Block, LazyBlock, Room, WholeSource, check_contexts, with_rows
from .cell_values import (
    block_of_rows,
    cell_of,
    cell_totals,
    check_finite,
    fits,
    kind_of_values,
    matrix_of,
    shared_genes,
    take_rows,
    wrong_kind,
)
from .constants import Values
from .finite import check_totals
from .gene_names import MAX_MISSING_GENES
from .gene_view import rows_looked_at, scale_of, view_of
from .printable import get_logger
from .value_scale import ALIKE, Scale, converted, differ, strays


if TYPE_CHECKING:
    from ..processing import StateProcessor


logger = get_logger(__name__)

VALUES_OF_BLOCK = 1 << 22
LABELS_OF_BLOCK = 1 << 16


@dataclass
class Part:
    """
    An AnnData whose cells belong to a source.

    Args:
        dataset (`str`): its dataset.
        data (`AnnData`): the cells.
        var_names (`pandas.Index`): its genes.
        codes (`np.ndarray` of shape `(cells,)`): number of the group of each of its cells; -1 for one left out.
        scale ([`Scale`]): what some of its cells show its expression to be.
        width (`int`, *optional*): dimensions of its embedding.
    """

    dataset: str
    data: Any = None
    var_names: pd.Index = field(default_factory=lambda: pd.Index([], dtype=object))
    codes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    scale: Scale = Scale(Values.ZEROS)
    width: int | None = None

    @contextmanager
    def open(self) -> Iterator[ad.AnnData]:
        """The AnnData, or what reads a file like one. Errors within name the file."""
        yield self.data

    def obs(self, data: ad.AnnData, rows: slice, columns: list[str]) -> pd.DataFrame:
        """The given columns of obs for a range of rows of what `open` gave; all columns if one of them is missing."""
        return (data.obs[columns] if set(columns) <= set(data.obs) else data.obs).iloc[rows]

    @property
    def named(self) -> str:
        """What errors call this part, as the first words of a sentence or within one."""
        return "the data"


@dataclass
class Recipe:
    """
    What is read of each part.

    Args:
        expression (`str`, *optional*): where expression is, `"X"` or `"layers/NAME"`.
        embedding (`str`, *optional*): where the embedding is, `"obsm/NAME"`.
        kind (`str`, *optional*): what the expression is, `"counts"` or `"log1p"`.
        genes (`list[str]`): the genes that are taken, in order.
        scale ([`Scale`], *optional*): what log1p values are converted to.
        gene_key (`str`, *optional*), ignore_gene_versions (`bool`), duplicate_genes (`str`): which names of genes are meant, see
            [`view_of`].
    """

    expression: str | None
    embedding: str | None
    kind: str | None
    genes: list[str]
    scale: Scale | None = None
    gene_key: str | None = None
    ignore_gene_versions: bool = False
    duplicate_genes: str = "error"

    @property
    def matrices(self) -> list[str]:
        """The names of what is read, one or both."""
        return [name for name in (self.expression, self.embedding) if name is not None]


class PartReader:
    """Blocks of the cells of an open part, checked."""

    def __init__(self, data: ad.AnnData, part: Part, recipe: Recipe):
        if recipe.expression is not None:
            names = (recipe.gene_key, recipe.ignore_gene_versions, recipe.duplicate_genes)
            data, place = view_of(data, recipe.expression, *names)
            recipe = replace(recipe, expression=place)
        self.data, self.part, self.recipe = data, part, recipe
        self._codes: np.ndarray = part.codes
        if len(self._codes) != data.n_obs:
            raise ValueError(
                f"{part.named} changed while it was read: expected {len(self._codes)} cells, found {data.n_obs}; run again "
                "once nothing writes to it"
            )
        self._matrices = {name: matrix_of(data, name) for name in recipe.matrices}
        self._columns = data.var_names.get_indexer(recipe.genes)
        if (self._columns < 0).any():
            raise ValueError(
                f"{part.named} changed while it was read: it lacks genes that it had; run again once nothing writes to it"
            )
        self._all_genes = np.array_equal(self._columns, np.arange(len(data.var_names)))

    def slices(self) -> list[slice]:
        """Ranges of rows that fit in memory."""
        return block_of_rows(self._matrices[self.recipe.matrices[0]], VALUES_OF_BLOCK)

    def read(self, rows: slice, wanted: np.ndarray | None = None) -> Block:
        """
        The cells in a range of rows, without those that are left out.

        Args:
            wanted (`np.ndarray` of shape `(groups,)`, *optional*): whether a group's cells are wanted.
        """
        codes = self._codes[rows]
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
            if not fits(kind, kind_of_values(matrix)):
                error = wrong_kind(name, kind, kind_of_values(matrix), self.part.scale.total)
                raise ValueError(f"{error} (in cells {rows.start} to {rows.stop - 1})")
            if kind in Values.RAW:
                totals = cell_totals(matrix)
                check_totals(totals, name, cell_of(self.data, taken))
            else:
                self._check_scale(matrix, rows)
            if kind not in Values.RAW and self.recipe.scale is not None:
                matrix = converted(matrix, self.part.scale, self.recipe.scale)
            expression = matrix if self._all_genes else matrix[:, self._columns]
            expression.eliminate_zeros()
        if self.recipe.embedding is not None:
            values = take_rows(self._matrices[self.recipe.embedding], rows)
            values = np.asarray(values.toarray() if sp.issparse(values) else values)[keep]
            check_finite(values, self.data, taken, self.recipe.embedding)
            embedding = values.astype(np.float32, copy=False)
        return Block(taken, codes[keep], expression, totals, embedding)

    def _check_scale(self, matrix: sp.csr_matrix, rows: slice):
        """ValueError if some cells of log1p values are on another scale than the part."""
        found = strays(matrix, self.part.scale)
        if found is not None:
            raise ValueError(
                f"{self.recipe.expression} holds {self.part.scale.describe()}, but some of cells {rows.start} to {rows.stop - 1} hold "
                f"{found.describe()}; {ALIKE}"
            )

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, Block]]:
        """The blocks that hold wanted cells, in order, each with its range of rows."""
        for _, rows in self.counts(wanted):
            yield rows, self.read(rows, wanted)

    def counts(self, wanted: np.ndarray | None) -> list[tuple[int, slice]]:
        """The number of wanted cells in each block that holds some, and its range of rows."""
        counted = [(self._count(rows, wanted), rows) for rows in self.slices()]
        return [(cells, rows) for cells, rows in counted if cells]

    def _count(self, rows: slice, wanted: np.ndarray | None) -> int:
        codes = self._codes[rows]
        return int((codes >= 0).sum() if wanted is None else ((codes >= 0) & wanted[codes]).sum())


class Places:
    """
    Gives each cell its row in a table that is sorted by group. The cells of one group keep the order in which they come.

    Args:
        sizes (`np.ndarray` of shape `(groups,)`): cells of each group.
    """

    def __init__(self, sizes: np.ndarray):
        self._next = np.cumsum(sizes, dtype=np.int64) - sizes

    def copy(self) -> "Places":
        """The places as they stand now."""
        other = Places(np.zeros(0, dtype=np.int64))
        other._next = self._next.copy()
        return other

    def pass_over(self, codes: np.ndarray):
        """Leave room for the cells of these groups; -1 is no group."""
        self._next += np.bincount(codes[codes >= 0], minlength=len(self._next))

    def take(self, codes: np.ndarray) -> np.ndarray:
        """The places of the next cells, which are of these groups."""
        order = np.argsort(codes, kind="stable")
        ordered = codes[order]
        first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(codes) else np.zeros(0, dtype=np.int64)
        sizes = np.diff(np.r_[first, len(codes)])
        places = np.empty(len(codes), dtype=np.int64)
        places[order] = self._next[ordered] + np.arange(len(codes)) - np.repeat(first, sizes)
        self._next[ordered[first]] += sizes
        return places


class AnnDataSource(WholeSource):
    """
    Cells of one or several AnnData objects, read block by block.

    Args:
        parts (`list[Part]`): the objects; their groups are found here.
        reader ([`StateProcessor`]): reads the labels, and says where the cells' values lie. If there are several datasets, the
            source's own `reader` is a copy of it that tells their batches apart.
        contexts (`list[str]`, *optional*): leave out the cells of all other contexts.
        convert_scale (`bool`): convert log1p values of parts whose cells sum to another total.
        max_missing_genes (`float`): the largest share of a part's genes that may be missing in others.

    Raises:
        KeyError: a column, layer or obsm entry is missing; what exists is listed.
        ValueError: a label is wrong, a context is not there, genes stand twice or are not shared, widths of embeddings
            differ, or there are no cells.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        reader: "StateProcessor",
        contexts: list[str] | None = None,
        convert_scale: bool = False,
        max_missing_genes: float = MAX_MISSING_GENES,
    ):
        self.parts, self.convert_scale = list(parts), convert_scale
        self.reader = reader.for_datasets([part.dataset for part in self.parts])
        if not 0 <= max_missing_genes <= 1:
            raise ValueError(f"max_missing_genes={max_missing_genes}: expected a share of the genes, 0 to 1")
        self.max_missing_genes = max_missing_genes
        embedded = reader.input.startswith("obsm/")
        if reader.gene_input is not None and not embedded:
            raise ValueError(
                f"gene_input={reader.gene_input!r} feeds the gene decoder of a model on embeddings; input="
                f"{reader.input!r} is expression itself: leave gene_input out"
            )
        self.expression = reader.gene_input if embedded else reader.input
        self._embedding = reader.input if embedded else None
        self._look(contexts)
        self.genes = [] if self.expression is None else self._shared_genes()
        widths = {part.width for part in self.parts}
        if len(widths) > 1:
            raise ValueError(
                f"{self._embedding}: expected one width in all files, found {sorted(width or 0 for width in widths)}"
            )
        self.embedding_dim = widths.pop()

    # Groups

    def _look(self, contexts: list[str] | None):
        """Open each part once: for its labels, its genes, and what some of its cells show."""
        groups = self._read_parts_once()
        for note in self.reader.label_reader.doubts(groups):
            logger.warning(note)
        keys = list(groups.columns)
        check_contexts(contexts, groups)
        order = groups.sort_values(keys, kind="stable").index.to_numpy()
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order))
        self._renumber(rank)
        self.groups = groups.iloc[order].reset_index(drop=True)
        used = (
            np.ones(len(groups), dtype=bool) if contexts is None else self.groups["context"].isin(contexts).to_numpy()
        )
        self._renumber(np.where(used, np.arange(len(groups)), -1))
        self.drop_empty()

    def _judge(self, part: Part, data: ad.AnnData):
        """Learn the names of a part's genes, the width of its embedding, and what some of its cells show."""
        if self.expression is not None:
            view, place = view_of(data, self.expression, *self.reader.gene_names)
            shared_genes([view])  # an error about one file names it
            used = np.flatnonzero(part.codes >= 0)
            rows = used[rows_looked_at(len(used))]
            taken = take_rows(matrix_of(view, place), rows)
            part.var_names, part.scale = view.var_names, scale_of(view, place, taken)
            check_finite(taken, view, rows, place, nonnegative=True)
        if self._embedding is not None:
            part.width = matrix_of(data, self._embedding).shape[1]

    def _read_parts_once(self) -> pd.DataFrame:
        """The groups of all cells, in the order in which they come; each part learns the groups of its cells."""
        reader = self.reader
        keys = [name for name in GROUP_KEYS if name != "batch" or reader.batch_key is not None]
        numbers: dict[tuple, int] = {}
        for part in self.parts:
            with part.open() as data:
                part.var_names, part.codes = data.var_names, np.full(data.n_obs, -1, dtype=np.int32)
                for start in range(0, data.n_obs, LABELS_OF_BLOCK):
                    rows = slice(start, min(start + LABELS_OF_BLOCK, data.n_obs))
                    labels = reader.labels_of(part.obs(data, rows, reader.label_columns), part.dataset)
                    grouped = labels.assign(dataset=part.dataset).groupby(keys, sort=False, observed=True)
                    names = [tuple(name) for name in grouped.size().index]
                    of_block = np.array(
                        [*(numbers.setdefault(name, len(numbers)) for name in names), -1], dtype=np.int32
                    )
                    numbered = grouped.ngroup().fillna(-1).astype(np.int64).to_numpy()  # -1: a cell that is left out
                    part.codes[rows] = of_block[numbered]
                self._judge(part, data)
        return pd.DataFrame(list(numbers), columns=keys, dtype=object)

    def _renumber(self, number: np.ndarray):
        """Give each group another number; -1 leaves its cells out."""
        for part in self.parts:
            if len(number):
                part.codes = np.where(part.codes >= 0, number[part.codes], -1).astype(np.int32)

    def drop_empty(self):
        """Drop the groups that have no cells (any more), and find the rows of the others. ValueError if none is left."""
        keys = [name for name in GROUP_KEYS if name in self.groups]
        sizes = np.sum(
            [np.bincount(part.codes[part.codes >= 0], minlength=len(self.groups)) for part in self.parts], axis=0
        )
        if not sizes.any():
            raise ValueError(
                "the files hold no cells, and so no control cells"
                + (" (all of them are left out)" if any(len(part.codes) for part in self.parts) else "")
                + "".join(f"; {note}" for note in self.reader.label_reader.unmet())
            )
        self._renumber(np.where(sizes > 0, np.cumsum(sizes > 0) - 1, -1))
        self.parts = [part for part in self.parts if (part.codes >= 0).any()]
        self.groups = with_rows(self.groups.loc[sizes > 0, keys].reset_index(drop=True), sizes[sizes > 0])

    @property
    def sizes(self) -> np.ndarray:
        """Cells of each group."""
        return (self.groups["stop"] - self.groups["start"]).to_numpy()

    # Values

    def _shared_genes(self) -> list[str]:
        genes = [str(gene) for gene in shared_genes(self.parts)]
        everything = set().union(*(part.var_names for part in self.parts))
        if len(everything) > len(genes):
            note = f"{len(everything) - len(genes)} of {len(everything)} genes are not in every file: left out"
            logger.warning(note)
            self.notes = [note]
        fewest = min(len(part.var_names) for part in self.parts)
        if 1 - len(genes) / fewest > self.max_missing_genes:
            raise ValueError(
                f"the files share {len(genes)} genes, and the smallest has {fewest}: expected at least "
                f"{1 - self.max_missing_genes:.0%} of them in common; give all files the same kind of gene names (gene_key, "
                "ignore_gene_versions), or allow it with max_missing_genes"
            )
        return genes

    def kinds(self) -> set[str]:
        return {part.scale.values for part in self.parts}

    def scale(self) -> Scale | None:
        """
        The scale of the values once they are read. Values of another base are always converted. Values of another total are
        converted only with `convert_scale`: to `wanted_scale` if it is set, else to the scale of the first part.

        Raises:
            ValueError: the parts have different totals, and `convert_scale` is not set.
        """
        if self.expression is None:
            return None
        scales = [part.scale for part in self.parts]
        first = next((of for of in scales if of.total is not None), scales[0])
        wanted = self.wanted_scale or replace(first, base=None)
        for part, of in zip(self.parts, scales):
            if differ(wanted, replace(of, base=None)) and not self.convert_scale:
                raise ValueError(
                    f"{self.expression} holds {first.describe()} in one file and {of.describe()} in {part.named}; scale them "
                    "alike, or convert them with convert_scale: true"
                )
        return wanted

    def recipe(self, genes: list[str] | None = None) -> Recipe:
        """What is read of each part, with these genes; by default those of the source."""
        if self.expression is None:
            return Recipe(None, self._embedding, None, [])
        kinds = self.kinds() - {Values.ZEROS}
        kind = Values.LOG1P if Values.LOG1P in kinds or not kinds else Values.FRACTIONAL
        kind = Values.COUNTS if kinds == {Values.COUNTS} else kind
        if kind == Values.FRACTIONAL and not self.scaled:
            kind = Values.LOG1P
        return Recipe(
            self.expression,
            self._embedding,
            kind,
            self.genes if genes is None else genes,
            self.scale(),
            *self.reader.gene_names,
        )

    @contextmanager
    def blocks(self, wanted: np.ndarray | None = None, genes: list[str] | None = None) -> Iterator[list[LazyBlock]]:
        recipe = self.recipe(genes)
        with ExitStack() as stack:
            found: list[LazyBlock] = []
            for part in self.parts:
                # Only parts that hold wanted cells are opened.
                if wanted is None or wanted[part.codes[part.codes >= 0]].any():
                    reading = PartReader(stack.enter_context(part.open()), part, recipe)
                    found += [
                        (cells, partial(self._read, reading, rows, wanted)) for cells, rows in reading.counts(wanted)
                    ]
            yield found

    def _read(self, reading: PartReader, rows: slice, wanted: np.ndarray | None) -> Block:
        block = reading.read(rows, wanted)
        self._tell(rows.stop - rows.start)
        return block

    def features(self, processor: "StateProcessor", room: Room = ROOM) -> tuple[np.ndarray, np.ndarray | None]:
        cells, decoded = int(self.groups["stop"].iloc[-1]), processor.gene_input is not None
        note = room_note(4 * cells * (processor.feature_dim + (len(processor.vocabulary.genes) if decoded else 0)))
        if note is not None:
            logger.warning(note)
        features = room.empty((cells, processor.feature_dim))
        genes = room.empty((cells, len(processor.vocabulary.genes))) if decoded else None
        recipe, places = self.recipe(processor.vocabulary.genes), Places(self.sizes)
        number = 0
        for part in self.parts:
            with part.open() as data:
                reader = PartReader(data, part, recipe)
                for _, rows in reader.counts(None):
                    if number % room.parts != room.part:
                        places.pass_over(part.codes[rows])
                    else:
                        for piece in reader.read(rows).pieces():
                            taken = places.take(piece.codes)
                            features[taken] = processor.features_of(piece)
                            if genes is not None:
                                genes[taken] = piece.log1p(processor.target_sum).toarray()
                    number += 1
                    self._tell(rows.stop - rows.start)
        room.wait()
        return features, genes

    def read_parts(self, recipe: Recipe) -> Iterator[tuple[int, Block]]:
        """All cells, one part after another: the number of the part, and some of its cells."""
        for number, part in enumerate(self.parts):
            with part.open() as data:
                for rows, block in PartReader(data, part, recipe).blocks():
                    yield number, block
                    self._tell(rows.stop - rows.start)

    def _tell(self, cells: int):
        if self.progress is not None:
            self.progress(cells)


def room_note(needed: int) -> str | None:
    """A warning if `needed` bytes exceed the free memory that the system reports; else None."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed <= free:
        return None
    return (
        f"the cells take {needed / 2**30:,.1f} GiB in memory, {free / 2**30:,.1f} GiB are free; make a store of them (pertstate "
        "prepare), which is read from disk"
    )
