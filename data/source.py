"""Files as a source of cells: read block by block, labels first."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from pertstate.base.anndata_source import AnnDataSource, Part, PartReader, Places, Recipe
from pertstate.base.cell_ids import cell_ids
from pertstate.base.cell_source import WholeSource
from pertstate.base.gene_names import MAX_MISSING_GENES
from pertstate.data.in_memory import name_of, open_cells
from pertstate.data.reading import AnnDataFile, naming
from pertstate.processing import StateProcessor


@dataclass
class FilePart(Part):
    """
    A file, or an AnnData object, whose cells belong to a source.

    Args:
        path (`Path` or `AnnData`): where it is, or the object.
    """

    path: Path | ad.AnnData = Path()

    @contextmanager
    def open(self) -> Iterator[AnnDataFile]:
        with open_cells(self.path) as data, naming(self.named):
            yield data

    def obs(self, data: AnnDataFile, rows: slice, columns: list[str]) -> pd.DataFrame:
        return data.some_obs(rows, columns)

    @property
    def named(self) -> str:
        return name_of(self.path)


class NamedSource(WholeSource):
    """A source whose cells have barcodes."""

    @abstractmethod
    def cell_ids(self, rows: np.ndarray) -> np.ndarray:
        """A number for the barcode of each of some cells, see [`~pertstate.base.cell_ids.cell_ids`]."""


class FileSource(AnnDataSource, NamedSource):
    """
    The cells of files or of AnnData objects, read block by block.

    Args:
        datasets (`dict[str, list[Path | AnnData]]`): the files and objects of each dataset.
        reader ([`StateProcessor`]), contexts (`list[str]`, *optional*), convert_scale (`bool`), max_missing_genes (`float`): see
            [`AnnDataSource`].

    Raises:
        FileNotFoundError, KeyError, ValueError: see `read_h5ad` and [`AnnDataSource`].
    """

    parts: list[FilePart]  # type: ignore[assignment]  # which is all that this source puts there

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Path | ad.AnnData]],
        reader: StateProcessor,
        contexts: list[str] | None = None,
        convert_scale: bool = False,
        max_missing_genes: float = MAX_MISSING_GENES,
    ):
        parts = [FilePart(dataset, path=path) for dataset, paths in datasets.items() for path in paths]
        super().__init__(parts, reader, contexts, convert_scale, max_missing_genes)

    def cell_ids(self, rows: np.ndarray) -> np.ndarray:
        return self._ids[rows]

    @cached_property
    def _ids(self) -> np.ndarray:
        found, places = np.zeros(int(self.sizes.sum()), dtype=np.uint64), Places(self.sizes)
        for part in self.parts:
            with part.open() as data:
                kept = part.codes >= 0
                found[places.take(part.codes[kept])] = cell_ids(data.obs_names)[kept]
        return found


@contextmanager
def open_part(part: Part, recipe: Recipe) -> Iterator[PartReader]:
    """A reader of the cells of a file."""
    with part.open() as data:
        yield PartReader(data, part, recipe)
