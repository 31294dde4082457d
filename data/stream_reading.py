"""A streamed dataset whose rows are cells: what its columns mean, and its rows in Arrow batches."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from pertstate.base.bounded_text import load_json
from pertstate.base.labels import LabelReader
from pertstate.base.messages import closest, some
from pertstate.base.tables import read_csv
from pertstate.data.stream_blocks import CellBlock


_LARGEST_ID = 1 << 24  # the table from gene ids to genes has this many entries at most


class Position(NamedTuple):
    """Where a reader stands: the shards behind it, in its order; rows of the shard that it is in; rows in all."""

    shard: int = 0
    row: int = 0
    rows: int = 0


START = Position()


@dataclass(frozen=True)
class StreamColumns:
    """
    Which column of a stream holds what. A row is a cell.

    Args:
        perturbation (`str`): label of the cell.
        context, batch (`str` or `list[str]`, *optional*): labels, where the stream has them; of several columns, the values are
            joined with "|". A stream without a column of contexts needs the setting `context`.
        dataset (`str`, *optional*): which dataset a cell is of, in the stream of a store. Its labels are canonical already.
        dose (`str`, *optional*): the dose, a number or text.
        gene_ids (`str`, *optional*): list of the ids of the genes that the cell expresses.
        gene_values (`str`, *optional*): list of their values, counts or log1p expression, in the same order.
        total (`str`, *optional*): counts of the whole cell, for a stream whose lists leave some genes out.
        embedding (`str`, *optional*): list of the dimensions of the cell's embedding, of one width in all cells.
        marker (`float`, *optional*): value of the first entry of each list of values, where that entry is no gene; the
            entry is dropped from both lists.
        others (`list[str]`): further columns, by which cells are left out (`exclude`, `include`).

    Example:
    ```python
    >>> atlas = StreamColumns(
    ...     perturbation="drug",
    ...     context="cell_line_id",
    ...     batch="plate",
    ...     gene_ids="genes",
    ...     gene_values="expressions",
    ...     marker=-2.0,
    ... )
    >>> atlas.names
    ['drug', 'cell_line_id', 'plate', 'genes', 'expressions']
    ```

    Raises:
        ValueError: columns that belong together are not given together.
    """

    perturbation: str
    context: str | list[str] | None = None
    batch: str | list[str] | None = None
    dataset: str | None = None
    gene_ids: str | None = None
    gene_values: str | None = None
    total: str | None = None
    embedding: str | None = None
    marker: float | None = None
    dose: str | None = None
    others: list[str] = field(default_factory=list)

    def __post_init__(self):
        if (self.gene_ids is None) != (self.gene_values is None):
            raise ValueError(
                f"gene_ids={self.gene_ids!r} and gene_values={self.gene_values!r}: expected both columns or neither"
            )
        if self.gene_ids is None and self.embedding is None:
            raise ValueError("no values: name the columns gene_ids and gene_values, or embedding")
        if self.gene_ids is None and (self.total is not None or self.marker is not None):
            raise ValueError("total and marker belong to gene_ids and gene_values, which are not given")

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        labels = (self.dataset, self.perturbation, self.context, self.batch, self.dose, self.others)
        fields = (*labels, self.gene_ids, self.gene_values, self.total, self.embedding)
        return list(dict.fromkeys(name for of in fields for name in ([of] if isinstance(of, str) else of or ())))


def read_gene_names(path: str | os.PathLike, id_column: str = "id", name_column: str = "name") -> dict[int, str]:
    """
    Gene names by id from a file.

    Args:
        path (`str`): `.json` (a list of names, or ids to names), `.csv` or `.parquet` (two columns).
        id_column, name_column (`str`): those columns.

    Raises:
        FileNotFoundError, KeyError, ValueError: there is no such file or column, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()})")
    if path.suffix == ".json":
        content = load_json(path)
        if not isinstance(content, (list, dict)):
            raise ValueError(f"{path}: expected a list of gene names, or ids to names")
        pairs = list(enumerate(content)) if isinstance(content, list) else list(content.items())
    elif path.suffix in (".csv", ".parquet"):
        frame = read_csv(path) if path.suffix == ".csv" else pq.read_table(path).to_pandas()
        for column in (id_column, name_column):
            if column not in frame:
                raise KeyError(f"{path} has no column {column!r}; {closest(column, list(map(str, frame.columns)))}")
        pairs = list(zip(frame[id_column], frame[name_column]))
    else:
        raise ValueError(f"{path}: expected a .json, .csv or .parquet file of gene names")
    try:
        genes = {int(number): name for number, name in pairs}
    except ValueError as error:
        raise ValueError(f"{path}: gene ids should be whole numbers ({error})") from error
    if len(genes) < len(pairs) or not all(isinstance(name, str) for name in genes.values()):
        raise ValueError(f"{path}: expected one name for each gene id")
    return genes


