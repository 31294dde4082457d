"""A cell store: groups of cells in memory-mapped Arrow files, and a JSON file that describes them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from pertstate.base.cell_ids import cell_ids
from pertstate.base.cell_source import ROOM, Block, LazyBlock, Room, check_contexts
from pertstate.base.cell_values import count_scales, scaled_log1p
from pertstate.base.constants import Values
from pertstate.base.finite import are_finite, check_totals, wrong
from pertstate.base.messages import counted, given, some
from pertstate.base.value_scale import Scale
from pertstate.base.vocabulary import PerturbationFeatures
from pertstate.data.cells import Cells, load
from pertstate.data.manifest import (
    BARCODE,
    EMBEDDING,
    EXPRESSION,
    GENE_IDS,
    GENE_VALUES,
    OBS,
    STORE_FILE,
    TOTAL,
    Manifest,
    sha256_of,
)
from pertstate.data.source import NamedSource
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor


class CellStore:
    """
    Cells on disk, read through a memory map. Opening the store takes milliseconds, and only the cells that are asked for are read.

    Args:
        path (`str` or `Path`): folder that `pertstate prepare` wrote.

    Attributes:
        manifest ([`Manifest`]): what the store holds.
        groups (`pandas.DataFrame`): columns `dataset`, `context`, `perturbation`, `batch` (where there are batches),
            `start` and `stop`.

    Raises:
        FileNotFoundError, ValueError: it is not a whole store.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = Manifest.from_file(self.path / STORE_FILE)
        self._files = [self.path / shard["file"] for shard in self.manifest.shards]
        for file, shard in zip(self._files, self.manifest.shards):
            found = file.stat().st_size if file.is_file() else None
            if found != shard["bytes"]:
                raise ValueError(
                    f"{file}: expected {shard['bytes']:,} bytes, found {'no file' if found is None else f'{found:,}'}; "
                    "copy the store again, or prepare it again"
                )
        self.groups = self.manifest.group_table()

    @classmethod
    def of_files(cls, path: Path, manifest: Manifest, files: list[Path]) -> "CellStore":
        """A store whose cells lie in other Arrow files, such as `datasets` makes from parquet."""
        store = cls.__new__(cls)
        store.path, store.manifest, store._files, store.groups = path, manifest, files, manifest.group_table()
        return store

    def __len__(self) -> int:
        return self.manifest.cells

    def verify(self):
        """
        Read every file and compare its SHA-256 with the recorded one.

        Raises:
            ValueError: files are damaged; they are listed.
        """
        files = [self.path / shard["file"] for shard in self.manifest.shards]
        damaged = [
            f.name
            for f, shard in zip(files, self.manifest.shards)
            if not f.is_file() or sha256_of([f]) != shard["sha256"]
        ]
        if damaged:
            raise ValueError(
                f"{self.path}: {counted(len(damaged), 'file')} damaged: {some(damaged)}; copy them again, or prepare "
                "the store again"
            )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_pieces"}

    @cached_property
    def _pieces(self) -> "list[_Piece]":
        pieces, first = [], 0
        for file in self._files:
            for batch in _batches(file):
                pieces.append(_Piece(first, batch, self.manifest, file))
                first += batch.num_rows
        if first != len(self):
            raise ValueError(f"{self.path}: expected {len(self)} cells, found {first}; prepare the store again")
        return pieces

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([piece.first for piece in self._pieces])

    def locate(self, rows: np.ndarray) -> "list[tuple[_Piece, np.ndarray, np.ndarray | slice]]":
        """Where some cells lie: each piece that holds some, their rows in it, and their places among the cells asked for."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {len(self)} cells")
        of = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.unique(of)
        if len(found) == 1:
            piece = self._pieces[found[0]]
            return [(piece, rows - piece.first, slice(None))]
        places = [np.flatnonzero(of == i) for i in found]
        return [(self._pieces[i], rows[place] - self._pieces[i].first, place) for i, place in zip(found, places)]

    def expression(self, rows: np.ndarray) -> sp.csr_matrix:
        """The stored expression of some cells, `(len(rows), genes)`, CSR: counts, or log1p as they were read."""
        rows = np.asarray(rows, dtype=np.int64)
        parts, places = [], []
        for piece, local, place in self.locate(rows):
            parts.append(sp.csr_matrix(piece.expression_of(local)))
            places.append(np.arange(len(rows))[place])
        whole = sp.vstack(parts, format="csr") if parts else sp.csr_matrix((0, len(self.manifest.genes)))
        return whole[np.argsort(np.concatenate(places))] if len(parts) > 1 else whole

    def embedding(self, rows: np.ndarray) -> np.ndarray:
        """The stored embedding of some cells, `(len(rows), embedding_dim)`."""
        return self._column(rows, _Piece.embedding_of)

    def totals(self, rows: np.ndarray) -> np.ndarray:
        """The total counts of some cells, over all genes of their file and not only those of the store, float64."""
        return self._column(rows, _Piece.totals_of)

    def _column(self, rows: np.ndarray, column) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        located = self.locate(rows)
        values = [column(piece, local) for piece, local, _ in located]
        if len(located) == 1:
            return values[0]
        whole = np.empty((len(rows), *values[0].shape[1:]), dtype=values[0].dtype)
        for (_, _, place), value in zip(located, values):
            whole[place] = value
        return whole

    def obs(self, rows: np.ndarray | None = None) -> pd.DataFrame:
        """The labels of some cells (all by default) and the columns that were kept of their files, indexed by barcode."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        names = [BARCODE, *(name for name in self._pieces[0].batch.schema.names if name.startswith(OBS))]
        frame = pd.DataFrame(index=range(len(rows)), columns=names, dtype=object)
        parts = []
        for piece, local, place in self.locate(rows):
            taken = piece.labels(names, local)
            parts.append(taken.set_axis(np.arange(len(rows))[place]))
        frame = pd.concat(parts).sort_index()
        group = np.searchsorted(self.groups["start"].to_numpy(), rows, side="right") - 1
        labels = self.groups.drop(columns=["start", "stop"]).astype("category").iloc[group]
        keys = {"perturbation": "perturbation_key", "context": "context_key", "batch": "batch_key"}
        named = {of: self.manifest.reading.get(key) for of, key in keys.items() if of in labels}
        labels = labels.rename(columns={of: key for of, key in named.items() if isinstance(key, str)})
        for name in names[1:]:
            column = frame[name]
            labels[name[len(OBS) :]] = (column.astype("category") if column.dtype == object else column).to_numpy()
        return labels.set_axis(pd.Index(frame[BARCODE].astype(str), name=None))

    def barcodes(self, rows: np.ndarray) -> np.ndarray:
        """The barcodes of some cells."""
        found = np.empty(len(rows), dtype=object)
        for piece, local, place in self.locate(np.asarray(rows, dtype=np.int64)) if len(rows) else ():
            found[place] = piece.labels([BARCODE], local)[BARCODE].to_numpy()
        return found

    def to_anndata(self, rows: np.ndarray | None = None) -> ad.AnnData:
        """Some cells (all by default) as they were read: X the stored expression, `obsm["embedding"]` the embedding."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        var = pd.DataFrame(index=pd.Index(self.manifest.genes, dtype=str))
        embedded = {"embedding": self.embedding(rows)} if self.manifest.embedding_dim is not None else {}
        expression = self.expression(rows) if self.manifest.expression is not None else None
        return ad.AnnData(expression, obs=self.obs(rows), var=var, obsm=embedded)

    def batches_of_shards(self) -> Iterator[list[pa.RecordBatch]]:
        """The record batches of each Arrow file."""
        for file in self._files:
            yield _batches(file)

    def as_dataset(self):
        """The cells as a memory-mapped [`datasets.Dataset`], one row each."""
        from datasets import load_from_disk

        return load_from_disk(str(self.path))


@contextmanager
def _reading_arrow(file: Path):
    """Turns whatever Arrow raises on a damaged file into one clear error."""
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        if isinstance(error, PermissionError):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file)) from error
        raise ValueError(f"{file} cannot be read as Arrow ({error}); prepare the store again") from error


def _batches(file: Path) -> list[pa.RecordBatch]:
    with _reading_arrow(file):
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches()


class _Piece:
    """
    One record batch of a store: views into the memory map. The manifest says which of them exist: `totals` of
    counts, an `embedding`, and expression that is `dense` or `sparse`.
    """

    totals: np.ndarray
    embedding: np.ndarray
    dense: np.ndarray
    sparse: sp.csr_matrix

    def __init__(self, first: int, batch: pa.RecordBatch, manifest: Manifest, file: Path):
        self.first, self.batch, self.file = first, batch, file
        _check_columns(batch, manifest, file)
        self.is_dense, self.half = manifest.layout == "dense", manifest.dtype == "float16"
        if TOTAL in batch.schema.names:
            self.totals = batch.column(TOTAL).to_numpy()
        if manifest.embedding_dim is not None:
            self.embedding = _matrix_of(batch.column(EMBEDDING), manifest.embedding_dim)
        if manifest.expression is not None and self.is_dense:
            self.dense = _matrix_of(batch.column(EXPRESSION), len(manifest.genes))
        elif manifest.expression is not None:
            ids, values = batch.column(GENE_IDS), batch.column(GENE_VALUES)
            offsets = ids.offsets.to_numpy()
            if not np.array_equal(offsets, values.offsets.to_numpy()):
                raise ValueError(f"{file}: gene ids and values of a cell differ in number; prepare the store again")
            inside = slice(offsets[0], offsets[-1])
            data = values.values.to_numpy()[inside]
            # SciPy has no sparse float16: the bits of the numbers are held as integers.
            data = data.view(np.uint16) if data.dtype == np.float16 else data
            indices = ids.values.to_numpy()[inside]
            self.sparse = sp.csr_matrix(
                (data, indices, offsets - offsets[0]), shape=(batch.num_rows, len(manifest.genes)), copy=False
            )

    def expression_of(self, rows: np.ndarray) -> "sp.csr_matrix | np.ndarray":
        """Stored expression of some rows."""
        if self.is_dense:
            return self.finite(self.dense[rows], rows)
        part = self.sparse[rows]
        # An id beyond the genes would make the next step write outside its memory. So would one below 0, which is a very
        # large number here.
        if part.nnz and part.indices.view(f"u{part.indices.itemsize}").max() >= part.shape[1]:
            raise ValueError(
                f"{self.file}: gene ids should be 0 to {part.shape[1] - 1}, found {part.indices.min()} to "
                f"{part.indices.max()}; prepare the store again"
            )
        if self.half:
            part.data = part.data.view(np.float16).astype(np.float32)
        return self.finite(part, rows)

    def embedding_of(self, rows: np.ndarray) -> np.ndarray:
        """Stored embedding of some rows."""
        return self.finite(self.embedding[rows], rows)

    def totals_of(self, rows: np.ndarray) -> np.ndarray:
        """Total counts of some rows."""
        totals = self.totals[rows]
        check_totals(totals, str(self.file), lambda at: f"cell {self.first + rows[at]}")
        return totals

    def finite(self, values, rows: np.ndarray):
        """The values, `(len(rows), features)`. ValueError that names the cell of one that is NaN or infinite."""
        stored = values.data if sp.issparse(values) else values
        if not are_finite(stored):
            at = np.flatnonzero(wrong(stored).reshape(-1))[0]
            row = np.searchsorted(values.indptr, at, "right") - 1 if sp.issparse(values) else at // values.shape[1]
            raise ValueError(
                f"{self.file}: expected finite values, found {stored.reshape(-1)[at]} in cell {self.first + rows[row]}; the "
                "file is damaged: prepare the store again"
            )
        return values

    @cached_property
    def _checked(self) -> set[str]:
        return set()

    def labels(self, names: list[str], rows: np.ndarray) -> pd.DataFrame:
        """Barcodes and columns of obs of some rows, checked: a damaged column could point anywhere in memory."""
        with _reading_arrow(self.file):
            for name in set(names) - self._checked:
                self.batch.column(name).validate(full=True)
                self._checked.add(name)
            return self.batch.select(names).take(pa.array(rows)).to_pandas()


def _check_columns(batch: pa.RecordBatch, manifest: Manifest, file: Path):
    """ValueError if the columns are not those of the manifest, or their lists reach beyond their values."""
    expected: dict[str, pa.DataType] = {BARCODE: pa.string()}
    numbers = pa.from_numpy_dtype(manifest.dtype)
    if manifest.expression in Values.RAW:
        expected[TOTAL] = pa.float64()
    if manifest.embedding_dim is not None:
        half = manifest.dtype == "float16"
        expected[EMBEDDING] = pa.list_(pa.float16() if half else pa.float32(), manifest.embedding_dim)
    if manifest.expression is not None and manifest.layout == "dense":
        expected[EXPRESSION] = pa.list_(numbers, len(manifest.genes))
    elif manifest.expression is not None:
        expected |= {GENE_IDS: pa.list_(pa.int32()), GENE_VALUES: pa.list_(numbers)}
    with _reading_arrow(file):
        found = {name: batch.schema.field(name).type for name in expected if name in batch.schema.names}
    if found != expected:
        wrong = [name for name, of in expected.items() if found.get(name) != of]
        raise ValueError(
            f"{file}: expected the columns { {name: str(expected[name]) for name in wrong} }, found "
            f"{ {name: str(found.get(name)) for name in wrong} }; prepare the store again"
        )
    with _reading_arrow(file):
        for name in expected.keys() - {BARCODE}:
            batch.column(name).validate(full=True)


def _matrix_of(column: "pa.FixedSizeListArray | pa.ListArray", width: int) -> np.ndarray:
    values = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), width)


class StoredRows:
    """
    A model's features of the cells of a store, `(cells, features)` float32, read when they are asked for. They are put
    into the model's gene order and normalised, as [`StateProcessor`] does it with a file.

    Args:
        store ([`CellStore`]): the cells.
        processor ([`StateProcessor`]): the model's genes and normalisation.
        source (`str`): `"features"`, or `"genes"` for the gene decoder's target of a model on embeddings.
    """

    def __init__(self, store: CellStore, processor: StateProcessor, source: str = "features"):
        self.store = store
        self.embedded = processor.values == Values.EMBEDDING and source == "features"
        as_log1p = source == "genes" or processor.values == Values.LOG1P
        self._scale_to: float | None = None
        if as_log1p and store.manifest.expression in Values.RAW:
            if processor.target_sum is None:
                raise ValueError(f"{store.path} holds counts: expected a processor with a target_sum, found None")
            self._scale_to = processor.target_sum
        width = processor.feature_dim if source == "features" else len(processor.vocabulary.genes)
        self.shape = (len(store), width)
        self._columns = None
        if not self.embedded and processor.vocabulary.genes != store.manifest.genes:
            self._columns = pd.Index(store.manifest.genes).get_indexer(processor.vocabulary.genes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "slice | np.ndarray") -> np.ndarray:
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        return self.take(rows, np.empty((len(rows), self.shape[1]), dtype=np.float32))

    def take(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Some cells, in any order, into a C-contiguous float32 array `(len(rows), features)`."""
        for piece, local, place in self.store.locate(rows) if len(rows) else ():
            if isinstance(place, np.ndarray) and place[-1] - place[0] == len(place) - 1:
                place = slice(place[0], place[-1] + 1)  # a view: the rows stand side by side
            if isinstance(place, slice):
                self._fill(piece, local, out[place])
            else:
                part = np.empty((len(local), self.shape[1]), dtype=np.float32)
                self._fill(piece, local, part)
                out[place] = part
        return out

    def _fill(self, piece: _Piece, rows: np.ndarray, out: np.ndarray):
        if self.embedded and piece.embedding.dtype == np.float32:
            np.take(piece.embedding, rows, axis=0, out=out, mode="clip")
            piece.finite(out, rows)
            return
        part, scale = self._part(piece, rows)
        if not sp.issparse(part):
            out[:] = part if scale is None else scaled_log1p(part, scale[:, None])
            return
        if scale is not None:
            part.data = scaled_log1p(part.data, np.repeat(scale, np.diff(part.indptr)))
        part.astype(np.float32, copy=False).toarray(out=out)

    def _part(self, piece: _Piece, rows: np.ndarray) -> tuple[Any, np.ndarray | None]:
        """Features of some rows as they are stored, dense or CSR, and what counts of each cell are multiplied by before log1p."""
        if self.embedded:
            return piece.embedding_of(rows), None
        part: Any = piece.expression_of(rows)
        if self._columns is not None:
            part = part[:, self._columns]
        return part, None if self._scale_to is None else count_scales(piece.totals_of(rows), self._scale_to)

    def parts(self, rows: np.ndarray) -> Iterator[tuple[Any, Any, np.ndarray | None]]:
        """Some cells as they are stored, in parts; see [`~pertstate.data.cells_on_device.CellRows.parts`]."""
        for piece, local, place in self.store.locate(rows) if len(rows) else ():
            yield place, *self._part(piece, local)


