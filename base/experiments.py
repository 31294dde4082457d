"""What is to be predicted, as people say it: names, doses, everything that a model knows, tables of experiments."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from .cell_ids import cell_ids, order_of
from .doses import dose_text
from .labels import LabelReader
from .messages import closest
from .vocabulary import Vocabulary


NO_DOSES = (
    "this model was trained without doses: what it predicts at a dose is 'the effect times the dose', which no cell was measured "
    "for; train with dose_key to learn doses"
)
# Every single perturbation that the model was trained on.
ALL = "all"
# What an experiment says; the cells, and what is done to them.
CELLS, EXPERIMENT = "adata", ("perturbation", "context", "dose")


class Experiments:
    """How a processor reads what is asked for; a part of [`StateProcessor`], whose attributes these are."""

    vocabulary: Vocabulary
    dose_key: str | None
    doses: dict[str, list[float]] | None
    label_reader: LabelReader
    labels: Callable
    control_groups: Callable

    def named(self, perturbations: str | list[str], doses: float | list[float] | None = None) -> list[str]:
        """
        Canonical names of what is asked for, each once.

        Args:
            perturbations (`str` or `list[str]`): names, `"A+B"` for a combination, `"A@0.1"` with a dose; or `"all"`: every
                single perturbation that the model was trained on, where it knows doses at each of its own.
            doses (`float` or `list[float]`, *optional*): predict each perturbation at each of these doses.

        Raises:
            ValueError: nothing is named, or the model knows no doses.
        """
        every = perturbations == ALL and ALL not in self.vocabulary.perturbations
        names = list(self.vocabulary.perturbations if every else _listed(perturbations))
        if not names:
            raise ValueError("perturbation: expected at least one name, found an empty list")
        if doses is None:
            known = (self.doses or {}) if every else {}
            names = [
                at for name in names for at in [f"{name}@{dose_text(dose)}" for dose in known.get(name, ())] or [name]
            ]
            return list(dict.fromkeys(map(self.label_reader.named, map(str, names))))
        if self.dose_key is None:
            raise ValueError(f"doses={doses}: {NO_DOSES}")
        of_parts = [len([part for part, _ in self.label_reader.parts(name)]) for name in names]
        at_doses = [
            self.label_reader.at_doses(name, [dose] * number)
            for name, number in zip(names, of_parts)
            for dose in _listed(doses)
        ]
        return list(dict.fromkeys(at_doses))

    def experiments(self, inputs, defaults: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        """
        The experiments that are asked for, one after another, each as a dictionary of `adata`, `perturbation`, `context` and
        `dose`; and whether several were asked for.

        Args:
            inputs: an `AnnData`, the path of one, such a dictionary, a list of these, or a `DataFrame` with a row for each
                experiment.
            defaults (`dict`): what holds where an experiment does not say otherwise.

        Raises:
            TypeError: `inputs` is something else.
            ValueError: an experiment says something unknown, or lacks cells or perturbation.
        """
        several = isinstance(inputs, (list, tuple, pd.DataFrame))
        rows = inputs.to_dict("records") if isinstance(inputs, pd.DataFrame) else inputs if several else [inputs]
        found: list[dict[str, Any]] = []
        for row in rows:
            if isinstance(row, (ad.AnnData, str, os.PathLike)):
                row = {CELLS: row}
            if not isinstance(row, dict):
                raise TypeError(
                    f"expected an AnnData, a path, a dictionary of {[CELLS, *EXPERIMENT]}, a list of these or a DataFrame, found "
                    f"{type(row).__name__}"
                )
            for name in row:
                if name not in (CELLS, *EXPERIMENT):
                    raise ValueError(f"an experiment has no {name!r}; {closest(str(name), (CELLS, *EXPERIMENT))}")
            # An empty cell of a table says nothing.
            said = {name: value for name, value in row.items() if not _is_empty(value)}
            made = {**{name: value for name, value in defaults.items() if value is not None}, **said}
            for name in (CELLS, "perturbation"):
                if name not in made:
                    raise ValueError(
                        f"experiment {len(found) + 1} has no {name!r}; say it there, or for all experiments"
                    )
            found.append(made)
        return found, several

    def joined(self, parts: list[ad.AnnData]) -> ad.AnnData:
        """Predicted cells of one model, one after another."""
        return parts[0] if len(parts) == 1 else ad.concat(parts, merge="first", uns_merge="first")

    @contextmanager
    def control_cells(
        self, cells: ad.AnnData | str | os.PathLike, context=None, at_most: int | None = None, seed: int | None = 0
    ) -> Iterator[tuple[ad.AnnData, int]]:
        """
        An AnnData, that of a path where one is named, and how many control cells are used of it.

        Args:
            context (`str` or `list[str]`, *optional*): these contexts, all by default.
            at_most (`int`, *optional*): at most so many control cells of each, drawn with `seed`; the AnnData holds no others.
        """
        if at_most is not None and at_most < 1:
            raise ValueError(f"cells_per_perturbation must be at least 1, found {at_most}")
        adata = cells if isinstance(cells, ad.AnnData) else _opened(os.fspath(cells))
        file = adata.file if adata.isbacked and adata is not cells else None
        try:
            groups = self.control_groups(self.labels(adata), context)
            if at_most is not None:
                drawn = []
                for rows in groups.values():
                    order = slice(None) if seed is None else order_of(cell_ids(adata.obs_names[rows]), len(rows), seed)
                    drawn.append(rows[order][:at_most])
                rows = np.sort(np.concatenate(drawn))
                yield (adata[rows].to_memory() if adata.isbacked else adata[rows].copy()), len(rows)
            else:
                yield adata, sum(map(len, groups.values()))
        finally:
            if file is not None:
                file.close()


def _opened(path: str) -> ad.AnnData:
    """The AnnData of a path: `.zarr` in memory, other files on disk. FileNotFoundError if nothing is there."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file (looked from {os.getcwd()})")
    return ad.read_zarr(path) if path.rstrip("/\\").endswith(".zarr") else ad.read_h5ad(path, backed="r")


def _listed(values) -> list:
    return list(values) if isinstance(values, (list, tuple, set, np.ndarray, pd.Index, pd.Series)) else [values]


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, float) and value != value)


__all__ = ["ALL", "NO_DOSES", "Experiments"]