class CellStream:
    """
    A stream of cells: a `datasets.IterableDataset` and what its columns mean.

    Nothing is written to disk. In memory are a block of cells, and what `datasets` reads at once: one row group of a
    parquet file, or the `batch_size` rows that `load_dataset` was given. Give the stream as `load_dataset(...,
    streaming=True)` returns it: sentences are shuffled later, and a run on a stream that was shuffled could not be
    continued, because the buffer of `shuffle` is hidden. With `load_dataset(..., columns=columns.names)` other columns
    are not read, and `stream.reshard()` makes every row group a shard of its own.

    Args:
        stream (`datasets.IterableDataset`): rows are cells.
        columns ([`StreamColumns`]): what the columns are.
        genes (`list[str]` or `dict[int, str]`, *optional*): gene names, by position or by id; needed with `gene_ids`.
        name (`str`): the dataset of cells, where no column says it.
        contexts (`list[str]`, *optional*): use only the cells of these contexts.
        block_size (`int`): cells that are worked on at once.

    Raises:
        TypeError: `stream` is not a streamed dataset.
        KeyError: a column is not there.
        ValueError: gene names are missing, or stand twice.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        columns: StreamColumns,
        genes: "list[str] | dict[int, str] | None" = None,
        name: str = "stream",
        contexts: list[str] | None = None,
        block_size: int = 1024,
    ):
        if not isinstance(stream, datasets.IterableDataset):
            raise TypeError(
                f"expected a datasets.IterableDataset, found {type(stream).__name__}; "
                "use load_dataset(..., split=..., streaming=True)"
            )
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: expected at least 1 cell")
        if (genes is None) != (columns.gene_ids is None):
            raise ValueError("genes: expected the names behind gene_ids, and none where there is no such column")
        for column in columns.names:
            if stream.column_names is not None and column not in stream.column_names:
                raise KeyError(f"the stream has no column {column!r}; {closest(column, stream.column_names)}")
        self.columns, self.name, self.block_size = columns, name, block_size
        self.label_reader: LabelReader | None = None
        self.contexts = None if contexts is None else list(contexts)
        self._tables = stream.select_columns(columns.names).with_format("arrow")
        self.num_shards = stream.num_shards
        self._gene_table = None if genes is None else _gene_table(genes)

    def read_labels_as(self, reader: LabelReader):
        """
        Read labels as a processor does, from the stream's own columns. Those of a store are canonical already.

        Raises:
            ValueError: the processor knows doses, and the stream has no column of them.
        """
        columns, settings = self.columns, reader.settings
        if columns.dataset is not None:
            return
        if settings.dose_key is not None and columns.dose is None:
            raise ValueError(f"the model knows doses ({settings.dose_key!r}); name the stream's column with dose=")
        own = replace(
            settings,
            perturbation_key=columns.perturbation,
            context_key=columns.context,
            context=settings.context if columns.context is None else None,
            batch_key=columns.batch,
            dose_key=columns.dose,
        )
        for key in [*(own.exclude or ()), *(own.include or ())]:
            if key not in columns.others:
                raise ValueError(f"exclude and include look at column {key!r}; name it in others=")
        self.label_reader = LabelReader(own, reader.whole)

    @property
    def genes(self) -> list[str] | None:
        """The names of its genes, where it has expression."""
        return None if self._gene_table is None else self._gene_table[0]

    @property
    def gene_table(self) -> tuple[list[str], np.ndarray]:
        """
        The names of its genes, and the place of each id among them (-1 for none).

        Raises:
            ValueError: the stream has no expression.
        """
        if self._gene_table is None:
            raise ValueError("the stream has no expression; name its columns with gene_ids= and gene_values=")
        return self._gene_table

    def uses(self, context: str) -> bool:
        """Whether cells of this context are used."""
        return self.contexts is None or context in self.contexts

    def blocks(
        self, order: np.ndarray | None = None, part: int = 0, parts: int = 1, start: Position = START
    ) -> Iterator[tuple[CellBlock, Position]]:
        """
        Blocks of cells, each with the position behind it, where reading goes on.

        Args:
            order (`np.ndarray`, *optional*): the shards in the order in which they are read.
            part, parts (`int`): read this one of so many disjoint parts, which together are the whole stream: every
                `parts`-th shard, or where there are fewer shards than parts, every `parts`-th cell.
            start ([`Position`]): go on from here. The shard of this position is read from its start, the shards before
                it are not read.
        """
        order = np.arange(self.num_shards) if order is None else np.asarray(order)
        by_shard = parts <= self.num_shards
        if by_shard:
            order = order[part::parts]
        rows = start.rows
        for number in range(start.shard, len(order)):
            shard = int(order[number])
            row = start.row if number == start.shard else 0
            tables = self._tables.shard(num_shards=self.num_shards, index=shard)
            # Not the state of `datasets`: some versions of it repeat rows after batches that span its own chunks.
            for table in (tables.skip(row) if row else tables).iter(batch_size=self.block_size):
                size = len(table)
                mine = np.arange(size) if by_shard else np.flatnonzero((rows + np.arange(size)) % parts == part)
                block = CellBlock(self, table, shard, row, mine)
                row, rows = row + size, rows + size
                yield block, Position(number, row, rows)


def _gene_table(genes: "list[str] | dict[int, str]") -> tuple[list[str], np.ndarray]:
    """Gene names, and the place of each id among them (-1 for none)."""
    by_id = genes if isinstance(genes, dict) else dict(enumerate(genes))
    ids = np.array(sorted(by_id), dtype=np.int64)
    if len(ids) == 0:
        raise ValueError("genes: expected the names of the stream's genes, found none")
    if ids[0] < 0 or ids[-1] >= _LARGEST_ID:
        raise ValueError(f"genes: expected ids from 0 to {_LARGEST_ID - 1}, found {ids[0]} to {ids[-1]}")
    names = [str(by_id[number]) for number in ids.tolist()]
    twice = pd.Index(names)
    twice = twice[twice.duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"gene names are not unique, found {some(twice)} twice; use names that are (Ensembl ids), or tell "
            "those apart"
        )
    table = np.full(ids[-1] + 1, -1, dtype=np.int32)
    table[ids] = np.arange(len(ids), dtype=np.int32)
    return names, table
