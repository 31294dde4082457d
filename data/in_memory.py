"""AnnData objects where files are read."""

import os
from typing import Any, TypeAlias

import anndata as ad
import pandas as pd

from pertstate.data.reading import AnnDataFile


# Cells: the path of a `.h5ad` or `.zarr`, or an object.
CellData: TypeAlias = str | os.PathLike | ad.AnnData

IN_MEMORY = "the AnnData in memory"


class AnnDataInMemory(AnnDataFile):
    """
    An AnnData object that is read as a file is. It is not changed.

    Args:
        adata (`AnnData`): the cells.

    Raises:
        ValueError: its cells are on disk (`backed`).
    """

    def __init__(self, adata: ad.AnnData):
        if adata.isbacked:
            raise ValueError(
                f"expected an AnnData in memory, found one that is backed by {adata.filename}; give the path of that file, or "
                "adata.to_memory()"
            )
        self.path: Any = IN_MEMORY
        self._file, self._whole_obs = None, True
        self.obs, self.var = _with_text_index(adata.obs), _with_text_index(adata.var)
        self.n_obs, self.var_names = adata.n_obs, self.var.index
        self.X: Any = adata.X
        self.layers, self.obsm = dict(adata.layers), dict(adata.obsm)
        self.raw, self.uns = adata.raw, dict(adata.uns)

    def matrices(self) -> list:
        return []


def open_cells(data: CellData) -> AnnDataFile:
    """
    Cells to read, as a context manager.

    Raises:
        TypeError: it is neither an AnnData nor a path.
        FileNotFoundError, ValueError: see [`AnnDataFile`] and [`AnnDataInMemory`].
    """
    check_cells("cells", data)
    return AnnDataInMemory(data) if isinstance(data, ad.AnnData) else AnnDataFile(data)


def check_cells(name: str, data: object):
    """TypeError if what an argument `name` gives is neither an AnnData nor a path."""
    if not isinstance(data, str | os.PathLike | ad.AnnData):
        raise TypeError(f"{name}: expected an AnnData or a path, found {type(data).__name__}")


def name_of(data: CellData) -> str:
    """What errors call cells."""
    return IN_MEMORY if isinstance(data, ad.AnnData) else str(data)


def _with_text_index(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_axis(table.index.astype(str))
