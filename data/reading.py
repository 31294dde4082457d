"""Reading parts of `.h5ad` and `.zarr` files, with one clear error for a file that is not whole."""

import errno
import gzip
import os
import shutil
import tempfile
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.base.bounded_text import check_regular
from pertstate.base.printable import get_logger
from pertstate.data.matrices import RowReader, check_chunks
from pertstate.data.self_contained import SMALL, check_hdf5, check_zarr, check_zarr_array, state_of
from pertstate.processing import StateProcessor


logger = get_logger(__name__)

_ENDINGS = (".h5ad", ".h5", ".h5ad.gz")
# What a pattern of files may stand for. It may come from a run file of others.
_MOST_FILES, _MOST_RECURSIONS = 10_000, 2
# gzip makes a file of cells 5 to 50 times smaller, and a file of zeros 1,000 times.
_MOST_PACKED, _BLOCK = 200, 1 << 22
_FOLDERS: list[tempfile.TemporaryDirectory] = []  # of unpacked files, until the process ends


def expand_paths(pattern: str | os.PathLike) -> list[Path]:
    """The `.h5ad`, `.h5`, `.h5ad.gz` and `.zarr` files that a file, folder or glob names; braces stand for several, `{a,b}`.

    Raises:
        FileNotFoundError: there is none.
    """
    text = os.path.expandvars(os.path.expanduser(str(pattern)))
    if "{" in text and not Path(text).exists():
        return [path for part in _braces(text) for path in expand_paths(part)]
    if text.count("**") > _MOST_RECURSIONS:
        raise ValueError(
            f"{text[:100]}: expected '**' at most {_MOST_RECURSIONS} times, found it {text.count('**')} times"
        )
    path = Path(text)
    if is_zarr(path):
        files = [path]
    elif path.is_dir():
        found = [file for ending in _ENDINGS for file in path.glob(f"*{ending}")]
        files = sorted([*found, *filter(is_zarr, path.glob("*.zarr"))])
    elif any(character in text for character in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file() or is_zarr(p))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(
            f"{text}: no such file, folder of {', '.join(_ENDINGS)} or .zarr files or glob (looked from {Path.cwd()})"
        )
    return files


def _braces(text: str) -> list[str]:
    """The texts that braces stand for, in order: `x{a,b}` is `xa` and `xb`."""
    found = [""]
    while "{" in text:
        before, _, rest = text.partition("{")
        inner, closed, text = rest.partition("}")
        if not closed:
            raise ValueError(f"{before[-100:]}{{{inner[:100]}: a brace is opened and not closed")
        options = inner.split(",")
        if len(found) * len(options) > _MOST_FILES:
            raise ValueError(f"{before[-100:]}{{{inner[:100]}}}: its braces stand for more than {_MOST_FILES:,} files")
        found = [f"{start}{before}{option.strip()}" for start in found for option in options]
    return [f"{start}{text}" for start in found]


def is_zarr(path: Path) -> bool:
    """Whether a folder is an AnnData in zarr format."""
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def read_h5ad(path: str | os.PathLike) -> ad.AnnData:
    """A whole AnnData from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole `.h5ad` or `.zarr` file.
    """
    path = _existing(path)
    # anndata takes the arrays of a sparse matrix as they are; damaged ones give other numbers, or end the process.
    with AnnDataFile(path) as data:
        for reader in data.matrices():
            reader.check()
    with _reading(path):
        file = unpacked(path) if path.suffix == ".gz" else path
        adata = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(file)
        for matrix in (adata.X, *adata.layers.values(), *adata.obsm.values()):
            if sp.issparse(matrix):
                matrix.check_format(full_check=True)
        adata.obs = _native(adata.obs)
    return adata


