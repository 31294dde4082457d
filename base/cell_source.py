"""One source of cells, wherever they lie, and what a processor learns from it: values, genes and names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from .cell_values import (
    block_of_rows,
    cell_totals,
    check_finite,
    kind_of_values,
    listed_genes,
    matrix_of,
    normalize_counts,
    resolve_normalisation,
    resolve_target_sum,
    shared_genes,
    take_rows,
    variable_genes,
    wrong_kind,
)
from .constants import Normalize, Values
from .messages import closest, given, some
from .vocabulary import Vocabulary


if TYPE_CHECKING:
    # The processor is fitted by this module, and imports it.
    from ..processing import StateProcessor


GROUP_KEYS = ("dataset", "context", "perturbation", "batch")
VALUES_OF_BLOCK = 1 << 22
LABELS_OF_BLOCK = 1 << 16
_FIRST_CELLS = 2000  # which show what kind the values are; every cell is checked against it later


@dataclass
class Block:
    """
    Some cells.

    Args:
        rows (`np.ndarray`): their rows where they lie.
        codes (`np.ndarray`): their groups.
        expression (`scipy.sparse.csr_matrix`, *optional*): `(cells, genes)`, as it stands there.
        totals (`np.ndarray`, *optional*): of counts, each cell's sum over all its genes, float64.
        embedding (`np.ndarray`, *optional*): `(cells, dimensions)` float32.
    """

    rows: np.ndarray
    codes: np.ndarray
    expression: sp.csr_matrix | None
    totals: np.ndarray | None
    embedding: np.ndarray | None

    def log1p(self, target_sum: float | None) -> sp.csr_matrix:
        """The block's expression as log1p values; the block must have some. Counts are scaled to `target_sum` a cell."""
        stored: sp.csr_matrix = self.expression
        if self.totals is None:
            return stored
        scaled = stored.astype(np.float32)
        wanted = given("target_sum", target_sum)
        scaled.data = normalize_counts(stored.data, self.totals, wanted, np.diff(scaled.indptr))
        return scaled


# The number of cells of a block, and what reads it.
LazyBlock = tuple[int, Callable[[], Block]]


class CellSource(ABC):
    """
    Cells in memory, in files, in a store or in a stream: what a processor is fitted to, and what a model trains on.

    Attributes:
        reader ([`StateProcessor`]): reads the labels; it knows nothing else yet.
        groups (`pandas.DataFrame`): one row for each dataset, context, perturbation (and batch, where there are batches),
            sorted: these columns, `start` and `stop`, the rows of its cells where cells stand group by group.
        genes (`list[str]`): the genes that all cells have, in order; none where there is no expression.
        expression (`str`, *optional*): where expression is read, for errors; None if there is none.
        embedding_dim (`int`, *optional*): dimensions of the embedding; None if there is none.
        normalize (`str`), target_sum (`float`, *optional*): what is done to the values where a run does not say it.
        progress (`Callable[[int], Any]`, *optional*): is told how many cells were read, block by block.
    """

    reader: "StateProcessor"
    groups: pd.DataFrame
    genes: list[str]
    expression: str | None
    embedding_dim: int | None
    normalize: str = Normalize.AUTO
    target_sum: float | None = None
    progress: Callable[[int], Any] | None = None

    @abstractmethod
    def kinds(self) -> set[str]:
        """What kinds of values the expression holds, see [`Values`]."""

    @abstractmethod
    def blocks(
        self, wanted: np.ndarray | None = None, genes: list[str] | None = None
    ) -> AbstractContextManager[list[LazyBlock]]:
        """
        The cells, block by block, each read when it is asked for.

        Args:
            wanted (`np.ndarray` of shape `(groups,)`, *optional*): whether a group's cells are wanted; all by default.
            genes (`list[str]`, *optional*): the columns of the expression; by default all that the source has.
        """

    def totals(self, wanted: np.ndarray) -> np.ndarray:
        """The counts of each cell of the wanted groups, float64."""
        found = [np.empty(0)]
        with self.blocks(wanted) as blocks:
            found += [given("counts", read().totals) for _, read in blocks]
        return np.concatenate(found)