class StoreSource(NamedSource):
    """
    The cells of a store as a source.

    Args:
        store ([`CellStore`]): the cells.
        contexts (`list[str]`, *optional*): leave out the cells of all other contexts.
        features ([`PerturbationFeatures`], *optional*): vectors of the perturbations.
        dose_encoding (`str`): see [`DoseScale`].

    Raises:
        ValueError: a context is not there.
    """

    def __init__(
        self,
        store: CellStore,
        contexts: list[str] | None = None,
        features: PerturbationFeatures | None = None,
        dose_encoding: str = "log",
    ):
        manifest = store.manifest
        self.store = store
        self.reader = StateProcessor(**manifest.reading, perturbation_features=features, dose_encoding=dose_encoding)
        self.groups = store.groups
        if contexts is not None:
            check_contexts(contexts, store.groups)
            self.groups = self.groups[self.groups["context"].isin(contexts)].reset_index(drop=True)
        self.genes, self.embedding_dim = manifest.genes, manifest.embedding_dim
        self.expression = None if manifest.expression is None else str(store.path)
        self.normalize, self.target_sum = manifest.normalize, manifest.target_sum
        self.notes = list(manifest.notes)

    def kinds(self) -> set[str]:
        return {given("expression", self.store.manifest.expression)}

    def scale(self) -> Scale | None:
        manifest = self.store.manifest
        if manifest.expression is None:
            return None
        return Scale(manifest.expression) if manifest.scale is None else Scale(**manifest.scale)

    @contextmanager
    def blocks(self, wanted: np.ndarray | None = None, genes: list[str] | None = None) -> Iterator[list[LazyBlock]]:
        groups = self.groups if wanted is None else self.groups[wanted]
        starts, stops = groups["start"].to_numpy(), groups["stop"].to_numpy()
        gaps = np.flatnonzero(starts[1:] != stops[:-1])
        runs = zip(starts[np.r_[0, gaps + 1]], stops[np.r_[gaps, len(stops) - 1]])
        columns = None if genes is None else pd.Index(self.genes).get_indexer(genes)
        spans = [(i, min(i + 4096, stop)) for start, stop in runs for i in range(start, stop, 4096)]
        yield [(stop - start, partial(self._read, start, stop, columns)) for start, stop in spans]

    def _read(self, start: int, stop: int, columns: np.ndarray | None) -> Block:
        rows, manifest = np.arange(start, stop), self.store.manifest
        codes = np.searchsorted(self.groups["start"].to_numpy(), rows, side="right") - 1
        expression = totals = None
        if manifest.expression is not None:
            expression = self.store.expression(rows)
            expression = expression if columns is None else expression[:, columns]
            totals = self.store.totals(rows) if manifest.expression in Values.RAW else None
        embedding = None if self.embedding_dim is None else self.store.embedding(rows)
        return Block(rows, codes, expression, totals, embedding)

    def totals(self, wanted: np.ndarray) -> np.ndarray:
        groups = self.groups[wanted]
        return np.concatenate([self.store.totals(np.arange(a, b)) for a, b in zip(groups["start"], groups["stop"])])

    def cell_ids(self, rows: np.ndarray) -> np.ndarray:
        return cell_ids(self.store.barcodes(rows))

    def features(self, processor: StateProcessor, room: Room = ROOM) -> "tuple[StoredRows, StoredRows | None]":
        decoded = processor.gene_input is not None
        return StoredRows(self.store, processor), StoredRows(self.store, processor, "genes") if decoded else None


def load_store(
    store: CellStore,
    splits: Splits,
    contexts: list[str] | None = None,
    perturbation_features: PerturbationFeatures | None = None,
    **options,
) -> tuple[Cells, StateProcessor]:
    """
    The cells of a store for a run, read when they are asked for; see [`load`]. By default values are normalised as the
    store says.

    Args:
        store, contexts, perturbation_features: see [`StoreSource`].
        splits ([`Splits`]): with the store's datasets.
        options: further arguments of [`load`].
    """
    return load(StoreSource(store, contexts, perturbation_features), splits, **options)
