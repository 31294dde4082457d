"""The columns of a file that say what was done to each cell, and the labels of its controls, found by their names."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from pertstate.base.labels import control_settings, suggested_controls
from pertstate.base.messages import instead, some
from pertstate.data.reading import AnnDataFile
from pertstate.processing import StateProcessor


# The names that public screens use, in the order in which they are looked for.
KEYS = {
    "perturbation_key": (
        "perturbation",
        "gene",
        "target_gene",
        "gene_target",
        "condition",
        "drug",
        "treatment",
        "guide",
    ),
    "context_key": ("cell_type", "cell_line", "celltype", "cell_line_id", "context"),
    "batch_key": ("batch", "gem_group", "plate", "replicate", "donor", "sample"),
}


@dataclass(frozen=True)
class FoundColumns:
    """
    Where the labels of a file stand.

    Args:
        keys (`dict[str, str | None]`): the column of each of [`KEYS`]; None where none was found.
        control (`str`, `list[str]` or None): the labels of control cells, where any look like it.
        labels (`list[str]`): the labels of perturbations as they stand in the file.
        table (`pandas.DataFrame`): the columns found, of every cell.
    """

    keys: dict[str, str | None]
    control: Any
    labels: list[str]
    table: pd.DataFrame

    def missing_columns(self, columns: list[str]) -> list[str]:
        """Which columns are needed and were not found, in sentences; `columns` are those of obs."""
        needed = ("perturbation_key", "context_key")
        return [f"no column found for {name}; obs has {some(columns)}" for name in needed if self.keys[name] is None]

    def missing_control(self) -> list[str]:
        """That no label looks like the control, in a sentence, if so."""
        if self.control is not None:
            return []
        return [f"no label looks like the control, found {some(self.labels)}; name it with control="]

    def reader(self, unlabelled: str = "error") -> StateProcessor:
        """Reads the labels of the file; `unlabelled` as in [`LabelSettings`]."""
        keys: dict[str, Any] = {**self.keys, "unlabelled": unlabelled}
        return StateProcessor(**keys, **control_settings(self.control or "control"))


def find_columns(data: AnnDataFile, control: Any = None, **given: str | None) -> FoundColumns:
    """
    Find the columns and the controls of a file, where they are not given.

    Args:
        data ([`AnnDataFile`]): the open file.
        control (`str`, `list[str]` or `dict`, *optional*): labels of control cells.
        given: `perturbation_key`, `context_key`, `batch_key`.

    Raises:
        KeyError: obs lacks a column that is given; the nearest is named.
    """
    columns, keys = data.obs_columns, {name: given.get(name) for name in KEYS}
    for name, key in keys.items():
        if key is not None and key not in columns:
            raise KeyError(f"obs has no column {key!r} ({name}), {instead(key, columns)}")
        taken = [of for of in keys.values() if of is not None]
        free = (column for column in KEYS[name] if column in columns and column not in taken)
        keys[name] = key or next(free, None)
    table = data.some_obs(slice(None), list(dict.fromkeys(key for key in keys.values() if key is not None)))
    perturbation_key = keys["perturbation_key"]
    labels = [] if perturbation_key is None else table[perturbation_key].dropna().astype(str).unique().tolist()
    return FoundColumns(keys, control or suggested_controls(labels), labels, table)