class WholeSource(CellSource):
    """A source whose cells can all be had at any time, unlike those of a stream."""

    @abstractmethod
    def features(self, processor: "StateProcessor") -> tuple[Any, Any]:
        """
        A model's features of all cells, group by group, `(cells, feature_dim)` float32, and the target of its gene
        decoder, `(cells, genes)`, or None: in memory, or read when rows are asked for.
        """


# What a processor learns from a source


def fit_processor(
    source: CellSource,
    template: "StateProcessor",
    trained: np.ndarray,
    genes: int | list[str] | None = None,
    normalize: str = Normalize.AUTO,
    target_sum: float | str | None = None,
    chosen_on: np.ndarray | None = None,
) -> "StateProcessor":
    """
    A processor that knows the values, the genes and the names of training cells.

    Args:
        source ([`CellSource`]): the cells.
        template ([`StateProcessor`]): how they are read, with any perturbation features.
        trained (`np.ndarray` of shape `(groups,)`): whether a group is trained on.
        genes, normalize, target_sum: see [`StateProcessor.fit`].
        chosen_on (`np.ndarray` of shape `(groups,)`, *optional*): the groups on whose cells highly variable genes are
            chosen; those that are trained on by default.

    Raises:
        KeyError, ValueError: see [`StateProcessor.fit`].
    """
    check_controls(source.groups[trained], template)
    settled = settle_values(source, template, trained, normalize, target_sum)
    names = training_names(source.groups[trained], settled, [])
    chosen = choose_genes(source, settled.target_sum, trained if chosen_on is None else chosen_on, genes)
    return settled.with_vocabulary(replace(names, genes=chosen), feature_dim=source.embedding_dim)


def check_contexts(contexts: list[str] | None, groups: pd.DataFrame):
    """ValueError if one of some contexts is not among the groups."""
    found = sorted(groups["context"].unique())
    for context in contexts or ():
        if context not in found:
            raise ValueError(f"contexts names {context!r}, which is not in the data; {closest(context, found)}")


def check_controls(groups: pd.DataFrame, template: "StateProcessor"):
    """ValueError if no group is of control cells."""
    names = set(groups["perturbation"])
    if template.control not in names:
        raise ValueError(
            f"no control cells: no cell has obs[{template.perturbation_key!r}] == {template.control!r}, found "
            f"{some(sorted(names))}; say which label marks the controls with control="
        )


def settle_values(
    source: CellSource,
    template: "StateProcessor",
    trained: np.ndarray,
    normalize: str = Normalize.AUTO,
    target_sum: float | str | None = None,
) -> "StateProcessor":
    """The template with what the values are and what is done to them; arguments and errors of [`fit_processor`]."""
    if normalize not in Normalize.OPTIONS:
        raise ValueError(f"normalize={normalize!r}; {closest(normalize, Normalize.OPTIONS)}")
    embedded, settings = source.embedding_dim is not None, {"values": Values.EMBEDDING}
    asked = source.normalize if normalize == Normalize.AUTO else normalize
    if source.expression is not None:
        settings["normalize"], values = resolve_normalisation(asked, source.kinds(), source.expression)
        if embedded and values == Values.COUNTS:
            raise ValueError(
                f"the gene decoder predicts log1p expression, {source.expression} holds counts: use normalize='auto'"
            )
        settings["values"] = Values.EMBEDDING if embedded else values
    elif normalize == Normalize.COUNTS_TO_LOG1P:
        raise ValueError(
            f"normalize='counts_to_log1p' is for counts; input={template.input!r} is an embedding: use 'none'"
        )
    if target_sum is not None:
        settings["target_sum"] = resolve_target_sum(
            target_sum,
            settings.get("normalize", Normalize.NONE),
            source.expression or template.input,
            lambda: source.totals(trained),
        )
    elif source.target_sum is not None:
        settings["target_sum"] = source.target_sum
    return template.with_vocabulary(template.vocabulary, feature_dim=None, **settings)


