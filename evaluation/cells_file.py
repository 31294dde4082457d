"""An AnnData on disk that is written block by block, as `.h5ad` or `.zarr`: bounded memory, whatever its size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.base.outputs import Kind, whole_folder
from pertstate.evaluation.whole_hdf5 import whole_hdf5


ZARR = ".zarr"
SUFFIXES = (".h5ad", ".h5", ZARR)
_OF_ZARR = (".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_OF_ANNDATA = ("X", "layers", "obs", "obsm", "obsp", "raw", "uns", "var", "varm", "varp")
ZARR_FOLDER = Kind("AnnData in zarr format", (".zgroup", "zarr.json"), lambda name: name in (*_OF_ZARR, *_OF_ANNDATA))
# Values of a chunk of a column, and of the values of a sparse matrix; rows of a chunk of a dense one.
_CHUNK, _CHUNK_OF_VALUES, _CHUNK_OF_ROWS = 1 << 16, 1 << 18, 256
# The largest number of float16.
_LARGEST_HALF = float(np.finfo(np.float16).max)


@contextmanager
def whole_cells(output: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """
    The group of an AnnData file, of h5py or of zarr, which becomes `output` when the block ends without error; and a function
    that raises the disk's error where a write has failed.
    """
    if output.suffix != ZARR:
        with whole_hdf5(output) as (file, check):
            yield file, check
        return
    import zarr  # not needed, and slow to import, for files in HDF5

    from pertstate.evaluation.zarr_store import ending_with_its_block

    with whole_folder(output, ZARR_FOLDER) as partial, ending_with_its_block(partial) as store:
        yield zarr.open_group(store, mode="w", zarr_format=2), lambda: None


def write_frame(group, place: str, obs_name: str | None, var: pd.DataFrame, uns: dict) -> None:
    """An AnnData without cells at a place of a group, whose parts are then written."""
    empty = pd.DataFrame(index=pd.Index([], dtype=object, name=obs_name))
    ad.io.write_elem(group, place, ad.AnnData(obs=empty, var=var, uns=uns))
    made = group if place == "/" else group[place]
    for name in ("raw", "X"):  # nothing, in a form that anndata before 0.11 cannot read
        if name in made:
            del made[name]


class Appended:
    """
    Values that come one after another, written a chunk at a time.

    Args:
        group: of h5py or of zarr.
        name (`str`): of the array in it.
        dtype: a type of numpy; `str` for text.
        encoding (`str`): what anndata calls it.
    """

    def __init__(self, group, name: str, dtype, chunk: int = _CHUNK, encoding: str = "array"):
        self._chunk, self._number = chunk, 0
        self._waiting: list[np.ndarray] = []
        self._dtype = object if dtype is str else dtype
        if isinstance(group, h5py.Group):
            dtype = h5py.string_dtype() if dtype is str else dtype
            self._array: Any = group.create_dataset(name, (0,), dtype=dtype, chunks=(chunk,), maxshape=(None,))
        else:
            self._array = group.create_array(name, shape=(0,), dtype=dtype, chunks=(chunk,))
        self._array.attrs["encoding-type"], self._array.attrs["encoding-version"] = encoding, "0.2.0"

    def add(self, values: np.ndarray):
        """Some more values."""
        self._waiting.append(np.asarray(values, dtype=self._dtype))
        self._number += len(values)
        if self._number >= self._chunk:
            self._write(self._number - self._number % self._chunk)

    def close(self):
        """Write what is left."""
        self._write(self._number)

    def _write(self, number: int):
        if not number:
            return
        values = np.concatenate(self._waiting)
        done = self._array.shape[0]
        self._array.resize((done + number,))
        self._array[done : done + number] = values[:number]
        self._waiting = [values[number:]]
        self._number -= number


class DenseRows:
    """A matrix whose rows are written in any order."""

    def __init__(self, group, name: str, shape: tuple[int, int], dtype: str):
        if isinstance(group, h5py.Group):
            create = group.create_dataset
        else:
            create = group.create_array
        chunks = (max(1, min(shape[0], _CHUNK_OF_ROWS)), shape[1])
        self._array: Any = create(name, shape=shape, dtype=dtype, chunks=chunks)
        self._array.attrs["encoding-type"], self._array.attrs["encoding-version"] = "array", "0.2.0"
        self._half = dtype == "float16"

    def write(self, rows: slice, values: np.ndarray):
        """
        Write some rows.

        Raises:
            ValueError: float16 cannot hold a value.
        """
        if self._half and values.size and np.abs(values).max() > _LARGEST_HALF:
            raise ValueError(
                f"float16 holds numbers up to {_LARGEST_HALF:g}, found {np.abs(values).max():g}; write float32"
            )
        self._array[rows] = values

    def close(self):
        """Do nothing, as all rows are written."""


class SparseRows:
    """A CSR matrix whose rows are written in their order."""

    def __init__(self, group, name: str, shape: tuple[int, int], dtype: str):
        made = group.create_group(name)
        made.attrs["encoding-type"], made.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        made.attrs["shape"] = np.array(shape) if isinstance(group, h5py.Group) else list(shape)
        self._data = Appended(made, "data", dtype, _CHUNK_OF_VALUES)
        self._indices = Appended(made, "indices", "int32", _CHUNK_OF_VALUES)
        self._indptr = Appended(made, "indptr", "int64")
        self._indptr.add(np.zeros(1, dtype=np.int64))
        self._rows = self._values = 0

    def write(self, rows: slice, values: np.ndarray):
        """Write the next rows. ValueError if they are not the next ones."""
        if rows.start != self._rows:
            raise ValueError(f"rows of a sparse matrix are written in order: expected {self._rows}, found {rows.start}")
        block = sp.csr_matrix(values)
        self._data.add(block.data)
        self._indices.add(block.indices)
        self._indptr.add(block.indptr[1:].astype(np.int64) + self._values)
        self._rows, self._values = rows.stop, self._values + block.nnz

    def close(self):
        """Write what is left."""
        for part in (self._data, self._indices, self._indptr):
            part.close()


class CellTable:
    """
    The table of the cells, written in their order.

    Args:
        group: of the AnnData; a table that is there is replaced.
        columns (`dict`): by name, the categories of a column of names, or the type of a column of numbers.
    """

    def __init__(self, group, columns: dict[str, pd.Index | np.dtype], name: str = "obs"):
        if name in group:
            del group[name]
        made = group.create_group(name)
        made.attrs["encoding-type"], made.attrs["encoding-version"] = "dataframe", "0.2.0"
        made.attrs["_index"] = "_index"
        order = list(columns)
        made.attrs["column-order"] = (
            np.array(order, dtype=h5py.string_dtype()) if isinstance(group, h5py.Group) else order
        )
        self._index = Appended(made, "_index", str, encoding="string-array")
        self._columns: dict[str, Appended] = {}
        for column, kind in columns.items():
            if isinstance(kind, pd.Index):
                ad.io.write_elem(made, column, pd.Categorical.from_codes([], categories=kind))
                of_column = made[column]
                del of_column["codes"]
                codes = np.min_scalar_type(-max(1, len(kind)))
                self._columns[column] = Appended(of_column, "codes", codes)
            else:
                self._columns[column] = Appended(made, column, kind)

    def write(self, names: np.ndarray, values: dict[str, np.ndarray]):
        """
        Write the next cells.

        Args:
            names (`np.ndarray`): of the cells.
            values (`dict[str, np.ndarray]`): of every column: numbers, or the numbers of categories.
        """
        self._index.add(names)
        for column, array in self._columns.items():
            array.add(values[column])

    def close(self):
        """Write what is left."""
        for array in (self._index, *self._columns.values()):
            array.close()
