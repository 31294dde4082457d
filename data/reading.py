"""Reading `.h5ad` files, with one clear error for a file that is not whole."""

import os
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp


def expand_paths(pattern: str | os.PathLike) -> list[Path]:
    """The `.h5ad` files that a file, folder or glob names.

    Raises:
        FileNotFoundError: there is none.
    """
    text = os.path.expandvars(os.path.expanduser(str(pattern)))
    path = Path(text)
    if path.is_dir():
        files = sorted(path.glob("*.h5ad"))
    elif any(character in text for character in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file())
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"{text}: no such file, folder of .h5ad files or glob (looked from {Path.cwd()})")
    return files


def read_h5ad(path: str | os.PathLike) -> ad.AnnData:
    """A whole AnnData from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole `.h5ad` file.
    """
    path = _existing(path)
    with _reading(path):
        return ad.read_h5ad(path)


class H5ADFile:
    """
    An `.h5ad` on disk whose matrices, layers and embeddings are read row by row: bounded memory, whatever its size.

    Has the attributes of an AnnData that [`StateProcessor`] reads (`obs`, `var_names`, `obs_names`, `n_obs`, `X`,
    `layers`, `obsm`, `uns`), and nothing else. Use as a context manager.

    Raises:
        FileNotFoundError, ValueError: as [`read_h5ad`].
    """

    def __init__(self, path: str | os.PathLike):
        self.path = _existing(path)
        with ExitStack() as on_error, _reading(self.path):
            self._file = on_error.enter_context(h5py.File(self.path, "r"))
            self.obs = ad.io.read_elem(self._file["obs"])
            self.var_names = ad.io.read_elem(self._file["var"]).index
            self.obs_names, self.n_obs = self.obs.index, len(self.obs)
            self.X = RowReader(self._file["X"], self.path) if "X" in self._file else None
            self.layers = self._readers("layers")
            self.obsm = self._readers("obsm")
            self.uns = ad.io.read_elem(self._file["uns"]) if "uns" in self._file else {}
            on_error.pop_all()

    def _readers(self, name: str) -> dict[str, "RowReader"]:
        return {key: RowReader(node, self.path) for key, node in self._file[name].items()} if name in self._file else {}

    def __enter__(self) -> "H5ADFile":
        return self

    def __exit__(self, *_):
        self._file.close()


class RowReader:
    """
    Rows of a matrix on disk, as ndarray or CSR. Rows near one another are read in one go, with those between them,
    but never more than `_block` rows at once.

    Dense and CSR matrices are read row by row. The rows of a CSC matrix do not stand together, so that it is read
    whole, at first use.
    """

    _gap, _block = 64, 512

    def __init__(self, node: "h5py.Dataset | h5py.Group", path: Path):
        self.path, self._node = path, node

    @cached_property
    def _matrix(self):
        if isinstance(self._node, h5py.Dataset):
            return self._node
        if self._node.attrs.get("encoding-type") == "csr_matrix":
            return ad.io.sparse_dataset(self._node)
        whole = ad.io.read_elem(self._node)
        return whole.tocsr() if sp.issparse(whole) else np.asarray(whole)

    @property
    def shape(self) -> tuple[int, ...]:
        with _reading(self.path):
            return tuple(self._matrix.shape)

    def __getitem__(self, rows: "slice | np.ndarray"):
        with _reading(self.path):
            if isinstance(rows, slice) or len(rows) == 0:
                return self._matrix[rows if isinstance(rows, slice) else slice(0, 0)]
            rows = np.asarray(rows)
            far = np.abs(np.diff(rows, prepend=rows[0])) > self._gap
            breaks = np.flatnonzero(far | (np.diff(rows // self._block, prepend=rows[0] // self._block) != 0))
            parts = []
            for segment in np.split(rows, breaks):
                first = int(segment.min())
                parts.append(self._matrix[first : int(segment.max()) + 1][segment - first])
            return sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected one .h5ad file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()})")
    return path


@contextmanager
def _reading(path: Path):
    """One clear error for whatever a broken file makes h5py and anndata raise."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as .h5ad: {type(error).__name__}: {error}. "
            "Expected a whole AnnData file; copy or write it again"
        ) from error