def choose_genes(
    source: CellSource, target_sum: float | None, wanted: np.ndarray, genes: int | list[str] | None
) -> list[str]:
    """
    The genes of a model: a number of highly variable ones, the ones listed, or all that the source has.

    Args:
        target_sum (`float`, *optional*): what counts are scaled to.
        wanted (`np.ndarray` of shape `(groups,)`): the groups whose cells highly variable genes are chosen on.

    Raises:
        KeyError, ValueError: the source lacks listed genes, or has fewer than the number asked for.
    """
    if genes is None or source.expression is None:
        return source.genes
    if isinstance(genes, str):
        raise ValueError(f"genes={genes!r}: expected a number of highly variable genes, or a list of gene names")
    if not isinstance(genes, (int, np.integer)):
        return listed_genes(genes, pd.Index(source.genes))
    if not 1 <= genes <= len(source.genes):
        raise ValueError(f"genes={genes}: expected between 1 and the {len(source.genes)} genes that the data have")
    if genes == len(source.genes):
        return source.genes

    def read_log1p(read: Callable[[], Block]) -> sp.csr_matrix:
        return read().log1p(target_sum)

    with source.blocks(wanted) as blocks:
        return variable_genes([(cells, partial(read_log1p, read)) for cells, read in blocks], source.genes, int(genes))


def training_names(groups: pd.DataFrame, reader: "StateProcessor", genes: list[str]) -> Vocabulary:
    """
    The names of groups that are trained on, sorted, and the given genes.

    Raises:
        ValueError: the reader has perturbation features, and a perturbation has no vector.
    """
    singles = sorted({part for name in groups["perturbation"].unique() for part in reader.split_combination(name)})
    if reader.perturbation_features is not None:
        reader.perturbation_features.check_covers(singles, "of the training cells")
    batches = sorted(groups["batch"].unique()) if "batch" in groups else []
    return Vocabulary(genes, singles, sorted(groups["context"].unique()), batches)


def further_processor(source: CellSource, processor: "StateProcessor", trained: np.ndarray) -> "StateProcessor":
    """
    The processor of a checkpoint whose model is trained further on a source: it also knows the names of the training
    cells, which come after its own.

    Raises:
        KeyError: the source lacks genes of the processor.
        ValueError: the source does not hold what the processor reads.
    """
    if processor.values == Values.EMBEDDING and source.embedding_dim != processor.feature_dim:
        found = "none" if source.embedding_dim is None else f"one of {source.embedding_dim}"
        raise ValueError(
            f"the checkpoint reads an embedding of {processor.feature_dim} dimensions, the data hold {found}"
        )
    if processor.vocabulary.genes:
        if source.expression is None:
            raise ValueError("the checkpoint reads expression, the data hold only an embedding")
        for kind in source.kinds() - {processor.expects, Values.ZEROS}:
            raise ValueError(wrong_kind(source.expression, processor.expects, kind, processor.target_sum))
        listed_genes(processor.vocabulary.genes, pd.Index(source.genes))
    return processor.with_vocabulary(
        processor.vocabulary.merged(training_names(source.groups[trained], processor, []))
    )


# Cells of AnnData objects and of files


