"""The control cells that somebody gives the app: what a file holds, and how it is to be read."""

import os
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pertstate.base.messages import some
from pertstate.data.reading import AnnDataFile, naming, read_labels
from pertstate.evaluation.others_data import read_as
from pertstate.hub.trained import TrainedModel


@dataclass(frozen=True)
class Reading:
    """
    How the page says that a file is to be read.

    Args:
        keys (`dict[str, str]`): see [`read_as`]; what is empty is read as in the training data.
        all_are_controls (`bool`): every cell is a control.
        missing_genes (`bool`): genes of the model that the file lacks are read as not expressed.
        convert_scale (`bool`): log1p values of another scale are converted.
    """

    keys: dict[str, str] = field(default_factory=dict)
    all_are_controls: bool = False
    missing_genes: bool = False
    convert_scale: bool = False

    @property
    def given_keys(self) -> dict[str, str | None]:
        """The keys that say something."""
        return {name: text.strip() for name, text in self.keys.items() if text and text.strip()}


@dataclass(frozen=True)
class CellsFound:
    """
    What a file of cells holds.

    Args:
        cells (`int`): all of them.
        controls (`dict[str, int]`): the number of control cells of each context that has some.
        names_context (`bool`): the file says which context a cell has; if not, somebody has to name the one of all.
        note (`str`): what is read as not expressed because the file lacks it; may be empty.
    """

    cells: int
    controls: dict[str, int]
    names_context: bool
    note: str = ""


def look_at(trained: TrainedModel, path: str | os.PathLike, reading: Reading) -> CellsFound:
    """
    What a file holds for this model. Of its matrix, few cells are read.

    Args:
        trained ([`TrainedModel`]): the model.
        path: an `.h5ad`, from anybody: it is opened by the checked reader.
        reading ([`Reading`]): how it is to be read.

    Raises:
        KeyError, ValueError: the file is damaged or leaves itself, or lacks a column, control cells or genes of the model; the
            error names the file by the last part of its path.
    """
    with naming(os.path.basename(path)), AnnDataFile(path) as data:
        columns = data.obs_columns
        names_context = _names_context(trained, reading, columns)
        processor = read_as(
            trained.processor,
            data,
            reading.given_keys,
            None if names_context else ["all cells"],
            reading.all_are_controls,
            bool(trained.model.config.embeds_batches),
        )
        labels = read_labels(data, processor)
        is_control = (labels["perturbation"] == processor.control).to_numpy()
        counts = labels.loc[is_control, "context"].value_counts(sort=False)
        if not len(counts):
            found = pd.unique(labels["perturbation"].dropna())
            raise ValueError(
                f"no control cells: expected {processor.control!r} in obs[{processor.perturbation_key!r}], found {some(found, 5)}; "
                "say what control cells are called, or that every cell is a control"
            )
        note = ""
        if reading.missing_genes:
            note = processor.check_genes(data) or ""
        processor.check_scale(data, None, reading.convert_scale)
        # Of one cell, all that could be wrong with genes and values is found before anybody waits for a prediction.
        processor.features(data, np.flatnonzero(is_control)[:1], "zero" if reading.missing_genes else "error")
    return CellsFound(len(labels), {str(name): int(count) for name, count in counts.items()}, names_context, note)


def _names_context(trained: TrainedModel, reading: Reading, columns: list[str]) -> bool:
    processor = trained.processor
    key = reading.given_keys.get("context_key") or processor.context_key
    needed = set([key] if isinstance(key, str) else key or [])
    return processor.context is not None or "context_key" in reading.given_keys or needed <= set(columns)
