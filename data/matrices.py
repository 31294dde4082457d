"""Matrices on disk, read row by row: dense, CSR, and CSC turned into rows in bounded memory."""

import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.base.cell_values import check_matrix, check_numbers, native_numbers


_COMPRESSED = ("csr_matrix", "csr", "csc_matrix", "csc")  # encodings, today's and those of files before 2019


class RowReader:
    """
    Rows of a matrix on disk, as ndarray or CSR. Rows that are near one another are read in one go, together with those
    between them, but never more than `_block` rows at once.

    Dense and CSR matrices are read row by row. A CSC matrix does not hold its rows together: one of more than
    `_in_memory` bytes is first transposed into a temporary file.

    Args:
        node: dataset, array or group of the matrix.
        is_group (`bool`): whether it is a group (sparse, or a table).
        name (`str`): of the matrix in its file, for errors.
        expected (`tuple`): the shape that it must have by the rest of the file; None for a size that may be any.
        reading (`Callable`): makes the context manager that turns errors of reading into one that names the file.
    """

    _gap, _block, _in_memory = 64, 512, 1 << 27

    def __init__(
        self, node: Any, is_group: bool, name: str, expected: tuple, reading: Callable[[], AbstractContextManager]
    ):
        self._node, self._is_group, self._name, self._expected, self._reading = node, is_group, name, expected, reading
        self._temporary: tempfile.TemporaryDirectory | None = None

    @cached_property
    def _matrix(self) -> "np.ndarray | sp.csr_matrix | CSRMatrix | h5py.Dataset":
        matrix = self._open()
        check_matrix(matrix, self._name)
        self._check_shape(matrix.shape)
        return matrix

    def _check_shape(self, shape: tuple[int, ...]):
        for axis, (found, expected) in enumerate(zip(shape, self._expected)):
            if expected is not None and found != expected:
                what = ("rows, obs has", "columns, var has")[axis]
                raise ValueError(f"{self._name} has {found} {what} {expected}")

    def check(self):
        """
        ValueError if the arrays of a sparse matrix contradict one another, or the shape of a dense one the rest of the file.
        Neither values nor indices are read.
        """
        if not self._is_group and self._node.shape is not None:
            self._check_shape(tuple(self._node.shape))
        if self._is_group and self._encoding() in _COMPRESSED:
            with self._reading():
                CSRMatrix(self._node, self._name, transposed=self._encoding().startswith("csc"))

    def _encoding(self) -> str | None:
        return self._node.attrs.get("encoding-type", self._node.attrs.get("h5sparse_format"))

    def _open(self):
        node = self._node
        if not self._is_group:
            if node.shape is None:
                raise ValueError(f"{self._name} is empty, expected cells x features")
            return node
        encoding = self._encoding()
        if encoding in _COMPRESSED and encoding.startswith("csr"):
            return CSRMatrix(node, self._name)
        if encoding in _COMPRESSED:
            check_numbers(node["data"].dtype, self._name)
            columns = CSRMatrix(node, self._name, transposed=True)
            if columns.nbytes <= self._in_memory:
                return columns[:].T.tocsr()
            self._temporary = tempfile.TemporaryDirectory(prefix="pertstate-rows-")
            return rows_of_columns(columns, Path(self._temporary.name))
        whole = ad.io.read_elem(node)  # a table
        if not isinstance(whole, pd.DataFrame):
            raise ValueError(f"{self._name} is {encoding or 'of no known encoding'}, expected a matrix")
        return whole.to_numpy()

    @property
    def shape(self) -> tuple[int, int]:
        with self._reading():
            return tuple(self._matrix.shape)

    def __getitem__(self, rows: "slice | np.ndarray"):
        with self._reading():
            matrix = self._matrix
            if isinstance(rows, slice) or len(rows) == 0:
                return matrix[rows if isinstance(rows, slice) else slice(0, 0)]
            rows = np.asarray(rows)
            far = np.abs(np.diff(rows, prepend=rows[0])) > self._gap
            breaks = np.flatnonzero(far | (np.diff(rows // self._block, prepend=rows[0] // self._block) != 0))
            parts = []
            for segment in np.split(rows, breaks):
                first = int(segment.min())
                parts.append(matrix[first : int(segment.max()) + 1][segment - first])
            return sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)

    def blocks(self, values: int = 1 << 23, cells: int = 1 << 14) -> list[slice]:
        """All rows in order, cut into blocks of at most this many values and cells, and of at least one row."""
        with self._reading():
            matrix = self._matrix
            if isinstance(matrix, (CSRMatrix, sp.csr_matrix)):
                return split_rows(np.asarray(matrix.indptr), values, cells)
            step = max(1, min(cells, values // max(1, matrix.shape[1])))
            return [slice(i, min(i + step, matrix.shape[0])) for i in range(0, matrix.shape[0], step)]

    def close(self):
        """Remove the temporary file, if there is one."""
        if self._temporary is not None:
            if "_matrix" in self.__dict__:  # it is not when transposing failed
                self._matrix.close()
            self._temporary.cleanup()


class CSRMatrix:
    """
    A CSR matrix in a group of arrays `data`, `indices` and `indptr`. It is checked for damage that would give wrong
    numbers. With `transposed`, a CSC matrix is read as the CSR matrix of its transpose.

    Raises:
        ValueError: the arrays contradict one another.
    """

    def __init__(self, node, name: str = "X", transposed: bool = False):
        self._data, self._indices, self._name, self._node = node["data"], node["indices"], name, node
        shape = node.attrs["shape"] if "shape" in node.attrs else node.attrs["h5sparse_shape"]
        arrays = {"data": self._data, "indices": self._indices, "indptr": node["indptr"]}
        flat = {key: array.shape for key, array in arrays.items() if array.shape is None or len(array.shape) != 1}
        if flat:
            raise ValueError(f"data, indices and indptr of {name} should have one dimension; found shapes {flat}")
        if np.shape(shape) != (2,) or min(shape) < 0:
            raise ValueError(f"shape of {name} should be cells x features, found {np.asarray(shape).tolist()}")
        self.shape = tuple(int(n) for n in shape)[:: -1 if transposed else 1]
        self.dtype = native_numbers(np.empty(0, dtype=self._data.dtype)).dtype
        indptr = node["indptr"][:]
        if indptr.dtype.kind not in "iu" or self._indices.dtype.kind not in "iu":
            raise ValueError(f"indices and indptr of {name} are {self._indices.dtype} and {indptr.dtype}, not integers")
        self.indptr = indptr.astype(np.int64)
        ends = (int(self.indptr[0]), int(self.indptr[-1])) if len(indptr) else (0, 0)
        stored = self._data.shape[0]
        if (
            len(indptr) != self.shape[0] + 1
            or (self.indptr[1:] < self.indptr[:-1]).any()  # differences could overflow
            or ends != (0, stored)
            or self._indices.shape[0] != stored
        ):
            raise ValueError(
                f"indptr of {name} should rise from 0 to {stored} in {self.shape[0] + 1} steps, as long as data "
                f"({stored}) and indices ({self._indices.shape[0]}); found {len(indptr)} from {ends[0]} to {ends[1]}"
            )
        check_chunks(self._data, f"{name}/data")
        if self.shape[1] > 1:
            check_chunks(self._indices, f"{name}/indices")

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values and their indices in memory."""
        return int(self.indptr[-1]) * (self.dtype.itemsize + 4)

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop, _ = rows.indices(self.shape[0])
        stop = max(start, stop)
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        data, indices = native_numbers(self._data[first:last]), self._indices[first:last]
        if len(indices) and (indices.min() < 0 or indices.max() >= self.shape[1]):
            raise ValueError(
                f"indices of {self._name} should be 0 to {self.shape[1] - 1}, found {indices.min()} to {indices.max()}"
            )
        indptr = self.indptr[start : stop + 1] - first
        small = np.int32 if max(self.shape[1], last - first) < 2**31 else np.int64
        return sp.csr_matrix(
            (data, indices.astype(small, copy=False), indptr.astype(small)), shape=(stop - start, self.shape[1])
        )

    def close(self):
        """Close the file that the matrix is in."""
        self._node.file.close()


def check_chunks(array, name: str):
    """
    ValueError if chunks of an array are missing. A missing chunk reads as zeros or empty text, and zarr does not write
    chunks that hold nothing else. So this is for arrays that have no such chunks.
    """
    if not isinstance(array, h5py.Dataset):
        expected, found = array.nchunks, array.nchunks_initialized
    elif array.chunks is not None:
        expected = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks))
        found = array.id.get_num_chunks()
    else:
        return
    if found < expected:
        raise ValueError(f"{expected - found} of {expected} chunks of {name} are missing, or hold nothing but zeros")


def split_rows(indptr: np.ndarray, values: int, cells: int) -> list[slice]:
    """The rows of a CSR matrix, cut into blocks of at most this many values and rows, and of at least one row."""
    blocks, start, rows = [], 0, len(indptr) - 1
    while start < rows:
        stop = int(np.searchsorted(indptr, indptr[start] + values, side="right")) - 1
        stop = min(max(stop, start + 1), start + cells, rows)
        blocks.append(slice(start, stop))
        start = stop
    return blocks


def rows_of_columns(columns: CSRMatrix, folder: Path, values: int = 1 << 22) -> CSRMatrix:
    """
    A CSC matrix turned into a CSR matrix in a temporary file, with about `values` values in memory.

    The columns are read once. Their entries are dealt out to files, one for each range of rows; then each of these files
    is sorted.

    Args:
        columns ([`CSRMatrix`]): the transpose, as it is stored.
        folder (`Path`): for the temporary files.
    """
    num_columns, num_rows = columns.shape
    stored = int(columns.indptr[-1])
    buckets = max(1, -(-stored // values))
    width = max(1, -(-num_rows // buckets))
    entry = np.dtype([("row", np.int64), ("column", np.int32), ("value", columns.dtype)])
    names = [folder / f"rows-{i}.bin" for i in range(-(-num_rows // width))]
    for block in split_rows(columns.indptr, values, num_columns):
        part = columns[block]
        entries = np.empty(part.nnz, dtype=entry)
        entries["row"], entries["value"] = part.indices, part.data
        entries["column"] = np.repeat(np.arange(block.start, block.stop), np.diff(part.indptr))
        bucket = entries["row"] // width
        order = np.argsort(bucket, kind="stable")
        entries, edges = entries[order], np.searchsorted(bucket[order], np.arange(len(names) + 1))
        for name, start, stop in zip(names, edges[:-1], edges[1:]):
            if stop > start:
                with open(name, "ab") as file:
                    entries[start:stop].tofile(file)
    file = h5py.File(folder / "rows.h5", "w")
    group = file.create_group("X")
    group.attrs["shape"] = (num_rows, num_columns)
    data = group.create_dataset("data", (stored,), dtype=columns.dtype)
    indices = group.create_dataset("indices", (stored,), dtype=np.int32)
    indptr, done = np.zeros(num_rows + 1, dtype=np.int64), 0
    for i, name in enumerate(names):
        if not name.exists():
            continue
        entries = np.fromfile(name, dtype=entry)
        name.unlink()
        entries = entries[np.argsort(entries["row"], kind="stable")]
        data[done : done + len(entries)], indices[done : done + len(entries)] = entries["value"], entries["column"]
        done += len(entries)
        first, last = i * width, min((i + 1) * width, num_rows)
        indptr[first + 1 : last + 1] = np.bincount(entries["row"] - first, minlength=last - first)
    np.cumsum(indptr, out=indptr)
    group.create_dataset("indptr", data=indptr)
    return CSRMatrix(group)