@dataclass
class Part:
    """
    An AnnData whose cells belong to a source.

    Args:
        dataset (`str`): its dataset.
        data (`AnnData`): the cells.
        var_names (`pandas.Index`): its genes.
        codes (`np.ndarray` of shape `(cells,)`): number of the group of each of its cells; -1 for one left out.
    """

    dataset: str
    data: Any = None
    var_names: pd.Index | None = None
    codes: np.ndarray | None = None

    @contextmanager
    def open(self) -> Iterator[ad.AnnData]:
        """The AnnData, or what reads a file like one. Errors within name the file."""
        yield self.data

    def obs(self, data: ad.AnnData, rows: slice, columns: list[str]) -> pd.DataFrame:
        """Some columns of obs of some cells of what `open` gave; all columns where one of them is missing."""
        return (data.obs[columns] if set(columns) <= set(data.obs) else data.obs).iloc[rows]

    @property
    def changed(self) -> str:
        """The first words of errors about data that changed while they were read."""
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
    """

    expression: str | None
    embedding: str | None
    kind: str | None
    genes: list[str]

    @property
    def matrices(self) -> list[str]:
        """The names of what is read, one or both."""
        return [name for name in (self.expression, self.embedding) if name is not None]


class PartReader:
    """Blocks of the cells of an open part, checked."""

    def __init__(self, data: ad.AnnData, part: Part, recipe: Recipe):
        self.data, self.part, self.recipe = data, part, recipe
        self._codes: np.ndarray = part.codes
        if len(self._codes) != data.n_obs:
            raise ValueError(f"{part.changed} changed while it was read: it had {len(self._codes)} cells, now {data.n_obs}")
        self._matrices = {name: matrix_of(data, name) for name in recipe.matrices}
        self._columns = data.var_names.get_indexer(recipe.genes)
        if (self._columns < 0).any():
            raise ValueError(f"{part.changed} changed while it was read: it lacks genes that it had")
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
            if kind_of_values(matrix) not in (kind, Values.ZEROS):
                error = wrong_kind(name, kind, kind_of_values(matrix), 1e4)
                raise ValueError(f"{error} (in cells {rows.start} to {rows.stop - 1})")
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
    The place of each cell where cells stand group by group, and those of a group in the order in which they come.

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
        reader ([`StateProcessor`]): reads the labels, and says where the cells' values lie.
        contexts (`list[str]`, *optional*): leave out the cells of all other contexts.

    Raises:
        KeyError: a column, layer or obsm entry is missing; what exists is listed.
        ValueError: a label is wrong, a context is not there, genes stand twice or are not shared, widths of embeddings
            differ, or there are no cells.
    """

    def __init__(self, parts: Sequence[Part], reader: "StateProcessor", contexts: list[str] | None = None):
        self.parts, self.reader = list(parts), reader
        embedded = reader.input.startswith("obsm/")
        if reader.gene_input is not None and not embedded:
            raise ValueError(
                f"gene_input={reader.gene_input!r} feeds the gene decoder of a model on embeddings; input="
                f"{reader.input!r} is expression itself: leave gene_input out"
            )
        self.expression = reader.gene_input if embedded else reader.input
        self._embedding = reader.input if embedded else None
        self._kinds: set[str] | None = None
        self._read_labels(contexts)
        self.embedding_dim = self._width()
        self.genes = self._shared_genes()

    # Groups

    def _read_labels(self, contexts: list[str] | None):
        reader = self.reader
        keys = [name for name in GROUP_KEYS if name != "batch" or reader.batch_key is not None]
        numbers: dict[tuple, int] = {}
        for part in self.parts:
            with part.open() as data:
                part.var_names, part.codes = data.var_names, np.empty(data.n_obs, dtype=np.int32)
                for start in range(0, data.n_obs, LABELS_OF_BLOCK):
                    rows = slice(start, min(start + LABELS_OF_BLOCK, data.n_obs))
                    labels = reader.labels_of(part.obs(data, rows, reader.label_columns))
                    labels = labels.assign(dataset=part.dataset).reset_index(drop=True)
                    grouped = labels.groupby(keys, sort=False, observed=True)
                    names = [tuple(name) for name in grouped.size().index]
                    of_block = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int32)
                    part.codes[rows] = of_block[grouped.ngroup().to_numpy()] if len(names) else -1
        groups = pd.DataFrame(list(numbers), columns=keys, dtype=object)
        check_contexts(contexts, groups)
        order = groups.sort_values(keys, kind="stable").index.to_numpy()
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order))
        self._renumber(rank)
        self.groups = groups.iloc[order].reset_index(drop=True)
        used = np.ones(len(groups), dtype=bool) if contexts is None else self.groups["context"].isin(contexts).to_numpy()
        self._renumber(np.where(used, np.arange(len(groups)), -1))
        self.drop_empty()

    def _renumber(self, number: np.ndarray):
        """Give each group another number; -1 leaves its cells out."""
        for part in self.parts:
            codes: np.ndarray = part.codes
            if len(number):
                part.codes = np.where(codes >= 0, number[codes], -1).astype(np.int32)

    def drop_empty(self):
        """Drop the groups that have no cells (any more), and find the rows of the others. ValueError if none is left."""
        keys = [name for name in GROUP_KEYS if name in self.groups]
        sizes = np.sum([np.bincount(part.codes[part.codes >= 0], minlength=len(self.groups)) for part in self.parts], axis=0)
        if not sizes.any():
            raise ValueError("the files hold no cells, and so no control cells")
        self._renumber(np.where(sizes > 0, np.cumsum(sizes > 0) - 1, -1))
        self.parts = [part for part in self.parts if (part.codes >= 0).any()]
        self.groups = with_rows(self.groups.loc[sizes > 0, keys].reset_index(drop=True), sizes[sizes > 0])

    @property
    def sizes(self) -> np.ndarray:
        """Cells of each group."""
        return (self.groups["stop"] - self.groups["start"]).to_numpy()

    # Values

    def _width(self) -> int | None:
        if self._embedding is None:
            return None
        widths = set()
        for part in self.parts:
            with part.open() as data:
                widths.add(matrix_of(data, self._embedding).shape[1])
        if len(widths) > 1:
            raise ValueError(f"{self._embedding}: expected one width in all files, found {sorted(widths)}")
        return widths.pop()

    def _shared_genes(self) -> list[str]:
        if self.expression is None:
            return []
        for part in self.parts:
            with part.open() as data:
                shared_genes([data])  # an error about one file names it
        return [str(gene) for gene in shared_genes(self.parts)]

    def kinds(self) -> set[str]:
        if self._kinds is None:
            self._kinds = set()
            for part in self.parts if self.expression is not None else ():
                with part.open() as data:
                    taken = np.flatnonzero(part.codes >= 0)[:_FIRST_CELLS]
                    rows = slice(0, _FIRST_CELLS) if len(taken) == _FIRST_CELLS == taken[-1] + 1 else taken
                    self._kinds.add(kind_of_values(take_rows(matrix_of(data, given("expression", self.expression)), rows)))
        return self._kinds

    def recipe(self, genes: list[str] | None = None) -> Recipe:
        """What is read of each part, with these genes; by default those of the source."""
        kinds = self.kinds() - {Values.ZEROS}
        kind = Values.COUNTS if kinds == {Values.COUNTS} else Values.LOG1P
        if genes is None or self.expression is None:
            genes = self.genes
        return Recipe(self.expression, self._embedding, kind if self.expression else None, genes)

    @contextmanager
    def blocks(self, wanted: np.ndarray | None = None, genes: list[str] | None = None) -> Iterator[list[LazyBlock]]:
        recipe = self.recipe(genes)
        with ExitStack() as stack:
            found = []
            for part in self.parts:
                # One part may be wanted as a whole and another one not at all; only the former are opened.
                if wanted is None or wanted[part.codes[part.codes >= 0]].any():
                    reading = PartReader(stack.enter_context(part.open()), part, recipe)
                    found += [(cells, partial(self._read, reading, rows, wanted)) for cells, rows in reading.counts(wanted)]
            yield found

    def _read(self, reading: PartReader, rows: slice, wanted: np.ndarray | None) -> Block:
        block = reading.read(rows, wanted)
        self._tell(rows.stop - rows.start)
        return block

    def features(self, processor: "StateProcessor") -> tuple[np.ndarray, np.ndarray | None]:
        cells, decoded = int(self.groups["stop"].iloc[-1]), processor.gene_input is not None
        features = np.empty((cells, processor.feature_dim), dtype=np.float32)
        genes = np.empty((cells, len(processor.vocabulary.genes)), dtype=np.float32) if decoded else None
        places = Places(self.sizes)
        for _, block in self.read_parts(self.recipe(processor.vocabulary.genes)):
            rows = places.take(block.codes)
            features[rows] = processor.features_of(block)
            if genes is not None:
                genes[rows] = block.log1p(processor.target_sum).toarray()
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


def with_rows(groups: pd.DataFrame, sizes: np.ndarray) -> pd.DataFrame:
    """The table of groups that follow one another, with the rows of each."""
    stops = np.cumsum(sizes, dtype=np.int64)
    return groups.assign(start=stops - sizes, stop=stops)
