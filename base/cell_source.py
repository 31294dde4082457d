"""One source of cells, wherever they lie, and what a processor learns from it: values, genes and names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from .cell_values import (
    fits,
    listed_genes,
    normalize_counts,
    resolve_normalisation,
    resolve_target_sum,
    variable_genes,
    wrong_kind,
)
from .constants import Normalize, Values
from .doses import DoseScale
from .labels import suggested_controls
from .messages import closest, given, some
from .value_scale import Scale, differ, other_scale
from .vocabulary import Vocabulary


if TYPE_CHECKING:
    # The processor is fitted by this module, and imports it.
    from ..processing import StateProcessor


GROUP_KEYS = ("dataset", "context", "perturbation", "batch")


@dataclass
class Block:
    """
    Some cells.

    Args:
        rows (`np.ndarray`): their rows in the data that they come from.
        codes (`np.ndarray`): their groups.
        expression (`scipy.sparse.csr_matrix`, *optional*): `(cells, genes)`, as stored there.
        totals (`np.ndarray`, *optional*): if the expression is counts, each cell's sum over all its genes, float64.
        embedding (`np.ndarray`, *optional*): `(cells, dimensions)` float32.
    """

    rows: np.ndarray
    codes: np.ndarray
    expression: sp.csr_matrix | None
    totals: np.ndarray | None
    embedding: np.ndarray | None

    def pieces(self, values: int = 1 << 22) -> "Iterator[Block]":
        """The same cells in order, in pieces of about `values` values each when dense."""
        width = 1 if self.expression is None else max(1, self.expression.shape[1])
        step = max(1, values // width)
        parts = (self.rows, self.codes, self.expression, self.totals, self.embedding)
        for start in range(0, len(self.rows), step):
            taken: list[Any] = [None if part is None else part[start : start + step] for part in parts]
            yield Block(*taken)

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
        normalize (`str`), target_sum (`float`, *optional*): what is done to the values if a run sets neither.
        scaled (`bool`): whether expression that is neither counts nor log1p is scaled and then log1p-transformed.
        convert_scale (`bool`, *optional*): whether log1p values of another total are converted; None where the source cannot.
        wanted_scale ([`Scale`], *optional*): what they are then converted to; to the first of the source by default.
        progress (`Callable[[int], Any]`, *optional*): called after each block with the number of cells that were read.
        notes (`list[str]`): what was left out, in sentences.
    """

    reader: "StateProcessor"
    groups: pd.DataFrame
    genes: list[str]
    expression: str | None
    embedding_dim: int | None
    normalize: str = Normalize.AUTO
    target_sum: float | None = None
    progress: Callable[[int], Any] | None = None
    scaled: bool = True
    convert_scale: bool | None = None
    wanted_scale: Scale | None = None
    notes: list[str] = []

    @abstractmethod
    def kinds(self) -> set[str]:
        """What kinds of values the expression holds, see [`Values`]."""

    @abstractmethod
    def scale(self) -> Scale | None:
        """What the expression is, if there is any. ValueError where parts of the data differ."""

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
        """The total counts of each cell of the wanted groups, float64."""
        found = [np.empty(0)]
        with self.blocks(wanted) as blocks:
            found += [given("counts", read().totals) for _, read in blocks]
        return np.concatenate(found)


class Room:
    """
    Memory for the features of cells: of this process, which fills all of it.

    Attributes:
        part, parts (`int`): this process fills one of so many parts.
    """

    part, parts = 0, 1

    def empty(self, shape: tuple[int, int]) -> np.ndarray:
        """An array of float32 whose values are yet to be written."""
        return np.empty(shape, dtype=np.float32)

    def wait(self):
        """Until all parts are filled."""


ROOM = Room()


class WholeSource(CellSource):
    """A source whose cells can all be had at any time, unlike those of a stream."""

    @abstractmethod
    def features(self, processor: "StateProcessor", room: Room = ROOM) -> tuple[Any, Any]:
        """
        A model's features of all cells, group by group, `(cells, feature_dim)` float32, and the target of its gene
        decoder, `(cells, genes)`, or None: in memory, or read when rows are asked for.

        Args:
            room ([`Room`]): the memory that they are put into.
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
    doses = training_doses(source.groups[trained], settled)
    return settled.with_vocabulary(replace(names, genes=chosen), feature_dim=source.embedding_dim, doses=doses)


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
        suggested = suggested_controls(sorted(names))
        hint = "" if suggested is None else f"{suggested!r}"
        raise ValueError(
            f"no control cells: no cell has obs[{template.perturbation_key!r}] == "
            f"{template.control_labels or template.control!r}, found {some(sorted(names))}; say which label marks the controls "
            f"with control={hint}"
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
    embedded = source.embedding_dim is not None
    settings: dict[str, Any] = {"values": Values.EMBEDDING}
    asked = source.normalize if normalize == Normalize.AUTO else normalize
    if source.expression is not None:
        settings["normalize"], values = resolve_normalisation(asked, source.kinds(), source.expression)
        source.scaled = settings["normalize"] == Normalize.COUNTS_TO_LOG1P
        scale = source.scale()
        if scale is not None:
            settings["scale"] = scale.for_checkpoint()
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


def training_doses(groups: pd.DataFrame, reader: "StateProcessor") -> dict[str, list[float]] | None:
    """The doses of each perturbation of groups that are trained on, and those that the reader knows; None without doses."""
    if reader.dose_key is None:
        return None
    found = {name: set(doses) for name, doses in (reader.doses or {}).items()}
    for name in groups["perturbation"].unique():
        for part, dose in reader.label_reader.parts(name):
            found.setdefault(part, set()).add(given("a dose", dose))
    return {name: sorted(doses) for name, doses in sorted(found.items())}


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
            f"the checkpoint reads an embedding of {processor.feature_dim} dimensions, the data hold {found}; name the "
            "embedding that it was trained on with input="
        )
    if processor.vocabulary.genes:
        if source.expression is None:
            raise ValueError(
                "the checkpoint reads expression, the data hold only an embedding; name the expression with input= (or "
                "gene_input=)"
            )
        for kind in source.kinds():
            if not fits(processor.expects, kind):
                raise ValueError(wrong_kind(source.expression, processor.expects, kind, processor.trained_total))
        source.scaled = processor.normalize == Normalize.COUNTS_TO_LOG1P
        if source.convert_scale:
            source.wanted_scale = processor.trained_scale
        scale = source.scale()
        if scale is not None and processor.trained_scale is not None and differ(processor.trained_scale, scale):
            advice = "" if source.convert_scale is None else ", or convert them with convert_scale: true"
            raise ValueError(other_scale(processor.trained_scale, scale, source.expression, advice))
        listed_genes(processor.vocabulary.genes, pd.Index(source.genes))
    names = processor.vocabulary.merged(training_names(source.groups[trained], processor, []))
    doses = training_doses(source.groups[trained], processor)
    span = DoseScale(trained=processor.doses or {}, span=processor.dose_span).span
    if doses is not None and DoseScale(trained=doses).span == span:
        span = None  # the trained doses give the same one
    return processor.with_vocabulary(
        names, batch_datasets=source.reader.batch_datasets, doses=doses, dose_span=span if doses is not None else None
    )


def with_rows(groups: pd.DataFrame, sizes: np.ndarray) -> pd.DataFrame:
    """The table of groups that follow one another, with the rows of each."""
    stops = np.cumsum(sizes, dtype=np.int64)
    return groups.assign(start=stops - sizes, stop=stops)
