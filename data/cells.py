"""Cells of one or several files, sorted into groups, with the splits that a run gives them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pertstate.base.cell_source import GROUP_KEYS, ROOM, Room, fit_processor, further_processor, with_rows
from pertstate.base.constants import Normalize, Split
from pertstate.base.messages import counted
from pertstate.data.coexpression import coexpression_features
from pertstate.data.source import FileSource, NamedSource
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from pertstate.data.store import StoredRows


@dataclass
class Cells:
    """
    Cells ready for training: features in the model's order, and the groups that the cells are in.

    Args:
        features (`np.ndarray` or [`StoredRows`], of shape `(cells, feature_dim)`): float32, in the model's units; in
            memory, or read from a store when they are asked for.
        genes (`np.ndarray` or [`StoredRows`], of shape `(cells, genes)`, *optional*): target of the gene decoder, log1p
            expression.
        groups (`pandas.DataFrame`): one row for each dataset, context, perturbation (and batch, where there are
            batches), in that order: these columns, `split` (`"train"`, `"val"`, `"test"`, `"control"` or `"unused"`),
            and `start` and `stop`, the rows of its cells.
        notes (`list[str]`): what was left out when the cells were read, in sentences.
        ids (`Callable`, *optional*): gives a number for the barcode of each of some rows, see
            [`~pertstate.base.cell_ids.cell_ids`]; None where cells have no barcodes.
    """

    features: "np.ndarray | StoredRows"
    genes: "np.ndarray | StoredRows | None"
    groups: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    ids: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return int((self.groups["stop"] - self.groups["start"]).sum())

    @property
    def obs(self) -> pd.DataFrame:
        """The labels of every cell, categorical: `dataset`, `context`, `perturbation`, `batch`, `split`."""
        return expand_groups(self.groups)

    def batch_names(self, rows: np.ndarray) -> np.ndarray:
        """The batch of some cells."""
        group = np.searchsorted(self.groups["start"].to_numpy(), rows, side="right") - 1
        return self.groups["batch"].to_numpy()[group]


def expand_groups(groups: pd.DataFrame) -> pd.DataFrame:
    """The labels of groups, once for each of their cells."""
    sizes = (groups["stop"] - groups["start"]).to_numpy()
    labels = groups.drop(columns=["start", "stop"]).astype("category")
    return labels.iloc[np.repeat(np.arange(len(groups)), sizes)].reset_index(drop=True)


def sort_into_groups(labels: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """
    Sort cells by their groups.

    Args:
        labels (`pandas.DataFrame`): columns of `GROUP_KEYS`, the batch optional; one row for each cell.

    Returns:
        `(np.ndarray, pandas.DataFrame)`: the order that puts the cells of each group beside one another, in which cells
        of one group keep their order; and the table of the groups.
    """
    by = [name for name in GROUP_KEYS if name in labels.columns]
    grouped = labels.reset_index(drop=True).groupby(by, observed=True, sort=True)
    sizes = grouped.size()
    order = np.argsort(grouped.ngroup().to_numpy(), kind="stable")
    groups = sizes.index.to_frame(index=False)
    return order, with_rows(groups, sizes.to_numpy())


def assign_splits(groups: pd.DataFrame, splits: Splits, control: str) -> pd.DataFrame:
    """The table of groups with the split of each.

    Raises:
        ValueError: the splits name something that is not in the data.
    """
    present: dict[tuple[str, str], list[str]] = {
        tuple(pair): [] for pair in groups[["dataset", "context"]].drop_duplicates().to_numpy()
    }
    perturbed = groups[groups["perturbation"] != control]
    for *pair, name in perturbed[["dataset", "context", "perturbation"]].drop_duplicates().to_numpy():
        present[pair[0], pair[1]].append(name)
    assigned = splits.assign(present)
    keys = zip(groups["dataset"], groups["context"], groups["perturbation"])
    return groups.assign(
        split=[Split.CONTROL if key[2] == control else (assigned[key] or Split.UNUSED) for key in keys]
    )


def controls_alone(groups: pd.DataFrame) -> pd.DataFrame:
    """The table of groups for a run that trains on control cells alone: perturbed training cells become unused."""
    return groups.assign(split=groups["split"].where(groups["split"] != Split.TRAIN, Split.UNUSED))


def trained_on(groups: pd.DataFrame, splits: Splits, controls_only: bool = False) -> np.ndarray:
    """
    Which groups a processor may learn from: those for training, and the controls of every context that is not held out
    as a whole. With `controls_only`, all controls and nothing else.

    Raises:
        ValueError: nothing is for training.
    """
    if controls_only:
        return (groups["split"] == Split.CONTROL).to_numpy()
    if not (groups["split"] == Split.TRAIN).any():
        found = (groups["stop"] - groups["start"]).groupby(groups["split"]).sum().to_dict()
        raise ValueError(
            f"the splits leave no cell for training; found {found}; hold out fewer contexts or perturbations"
        )
    zero_shot = [splits.split_of_context(d, c) is not None for d, c in zip(groups["dataset"], groups["context"])]
    controls = (groups["split"] == Split.CONTROL) & groups["dataset"].isin(splits.training) & ~np.array(zero_shot)
    return ((groups["split"] == Split.TRAIN) | controls).to_numpy()


def load(source: NamedSource, splits: Splits, **options) -> tuple[Cells, StateProcessor]:
    """The cells of a source for a run, with their splits, and their processor; see [`choose`]."""
    groups, processor = choose(source, splits, **options)
    return read_cells(source, groups, processor), processor


def read_cells(source: NamedSource, groups: pd.DataFrame, processor: StateProcessor, room: Room = ROOM) -> Cells:
    """
    The cells of a source.

    Args:
        source ([`NamedSource`]): the cells.
        groups (`pandas.DataFrame`), processor ([`StateProcessor`]): see [`choose`].
        room ([`Room`]): the memory that they are put into.
    """
    return Cells(*source.features(processor, room), groups, source.notes, source.cell_ids)


def choose(
    source: NamedSource,
    splits: Splits,
    hvg_on_all: bool = False,
    processor: StateProcessor | None = None,
    controls_only: bool = False,
    coexpression: bool = False,
    **fit_options,
) -> tuple[pd.DataFrame, StateProcessor]:
    """
    The groups of a source for a run, with their splits, and a processor fitted on the training cells (or the one given).

    Args:
        source ([`NamedSource`]): the cells.
        splits ([`Splits`]): what is held out of them.
        hvg_on_all (`bool`): choose highly variable genes on all cells, including held-out ones. Use it only to repeat
            figures that were measured in this way.
        processor ([`StateProcessor`], *optional*): that of a checkpoint which is trained further. Names of training
            cells that it does not know are added after its own.
        controls_only (`bool`): only control cells are for training.
        coexpression (`bool`): give a new processor the vectors of [`coexpression_features`].
        fit_options: `genes`, `normalize` and `target_sum` of [`fit_processor`].

    Raises:
        KeyError, ValueError: see [`Splits`] and [`fit_processor`]; the source lacks something that is asked for, or does
            not hold what the processor reads.
    """
    splits = splits.canonical(source.reader.canonical, source.groups)
    groups = assign_splits(source.groups, splits, source.reader.control)
    groups = controls_alone(groups) if controls_only else groups
    trained = trained_on(groups, splits, controls_only)
    if processor is not None:
        processor = further_processor(source, processor, trained)
    else:
        everything = np.ones(len(groups), dtype=bool) if hvg_on_all else None
        processor = fit_processor(source, source.reader, trained, chosen_on=everything, **fit_options)
        if coexpression:
            controls = trained & (groups["split"] == Split.CONTROL).to_numpy()
            used = groups.loc[groups["split"].isin([Split.TRAIN, Split.VAL, Split.TEST]), "perturbation"].unique()
            singles = sorted({part for name in used for part in processor.split_combination(name)})
            features = coexpression_features(source, processor, controls, singles)
            processor = processor.with_vocabulary(processor.vocabulary, perturbation_features=features)
    check_names(groups, processor)
    return groups, processor


def load_cells(
    splits: Splits,
    contexts: list[str] | None = None,
    genes: int | list[str] | None = None,
    normalize: str = Normalize.AUTO,
    target_sum: float | str | None = None,
    hvg_on_all: bool = False,
    processor: StateProcessor | None = None,
    controls_only: bool = False,
    **reading,
) -> tuple[Cells, StateProcessor]:
    """
    The cells of files, read into memory block by block; see [`load`].

    Args:
        splits ([`Splits`]): the files of each dataset, and what is held out of them.
        contexts (`list[str]`, *optional*): use only these contexts of the files.
        genes, normalize, target_sum: see [`StateProcessor.fit`].
        reading: the arguments of [`StateProcessor`] that say how files are read.
    """
    reader = processor or StateProcessor(**reading)
    options: dict[str, Any] = (
        {} if processor is not None else {"genes": genes, "normalize": normalize, "target_sum": target_sum}
    )
    source = FileSource(splits.datasets, reader, contexts)
    return load(source, splits, hvg_on_all=hvg_on_all, processor=processor, controls_only=controls_only, **options)


def check_names(groups: pd.DataFrame, processor: StateProcessor):
    """
    Check that a model can be asked for each held-out perturbation.

    Raises:
        ValueError: a held-out perturbation has no training cell in any context; or, with perturbation features, it has no
            vector.
    """
    known, features = set(processor.vocabulary.perturbations), processor.perturbation_features
    for split in (Split.VAL, Split.TEST):
        names = pd.unique(groups.loc[groups["split"] == split, "perturbation"])
        if features is not None:
            singles = {part for name in names for part in processor.split_combination(name)}
            features.check_covers(singles, f"held out for {split}")
            continue
        unknown = [n for n in names if not set(processor.split_combination(n)) <= known]
        if unknown:
            raise ValueError(
                f"{counted(len(unknown), 'perturbation')} held out for {split} without a training cell in any context, of the whole or "
                f"of a part, so a model on perturbation ids cannot predict them: {unknown[:10]}; hold out others, or train on "
                "perturbation_features"
            )
