"""Cells of a stream, block by block: labels and values, checked, and what a model reads of them."""

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from pertstate.base.cell_values import TARGET_SUM, cell_totals, fits, kind_of_values, normalize_counts, wrong_kind
from pertstate.base.constants import Values
from pertstate.base.finite import are_finite, check_totals, wrong
from pertstate.base.messages import counted, given, some
from pertstate.data.cell_pool import CellRows
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from pertstate.data.stream_reading import CellStream


class CellKey(NamedTuple):
    """The labels of a cell."""

    dataset: str
    context: str
    perturbation: str
    batch: str | None


class CellBlock:
    """
    Some consecutive rows of a stream.

    Args:
        source ([`CellStream`]): where they come from.
        table (`pyarrow.Table`): the rows.
        shard, first_row (`int`): where they stand, for errors.
        mine (`np.ndarray`): those of them that belong to this reader.
    """

    def __init__(self, source: "CellStream", table: pa.Table, shard: int, first_row: int, mine: np.ndarray):
        self.source, self.table, self.shard, self.first_row, self.mine = source, table, shard, first_row, mine
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.table)

    def _column(self, field: str) -> str:
        name = getattr(self.source.columns, field)
        if name is None:
            raise ValueError(f"the stream has no column for this; name it with {field}=")
        return name

    def where(self, row: int) -> str:
        """A row in words."""
        return f"shard {self.shard} of {self.source.num_shards} (from 0), row {self.first_row + int(row)}"

    def groups(self) -> list[tuple[CellKey, np.ndarray]]:
        """
        The labels of the cells, each with the rows of this reader that have them, in the order of the stream. Cells that are
        left out are in none.
        """
        code, kept = np.zeros(len(self), dtype=np.int64), np.ones(len(self), dtype=bool)
        names = {}
        for field in CellKey._fields:
            if getattr(self.source.columns, field) is None and field not in self._canonical:
                continue
            codes, names[field] = self._codes(field)
            kept &= codes >= 0
            code = code * len(names[field]) + codes
        mine = self.mine[kept[self.mine]]
        present, inverse = np.unique(code[mine], return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(np.bincount(inverse, minlength=len(present)))
        found = []
        for number, rows in zip(present.tolist(), np.split(mine[order], ends[:-1])):
            labels = {"dataset": self.source.name}
            for field in reversed(names):
                number, label = divmod(number, len(names[field]))
                labels[field] = names[field][label]
            key = CellKey(labels["dataset"], labels["context"], labels["perturbation"], labels.get("batch"))
            found.append((key, rows))
        return found

    @cached_property
    def _canonical(self) -> pd.DataFrame:
        """The labels of all cells as the source's reader reads them, None in those that are left out; no column without one."""
        reader = self.source.label_reader
        if reader is None:
            return pd.DataFrame(index=range(len(self)))
        shard = f"shard {self.shard} of {self.source.num_shards} (from 0)"
        rows = [f"{shard}, row {row}" for row in range(self.first_row, self.first_row + len(self))]
        filters = {*(reader.settings.exclude or ()), *(reader.settings.include or ())}
        drop = reader.settings.unlabelled == "drop"
        read = {
            name: self._plain(name, drop or name in filters | {reader.settings.dose_key}) for name in reader.columns
        }
        return reader.read(pd.DataFrame(read, index=pd.Index(rows, dtype=object)), self.source.name)

    def _plain(self, column: str, may_lack: bool):
        """A column as pandas has it; of text or whole numbers, each of them once."""
        array = self.table.column(column)
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
        simple = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
        if may_lack or not simple:
            return array.to_pandas().to_numpy()
        codes, names = self._labels(column)
        return pd.Categorical.from_codes(codes, names)

    def _codes(self, field: str) -> tuple[np.ndarray, list[str]]:
        """The label of each cell as its place among the names that follow; -1 for cells that are left out."""
        if field in self._canonical:
            codes, names = pd.factorize(self._canonical[field])
            return codes.astype(np.int64), names.tolist()
        return self._labels(self._column(field))

    def _labels(self, column: str) -> tuple[np.ndarray, list[str]]:
        array = self.table.column(column)
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            if not pa.types.is_integer(array.type):
                raise ValueError(f"column {column!r}: expected text or whole numbers, found {array.type}")
            array = array.cast(pa.string())
        if array.null_count:
            first = np.flatnonzero(pc.is_null(array).to_numpy())[0]
            raise ValueError(
                f"column {column!r} is empty in {counted(array.null_count, 'cell')}, first in {self.where(first)}"
            )
        encoded = array.combine_chunks().dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
        blank = [i for i, name in enumerate(names) if not name.strip()]
        if blank:
            first = np.flatnonzero(np.isin(codes, blank))[0]
            raise ValueError(f"column {column!r} is blank in {self.where(first)}")
        return codes, names

    def batches(self, rows: np.ndarray, names: list[str]) -> np.ndarray:
        """For each of some cells, the place of its batch among `names`; new names are added at the end."""
        codes, found = self._codes("batch")
        places = {name: i for i, name in enumerate(names)}
        for name in (found[code] for code in np.unique(codes[rows])):
            if name not in places:
                places[name] = len(names)
                names.append(name)
        return np.array([places.get(name, -1) for name in found], dtype=np.int64)[codes[rows]]

    def totals(self, rows: np.ndarray) -> np.ndarray:
        """The column of total counts of some cells, float64."""
        column = self._column("total")
        array = self.table.column(column)
        if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            raise ValueError(f"column {column!r} near {self.where(0)}: expected a number in each cell, no nulls")
        return array.to_numpy().astype(np.float64)[rows]

    def embedding(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of some cells, `(cells, dimensions)` float32.

        Raises:
            ValueError: widths differ between cells, or a value is NaN or infinite.
        """
        column = self._column("embedding")
        values, lengths = self._some_lists(column, rows)
        if len(np.unique(lengths)) > 1:
            first = rows[np.flatnonzero(lengths != lengths[0])[0]]
            raise ValueError(f"column {column!r}: embeddings differ in width, first in {self.where(first)}")
        self._check_finite(column, values, lengths, rows)
        return values.reshape(len(rows), -1).astype(np.float32)

    def expression(self, rows: np.ndarray) -> sp.csr_matrix:
        """Values of some cells as they are in the stream, over all of its genes: CSR `(cells, genes)`.

        Raises:
            ValueError: lists of different lengths, an unknown or repeated gene, a value that is NaN, infinite or
                negative, a marker that is missing or was not announced.
        """
        of_ids, of_values, marker = self._column("gene_ids"), self._column("gene_values"), self.source.columns.marker
        genes, table = self.source.gene_table
        ids, lengths = self._some_lists(of_ids, rows)
        values, found = self._some_lists(of_values, rows)
        if not np.array_equal(lengths, found):
            at = np.flatnonzero(lengths != found)[0]
            raise ValueError(
                f"{self.where(rows[at])}: {lengths[at]} entries in {of_ids!r} and {found[at]} in "
                f"{of_values!r}; expected a value for each gene"
            )
        if ids.dtype.kind not in "iu":
            raise ValueError(f"column {of_ids!r}: expected lists of whole numbers, found {ids.dtype}")
        if marker is not None:
            ids, values, lengths = self._without_marker(marker, ids, values, lengths, rows)
        self._check_finite(of_values, values, lengths, rows, nonnegative=True)
        known = (ids >= 0) & (ids < len(table))
        genes_of = table[np.where(known, ids, 0)]
        known &= genes_of >= 0
        cell = np.repeat(np.arange(len(rows)), lengths)
        if not known.all():
            first = np.flatnonzero(~known)[0]
            raise ValueError(
                f"column {of_ids!r} holds ids of no known gene: {some(np.unique(ids[~known]))}, first in "
                f"{self.where(rows[cell[first]])}; give the names of all genes of the stream"
                + (", or announce a first entry that is no gene with marker=" if marker is None else "")
            )
        keys = cell * len(genes) + genes_of
        if not (np.diff(keys) > 0).all():
            ordered = np.sort(keys)
            twice = ordered[1:][np.diff(ordered) == 0]
            if len(twice):
                row, gene = divmod(int(twice[0]), len(genes))
                raise ValueError(
                    f"gene {genes[gene]!r} stands twice in {self.where(rows[row])}; expected one value for each gene"
                )
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return sp.csr_matrix((values, genes_of, indptr), shape=(len(rows), len(genes)))

    def _without_marker(self, marker: float, ids, values, lengths, rows):
        firsts = np.cumsum(lengths) - lengths
        there = lengths > 0
        there[there] = values[firsts[there]] == marker
        if not there.all():
            raise ValueError(
                f"{self.where(rows[np.flatnonzero(~there)[0]])}: expected the marker {marker:g} as first entry of "
                f"{self.source.columns.gene_values!r}, found none; set marker=None where there is none"
            )
        keep = np.ones(len(values), dtype=bool)
        keep[firsts] = False
        return ids[keep], values[keep], lengths - 1

    def _check_finite(self, column: str, values, lengths, rows, nonnegative: bool = False):
        if values.size == 0 or values.dtype.kind == "u":
            return
        if are_finite(values) and not (nonnegative and values.min() < 0):
            return
        bad = np.flatnonzero(wrong(values) | (values < 0 if nonnegative else False))
        cell = rows[np.searchsorted(np.cumsum(lengths), bad[0], side="right")]
        expected = "finite and non-negative expression" if nonnegative else "finite values"
        raise ValueError(
            f"column {column!r} holds {values[bad[0]]} in {self.where(cell)} ({len(bad)} such values in the block); "
            f"expected {expected}"
            + (" (a first entry that is no gene is announced with marker=)" if np.isfinite(values[bad[0]]) else "")
        )

    def _some_lists(self, column: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries of some lists, one after the other, and how many each list has. All rows come without a copy."""
        if column not in self._lists:
            self._lists[column] = self._list_column(column)
        offsets, values = self._lists[column]
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return values, np.diff(offsets)
        lengths = offsets[rows + 1] - offsets[rows]
        before = np.cumsum(lengths) - lengths
        return values[np.repeat(offsets[rows] - before, lengths) + np.arange(lengths.sum())], lengths

    def _list_column(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        array = self.table.column(column).combine_chunks()
        kind = array.type
        fixed = pa.types.is_fixed_size_list(kind)
        if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise ValueError(f"column {column!r}: expected a list of numbers in each cell, found {kind}")
        number = kind.value_type
        if not (pa.types.is_integer(number) or pa.types.is_floating(number)):
            raise ValueError(f"column {column!r}: expected lists of numbers, found lists of {number}")
        if array.null_count:
            first = np.flatnonzero(pc.is_null(array).to_numpy(zero_copy_only=False))[0]
            raise ValueError(
                f"column {column!r} is empty in {counted(array.null_count, 'cell')}, first in {self.where(first)}"
            )
        if fixed:
            offsets, values = np.arange(len(array) + 1) * kind.list_size, array.flatten()
        else:
            offsets = array.offsets.to_numpy().astype(np.int64)
            values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
            offsets = offsets - offsets[0]
        if values.null_count:
            first = np.flatnonzero(pc.is_null(values).to_numpy(zero_copy_only=False))[0]
            cell = np.searchsorted(offsets, first, side="right") - 1
            raise ValueError(f"column {column!r} has an empty entry in {self.where(cell)}; expected numbers")
        return offsets, values.to_numpy()


class CellReader:
    """
    Cells of a stream as they stand in it, checked, with the genes that are wanted.

    Args:
        source ([`CellStream`]): the stream.
        embedded (`bool`): read the embedding.
        genes (`list[str]`, *optional*): read the expression of these genes; none where None.
        batch_names (`list[str]`, *optional*): also read the batch of each cell, as its place in this list. New names are
            added to the list.

    Attributes:
        kinds (`dict[str, str]`): the kinds of values that the expression read so far had ([`Values`]), each with the place
            where it was found first.

    Raises:
        KeyError: the genes are not in the stream.
        ValueError: the stream has no column for what is read.
    """

    def __init__(
        self, source: "CellStream", embedded: bool, genes: list[str] | None, batch_names: list[str] | None = None
    ):
        self.source, self.embedded, self.batch_names = source, embedded, batch_names
        self.genes = genes
        self.kinds: dict[str, str] = {}
        if embedded and source.columns.embedding is None:
            raise ValueError("an embedding is read; name its column with embedding=")
        if genes is not None:
            names = pd.Index(source.gene_table[0])
            places = names.get_indexer(genes)
            missing = [gene for gene, place in zip(genes, places) if place < 0]
            if missing:
                raise KeyError(
                    f"{len(missing)} of the model's {len(places)} genes are missing from the stream: {missing[:10]} (the "
                    f"stream's genes look like {some(names, 3)})"
                )
            self._columns = np.full(len(names), -1, dtype=np.int32)
            self._columns[places] = np.arange(len(places), dtype=np.int32)

    def read(self, block: CellBlock, rows: np.ndarray) -> CellRows:
        """Some cells of a block: the embedding as features, or else the expression; beside the former, genes."""
        expression = totals = None
        if self.genes is not None:
            expression, totals = self._expression(block, rows)
        batches = None if self.batch_names is None else block.batches(rows, self.batch_names)
        if self.embedded:
            return CellRows(block.embedding(rows), expression, batches, totals)
        return CellRows(expression, None, batches, totals)

    def _expression(self, block: CellBlock, rows: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
        column = self.source.columns.total
        matrix = block.expression(rows)
        kind = kind_of_values(matrix)
        self.kinds.setdefault(kind, f"column {self.source.columns.gene_values!r} near {block.where(rows[0])}")
        # The library is that of the whole cell, so it is summed before genes are left out.
        sums = totals = cell_totals(matrix)
        if column is not None and kind != Values.LOG1P:
            totals = block.totals(rows)
            # Sums of counts are exact; a total that was itself stored in single precision is not.
            short = ~(totals >= sums * (1 - 1e-6)) | ~np.isfinite(totals)
            if short.any():
                at = np.flatnonzero(short)[0]
                raise ValueError(
                    f"column {column!r} holds {totals[at]:g} in {block.where(rows[at])}, whose genes sum to "
                    f"{sums[at]:g}; expected the counts of the whole cell"
                )
        if kind != Values.LOG1P:
            check_totals(totals, f"column {self.source.columns.gene_values!r}", lambda at: block.where(rows[at]))
        places = self._columns[matrix.indices]
        kept = places >= 0
        before = np.concatenate([[0], np.cumsum(kept)])
        shape = (len(rows), len(self.genes or ()))
        return sp.csr_matrix((matrix.data[kept], places[kept], before[matrix.indptr]), shape=shape), totals


class FeatureReader:
    """
    Cells of a stream as a processor wants them: its genes in its order, normalised as it does.

    Args:
        source ([`CellStream`]): the stream.
        processor ([`StateProcessor`]): what the model reads.

    Raises:
        KeyError, ValueError: see [`CellReader`].
    """

    def __init__(self, source: "CellStream", processor: StateProcessor):
        if processor.batch_key is not None and source.columns.batch is None:
            raise ValueError(f"the processor has batches ({processor.batch_key!r}); name the column with batch=")
        embedded, decoded = processor.values == Values.EMBEDDING, processor.gene_input is not None
        genes = processor.vocabulary.genes if decoded or not embedded else None
        self.processor, self._cells = processor, CellReader(source, embedded, genes)

    def read(self, block: CellBlock, rows: np.ndarray) -> CellRows:
        """Some cells of a block, checked, in the model's units."""
        cells = self._cells.read(block, rows)
        processor, columns = self.processor, self._cells.source.columns
        for kind, where in self._cells.kinds.items():
            if not fits(processor.expects, kind):
                raise ValueError(wrong_kind(where, processor.expects, kind, processor.trained_total))
        if processor.values == Values.EMBEDDING and len(rows) and cells.features.shape[1] != processor.feature_dim:
            raise ValueError(
                f"column {columns.embedding!r}: expected {processor.feature_dim} dimensions, found "
                f"{cells.features.shape[1]} in {block.where(rows[0])}"
            )
        return in_units_of(processor, cells)


def in_units_of(processor: StateProcessor, cells: CellRows) -> CellRows:
    """Cells as they stand in the data, with the model's genes, turned into what the model reads."""

    def expression(matrix: sp.csr_matrix, as_log1p: bool) -> sp.csr_matrix:
        if as_log1p and processor.expects in Values.RAW:
            # None says that predictions are not scaled; it says nothing of the cells.
            target_sum = TARGET_SUM if processor.target_sum is None else processor.target_sum
            data = normalize_counts(matrix.data, given("totals", cells.totals), target_sum, np.diff(matrix.indptr))
        else:
            data = matrix.data.astype(np.float32)
        return sp.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)

    if processor.values == Values.EMBEDDING:
        genes = None if cells.genes is None else expression(cells.genes, as_log1p=True)
        return CellRows(cells.features, genes, cells.batches)
    return CellRows(expression(cells.features, processor.values == Values.LOG1P), None, cells.batches)