class AnnDataFile:
    """
    An `.h5ad` or `.zarr` on disk whose labels, matrices, layers and embeddings are read row by row: bounded memory,
    whatever its size.

    It has the attributes of an AnnData that [`StateProcessor`] reads (`obs`, `var_names`, `obs_names`, `n_obs`, `X`,
    `layers`, `obsm`, `uns`), and [`AnnDataFile.obs_rows`]. Use it as a context manager.

    Raises:
        FileNotFoundError, ValueError: as [`read_h5ad`].
    """

    def __init__(self, path: str | os.PathLike):
        self.path = _existing(path)
        # Of h5py or of zarr, which answer alike.
        self._file: Any
        self._groups: Any
        self._obs: Any
        with ExitStack() as on_error, self._reading():
            if self.path.is_dir():
                import zarr  # not needed, and slow to import, for files in HDF5

                from pertstate.data.zarr_parts import check_parts

                check_zarr(self.path)
                self._file, self._groups = zarr.open_group(str(self.path), mode="r"), zarr.Group
                for name, node in self._file.members(max_depth=None):
                    if isinstance(node, zarr.Array):
                        check_zarr_array(node, name)
                        check_parts(node, self.path / name, name)
            else:
                self._plain = unpacked(self.path) if self.path.suffix == ".gz" else self.path
                self._file, self._groups = on_error.enter_context(h5py.File(self._plain, "r")), h5py.Group
                check_hdf5(self._file)
            self._obs = self._file["obs"]
            self._whole_obs = not isinstance(self._obs, self._groups)  # a table of files before 2019
            if self._whole_obs:
                self.obs, self.var, _ = self._tables_of_old()
                self.n_obs, self.var_names = len(self.obs), self.var.index
            else:
                self.n_obs = self._values(self._obs[self._obs.attrs["_index"]]).shape[0]
                self.var_names = self.var.index
            for name in ("obs", "var"):
                table = self._file[name]
                if isinstance(table, self._groups):
                    check_chunks(self._values(table[table.attrs["_index"]]), f"{name}/{table.attrs['_index']}")
            self.X = self._reader("X", genes=True) if "X" in self._file else None
            self.layers = self._readers("layers", genes=True)
            self.obsm = self._readers("obsm", genes=False)
            on_error.pop_all()

    def _values(self, node):
        """The array of a column; a column of nullable values is a group of it and of what is missing."""
        return node["values"] if isinstance(node, self._groups) else node

    @cached_property
    def var(self) -> pd.DataFrame:
        """The table of the genes."""
        with self._reading():
            if self._whole_obs:
                return self._tables_of_old()[1]
            if isinstance(self._file, h5py.File):
                return _genes_of(self._file)
            return _table(self._file["var"])

    @cached_property
    def raw(self) -> "_Raw | None":
        """The genes and values of `raw`, where the file has it."""
        with self._reading():
            if "raw.X" in self._file:  # files before 2019
                var, node = self._tables_of_old()[2], self._file["raw.X"]
            elif "raw" in self._file and isinstance(self._file["raw"], self._groups):
                var, node = _table(self._file["raw"]["var"]), self._file["raw"]["X"]
            else:
                return None
            expected = (self.n_obs, len(var))
            return _Raw(RowReader(node, isinstance(node, self._groups), "raw/X", expected, self._reading), var)

    def _reader(self, name: str, genes: bool) -> RowReader:
        node = self._file[name]
        expected = (self.n_obs, len(self.var_names) if genes else None)
        return RowReader(node, isinstance(node, self._groups), name, expected, self._reading)

    def _readers(self, name: str, genes: bool) -> dict[str, RowReader]:
        if name not in self._file:
            return {}
        if not isinstance(self._file[name], self._groups):  # one table of all, in files before 2019
            return {
                key: RowReader(self._file[name][key], False, f"{name}/{key}", (self.n_obs, None), self._reading)
                for key in self._file[name].dtype.names
            }
        return {key: self._reader(f"{name}/{key}", genes) for key in self._file[name].keys()}

    def _tables_of_old(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """The tables of the cells, of the genes and of those of `raw`, which anndata puts together from parts of the file."""
        adata = ad.read_h5ad(self._plain, backed="r")
        try:
            raw = pd.DataFrame() if adata.raw is None else adata.raw.var
            return (
                _native(adata.obs),
                adata.var.set_axis(adata.var_names.astype(str)),
                raw.set_axis(raw.index.astype(str)),
            )
        finally:
            adata.file.close()

    def _reading(self):
        return _reading(self.path)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The whole table of the cells."""
        with self._reading():
            return _table(self._obs)

    @property
    def obs_names(self) -> pd.Index:
        """The cells' barcodes."""
        return self.obs.index

    @cached_property
    def uns(self) -> dict:
        """The unstructured part."""
        with self._reading():
            return ad.io.read_elem(self._file["uns"]) if "uns" in self._file else {}

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of `obs`."""
        with self._reading():
            return list(self.obs.columns) if self._whole_obs else [str(c) for c in self._obs.attrs["column-order"]]

    def some_obs(self, rows: slice, columns: list[str]) -> pd.DataFrame:
        """Some columns of obs of some cells; all columns where one of them is missing."""
        return self.obs_rows(rows, columns) if set(columns) <= set(self.obs_columns) else self.obs.iloc[rows]

    def obs_rows(self, rows: slice, columns: list[str]) -> pd.DataFrame:
        """Some columns of `obs` for a range of cells, indexed by barcode; nothing else is read."""
        if self._whole_obs or "obs" in self.__dict__:
            return self.obs.iloc[rows][columns]
        with self._reading():
            index = pd.Index(self._column(self._obs.attrs["_index"], rows)).astype(str)
            return pd.DataFrame({name: self._column(name, rows) for name in columns}, index=index)

    def _column(self, name: str, rows: slice):
        node = self._obs[name]
        encoding = node.attrs.get("encoding-type")
        if encoding == "categorical":
            self._check_length(node["codes"], name)
            return pd.Categorical.from_codes(node["codes"][rows], self._categories(name))
        if "categories" in node.attrs:  # codes, in files of 2019 to 2021
            self._check_length(node, name)
            if name not in self._cached:
                named = node.attrs["categories"]
                table = self._file[named] if isinstance(named, h5py.Reference) else self._obs[str(named)]
                self._cached[name] = ad.io.read_elem(table)
            return pd.Categorical.from_codes(node[rows], self._cached[name])
        if isinstance(node, self._groups):
            self._check_length(self._small(name), name)
            return self._small(name)[rows]  # nullable numbers, or anything else that a table may hold
        self._check_length(node, name)
        if isinstance(node, h5py.Dataset) and h5py.check_string_dtype(node.dtype) is not None:
            return node.asstr()[rows]
        values = node[rows]
        if values.dtype.kind in "biuf":
            return values.astype(values.dtype.newbyteorder("="), copy=False)
        return np.asarray(values, dtype=object)

    def _check_length(self, values, name: str):
        if tuple(values.shape) != (self.n_obs,):
            raise ValueError(f"obs[{name!r}] has the shape {tuple(values.shape)}, expected {self.n_obs} cells")

    def _categories(self, name: str):
        if name not in self._cached:
            self._cached[name] = ad.io.read_elem(self._obs[name]["categories"])
        return self._cached[name]

    def _small(self, name: str):
        if name not in self._cached:
            self._cached[name] = ad.io.read_elem(self._obs[name])
        return self._cached[name]

    @cached_property
    def _cached(self) -> dict:
        return {}

    def matrices(self) -> list[RowReader]:
        """X, where there is one, the layers and the embeddings."""
        known: _Raw | None = self.__dict__.get("raw")  # it is not read for this
        raw = [] if known is None else [known.X]
        return [*([] if self.X is None else [self.X]), *self.layers.values(), *self.obsm.values(), *raw]

    def __enter__(self) -> "AnnDataFile":
        return self

    def __exit__(self, *_):
        for reader in self.matrices():
            reader.close()
        if isinstance(self._file, h5py.File):
            self._file.close()


@dataclass
class _Raw:
    """What a file keeps under `raw`."""

    X: RowReader
    var: pd.DataFrame

    @property
    def var_names(self) -> pd.Index:
        return self.var.index


def unpacked(path: Path) -> Path:
    """
    A compressed file as a temporary one, which is removed when the process ends.

    Raises:
        OSError: the disk is full.
        ValueError: the file is not whole, or its content is larger than cells make it, or than half of the space that is left
            on the disk; nothing is left of it.
    """
    size = path.stat()
    return _unpacked(Path(os.path.realpath(path)), size.st_size, size.st_mtime_ns)


@cache
def _unpacked(path: Path, size: int, changed: int) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="pertstate-unpacked-")
    whole = Path(folder.name) / path.name.removesuffix(".gz")
    logger.info(f"{path}: unpacking {size:,} bytes to a temporary file")
    left = shutil.disk_usage(folder.name).free // 2
    try:
        with gzip.open(path, "rb") as packed, open(whole, "wb") as plain:
            while block := packed.read(_BLOCK):
                written = plain.tell() + len(block)
                if written > _MOST_PACKED * size + SMALL:
                    raise ValueError(
                        f"{path} of {size:,} bytes unpacks to more than {_MOST_PACKED} times as many, which no cells do; "
                        "unpack it with gunzip if you trust it"
                    )
                if written > left:
                    raise ValueError(
                        f"{path} unpacks to more than half of what is left on the disk of {folder.name} ({left:,} bytes); set "
                        "TMPDIR to a folder on a larger disk, or unpack it with gunzip"
                    )
                plain.write(block)
    except BaseException:
        folder.cleanup()
        raise
    _FOLDERS.append(folder)
    return whole


def read_labels(
    data: AnnDataFile, reader: StateProcessor, rows: slice = slice(None), dataset: str | None = None
) -> pd.DataFrame:
    """[`StateProcessor.labels`] of a range of cells. Only the columns that it needs are read."""
    return reader.labels_of(data.some_obs(rows, reader.label_columns), dataset)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir() and not is_zarr(path):
        raise ValueError(f"{path} is a folder; expected one .h5ad or .zarr file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()})")
    check_regular(path)
    return path


def _table(node) -> pd.DataFrame:
    """A table of cells or genes, with names that are text, as anndata reads them."""
    table = _native(ad.io.read_elem(node))
    return table.set_axis(table.index.astype(str))


# The genes of the files that were opened last. A run opens each file several times, and the names take the most of it.
_GENES: OrderedDict[str, tuple[tuple[int, ...], pd.DataFrame]] = OrderedDict()
_FILES_KEPT = 8


def _genes_of(file: h5py.File) -> pd.DataFrame:
    state = state_of(file.filename)
    known, table = _GENES.pop(file.filename, (None, None))
    if known != state or table is None:
        table = _table(file["var"])
    _GENES[file.filename] = state, table
    while len(_GENES) > _FILES_KEPT:
        _GENES.popitem(last=False)
    return table.copy(deep=False)


def _native(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its numbers in the byte order of this machine: pandas computes with no other."""
    dtypes = {name: column.dtype for name, column in table.items() if isinstance(column.dtype, np.dtype)}
    foreign = {name: dtype.newbyteorder("=") for name, dtype in dtypes.items() if not dtype.isnative}
    return table.astype(foreign) if foreign else table


@contextmanager
def naming(path: str | os.PathLike):
    """Puts the name of the file into errors about its content: a run may read many files."""
    try:
        yield
    except (KeyError, ValueError) as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if str(path) in message:
            raise
        kind = KeyError if isinstance(error, KeyError) else ValueError
        raise kind(f"{path}: {message}") from error


# Errors of the disk and of rights, where the file may be whole.
_NOT_THE_FILE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _reading(path: Path):
    """One clear error for whatever a broken file makes h5py, zarr and anndata raise."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # an inner block has said it
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        kind, size = (".zarr", "") if path.is_dir() else (".h5ad", f" ({path.stat().st_size:,} bytes)")
        raise ValueError(
            f"{path}{size} cannot be read as {kind}: {type(error).__name__}: {error}. "
            + (_made_of_another_format(path) or "Expected a whole AnnData file; copy or write it again")
        ) from error


# How an AnnData is made of files of other formats: by what stands in a file of HDF5, or by the ending of another.
_FORMATS: tuple[tuple[set[str], tuple[str, ...], str, str], ...] = (
    ({"row_attrs", "col_attrs"}, ("loom",), "a loom file", "anndata.io.read_loom(path)"),
    ({"matrix"}, (), "a matrix of 10x Genomics", "scanpy.read_10x_h5(path)"),
    ({"mod"}, ("h5mu",), "a MuData file", "mudata.read(path).mod[NAME]"),
    ({"assays"}, ("h5seurat", "rds"), "a Seurat object", "the R package SeuratDisk or sceasy"),
    (set(), ("mtx",), "a Matrix Market file", "scanpy.read_10x_mtx(folder), or scanpy.read_mtx(path).T"),
    (set(), ("csv", "tsv", "txt"), "a table of text", "scanpy.read_csv(path) or scanpy.read_text(path)"),
)


def _made_of_another_format(path: Path) -> str | None:
    """How an AnnData is made of a file of another format; None if it is of none that is known."""
    found: set[str] = set()
    if path.is_file() and h5py.is_hdf5(path):
        try:
            with h5py.File(path, "r") as file:
                found = set(file.keys())  # links are not followed
        except (OSError, RuntimeError):  # h5py raises the latter for a damaged table of names
            return None
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    for names, endings, format, how in _FORMATS:
        if (names and names <= found and "obs" not in found) or ending in endings:
            return f"It is {format}: make an AnnData of it with {how}, add the labels of its cells to obs, and write it as .h5ad"
    return None
