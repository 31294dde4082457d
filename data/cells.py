"""Cells of one or several files, sorted into groups, with the splits that a run gives them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from pertstate.base.constants import Split
from pertstate.base.messages import closest
from pertstate.data.reading import naming, read_h5ad
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor, Vocabulary


if TYPE_CHECKING:
    from pertstate.data.store import StoredRows


GROUP_KEYS = ("dataset", "context", "perturbation", "batch")


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
    """

    features: "np.ndarray | StoredRows"
    genes: "np.ndarray | StoredRows | None"
    groups: pd.DataFrame

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


def with_rows(groups: pd.DataFrame, sizes: np.ndarray) -> pd.DataFrame:
    """The table of groups that follow one another, with the rows of each."""
    stops = np.cumsum(sizes, dtype=np.int64)
    return groups.assign(start=stops - sizes, stop=stops)


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
        raise ValueError(f"the splits leave no cell for training; found {found}")
    zero_shot = [splits.split_of_context(d, c) is not None for d, c in zip(groups["dataset"], groups["context"])]
    controls = (groups["split"] == Split.CONTROL) & groups["dataset"].isin(splits.training) & ~np.array(zero_shot)
    return ((groups["split"] == Split.TRAIN) | controls).to_numpy()


def keep_contexts(labels: pd.DataFrame, contexts: list[str] | None) -> np.ndarray:
    """Which rows of `labels` belong to the contexts that a run uses.

    Raises:
        ValueError: one of them is not there.
    """
    if contexts is None:
        return np.ones(len(labels), dtype=bool)
    found = sorted(labels["context"].unique())
    for context in contexts:
        if context not in found:
            raise ValueError(f"contexts names {context!r}, which is not in the data; {closest(context, found)}")
    return labels["context"].isin(contexts).to_numpy()


def load_cells(
    splits: Splits,
    contexts: list[str] | None = None,
    hvg_on_all: bool = False,
    processor: StateProcessor | None = None,
    controls_only: bool = False,
    **processor_options,
) -> tuple[Cells, StateProcessor]:
    """
    Read all files into memory, fit a processor on the training cells (or use the one given) and assign the splits.

    Args:
        splits ([`Splits`]): datasets and what is held out of them.
        contexts (`list[str]`, *optional*): use only these contexts of the files.
        hvg_on_all (`bool`): choose highly variable genes on all cells, including held-out ones. Use it only to repeat
            figures that were measured in this way.
        processor ([`StateProcessor`], *optional*): that of a checkpoint which is trained further. Names of training
            cells that it does not know are added after its own.
        controls_only (`bool`): only control cells are for training.
        processor_options: arguments of [`StateProcessor.fit`].

    Raises:
        ValueError, KeyError, FileNotFoundError: see [`Splits`], [`StateProcessor.fit`] and `read_h5ad`.
    """
    reader = processor or label_reader(processor_options)
    adatas: list[ad.AnnData] = []
    files, frames = [], []
    for name, paths in splits.datasets.items():
        for path in paths:
            data = read_h5ad(path)
            adatas.append(data)
            files.append(path)
            with naming(path):
                frames.append(reader.labels(data).assign(dataset=name))
    labels = pd.concat(frames, ignore_index=True)
    keep = keep_contexts(labels, contexts)
    if not keep.all():
        masks = np.split(keep, np.cumsum([data.n_obs for data in adatas])[:-1])
        adatas, labels = [data[mask] for data, mask in zip(adatas, masks)], labels[keep]
    files = [path for path, data in zip(files, adatas) if data.n_obs]
    adatas = [data for data in adatas if data.n_obs]
    if not adatas:
        raise ValueError("the files hold no cells")
    order, groups = sort_into_groups(labels)
    groups = assign_splits(groups, splits, reader.control)
    groups = controls_alone(groups) if controls_only else groups
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    ends = np.cumsum([data.n_obs for data in adatas])

    trained = trained_on(groups, splits, controls_only)
    if processor is not None:
        processor = widened(processor, groups[trained])
    else:
        sizes = groups["stop"] - groups["start"]
        in_training = np.repeat(trained, sizes)[place]
        processor = _fit(adatas, np.split(in_training, ends[:-1]), hvg_on_all, processor_options)
    check_names(groups, processor)
    decoded = processor.gene_input is not None
    features = np.empty((len(order), processor.feature_dim), dtype=np.float32)
    genes = np.empty((len(order), len(processor.vocabulary.genes)), dtype=np.float32) if decoded else None
    for path, data, rows in zip(files, adatas, np.split(place, ends[:-1])):
        with naming(path):
            features[rows] = processor.features(data)
            if genes is not None:
                genes[rows] = processor.gene_features(data)
    return Cells(features, genes, groups), processor


def training_names(groups: pd.DataFrame, reader: StateProcessor, genes: list[str]) -> Vocabulary:
    """The names of the groups that are trained on, sorted, and the given genes.

    Raises:
        ValueError: the reader has perturbation features, and a perturbation has no vector.
    """
    singles = sorted({part for name in groups["perturbation"].unique() for part in reader.split_combination(name)})
    if reader.perturbation_features is not None:
        reader.perturbation_features.check_covers(singles, "of the training cells")
    batches = sorted(groups["batch"].unique()) if "batch" in groups else []
    return Vocabulary(genes, singles, sorted(groups["context"].unique()), batches)


def widened(processor: StateProcessor, groups: pd.DataFrame) -> StateProcessor:
    """A checkpoint's processor that also knows the names of these groups, on which its model is trained further."""
    return processor.with_vocabulary(processor.vocabulary.merged(training_names(groups, processor, [])))


def label_reader(options: dict) -> StateProcessor:
    """A processor that can read labels and knows nothing else yet."""
    names = ("perturbation_key", "control", "context_key", "batch_key", "combination_separator")
    return StateProcessor(**{name: options[name] for name in names if name in options})


def _fit(adatas: list[ad.AnnData], masks: list[np.ndarray], hvg_on_all: bool, options: dict) -> StateProcessor:
    """A processor of the training cells alone; with `hvg_on_all` its genes come from all cells."""
    training = [data[mask] for data, mask in zip(adatas, masks) if mask.any()]
    if hvg_on_all and isinstance(options.get("genes"), int):
        everything = StateProcessor.fit(adatas, **{**options, "perturbation_features": None})
        options = {**options, "genes": everything.vocabulary.genes}
    return StateProcessor.fit(training, **options)


def check_names(groups: pd.DataFrame, processor: StateProcessor):
    """
    Check that every perturbation has one name, and that a model can be asked for each held-out one.

    Raises:
        ValueError: one perturbation has two labels in the data, for example `A+B` and `B+A`, or `A` and `A+control`:
            its cells could be in two splits. Or a held-out perturbation has no training cell in any context; or, with
            perturbation features, it has no vector.
    """
    by_parts: dict[tuple[str, ...], str] = {}
    for name in pd.unique(groups["perturbation"]):
        first = by_parts.setdefault(tuple(sorted(processor.split_combination(name))), name)
        if first != name:
            raise ValueError(
                f"labels {first!r} and {name!r} name the same perturbation; give all of its cells one label, or set "
                "combination_separator to null if they differ"
            )
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
                f"{len(unknown)} perturbations held out for {split} have no training cell in any context, so a model "
                f"on perturbation ids cannot predict them: {unknown[:10]}; hold out others, or train on "
                "perturbation_features"
            )
