"""Cells of one or several files in memory, with their labels and splits."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd

from cellstate.configuration_state import closest
from cellstate.data.reading import read_h5ad
from cellstate.data.splits import Splits
from cellstate.processing import StateProcessor


@dataclass
class Cells:
    """
    Cells ready for training: features in the model's order and one row of labels each.

    Args:
        features (`np.ndarray` of shape `(cells, feature_dim)`): float32, in the model's units.
        genes (`np.ndarray` of shape `(cells, genes)`, *optional*): target of the gene decoder, log1p expression.
        obs (`pandas.DataFrame`): columns `dataset`, `context`, `perturbation`, `batch` (where there are batches) and
            `split` (`"train"`, `"val"`, `"test"`, `"control"` or `"unused"`), categorical.
    """

    features: np.ndarray
    genes: np.ndarray | None
    obs: pd.DataFrame

    def __len__(self) -> int:
        return len(self.features)


def load_cells(
    splits: Splits,
    contexts: list[str] | None = None,
    hvg_on_all: bool = False,
    processor: StateProcessor | None = None,
    **processor_options,
) -> tuple[Cells, StateProcessor]:
    """
    Read all files, fit a processor on the training cells (or use the one given) and assign the splits.

    Args:
        splits ([`Splits`]): datasets and what is held out of them.
        contexts (`list[str]`, *optional*): use these contexts of the files alone.
        hvg_on_all (`bool`): choose highly variable genes on all cells, held-out ones too. Only to repeat figures
            that were measured so.
        processor ([`StateProcessor`], *optional*): one that exists, of a checkpoint that is trained further.
        processor_options: arguments of [`StateProcessor.fit`].

    Raises:
        ValueError, KeyError, FileNotFoundError: see [`Splits`], [`StateProcessor.fit`] and `read_h5ad`.
    """
    reader = processor or StateProcessor(
        **{
            name: processor_options[name]
            for name in ("perturbation_key", "control", "context_key", "batch_key", "combination_separator")
            if name in processor_options
        }
    )
    adatas: list[ad.AnnData] = []
    frames = []
    for name, paths in splits.datasets.items():
        for path in paths:
            data = read_h5ad(path)
            labels = reader.labels(data)
            if contexts is not None:
                keep = labels["context"].isin(contexts).to_numpy()
                data, labels = data[keep], labels[keep]
            if data.n_obs:
                adatas.append(data)
                frames.append(labels.assign(dataset=name))
    if contexts is not None:
        found = sorted({c for frame in frames for c in frame["context"]})
        for context in contexts:
            if context not in found:
                raise ValueError(f"contexts names {context!r}, which is not in the data; {closest(context, found)}")
    if not adatas:
        raise ValueError("the files hold no cells")
    obs = pd.concat(frames)
    present = {tuple(pair): [] for pair in obs[["dataset", "context"]].drop_duplicates().to_numpy()}
    perturbed = obs[obs["perturbation"] != reader.control]
    for *pair, name in perturbed[["dataset", "context", "perturbation"]].drop_duplicates().to_numpy():
        present[tuple(pair)].append(name)
    assigned = splits.assign(present)
    keys = zip(obs["dataset"], obs["context"], obs["perturbation"])
    obs["split"] = ["control" if key[2] == reader.control else (assigned[key] or "unused") for key in keys]

    if processor is None:
        zero_shot = pd.MultiIndex.from_tuples(list(splits.zeroshot), names=["dataset", "context"])
        of_context = pd.MultiIndex.from_frame(obs[["dataset", "context"]])
        in_training = (obs["split"] == "train") | (
            (obs["split"] == "control") & obs["dataset"].isin(splits.training) & ~of_context.isin(zero_shot)
        )
        if not (obs["split"] == "train").any():
            raise ValueError(
                "the splits leave no cell for training; found " + str(obs["split"].value_counts().to_dict())
            )
        processor = _fit(adatas, in_training.to_numpy(), hvg_on_all, processor_options)
    features = np.concatenate([processor.features(data) for data in adatas])
    genes = None
    if processor.gene_input is not None:
        genes = np.concatenate([processor.gene_features(data) for data in adatas])
    _check_one_name_each(pd.unique(obs["perturbation"]), processor)
    _check_expressible(obs, processor)
    return Cells(features, genes, obs.astype("category")), processor


def _fit(adatas: list[ad.AnnData], in_training: np.ndarray, hvg_on_all: bool, options: dict) -> StateProcessor:
    """A processor of the training cells alone; with `hvg_on_all` its genes come from all cells."""
    ends = np.cumsum([data.n_obs for data in adatas])
    masks = np.split(in_training, ends[:-1])
    training = [data[mask] for data, mask in zip(adatas, masks) if mask.any()]
    if hvg_on_all and isinstance(options.get("genes"), int):
        everything = StateProcessor.fit(adatas, **{**options, "perturbation_features": None})
        options = {**options, "genes": everything.vocabulary.genes}
    return StateProcessor.fit(training, **options)


def _check_one_name_each(names, processor: StateProcessor):
    """`A+B` and `B+A` (or `A` and `A+control`) are one perturbation: under two names it could stand in two splits."""
    by_parts: dict[tuple[str, ...], str] = {}
    for name in map(str, names):
        first = by_parts.setdefault(tuple(sorted(processor.split_combination(name))), name)
        if first != name:
            raise ValueError(
                f"labels {first!r} and {name!r} name the same perturbation; give all of its cells one label, or set "
                "combination_separator to null if they differ"
            )


def _check_expressible(obs: pd.DataFrame, processor: StateProcessor):
    """A held-out perturbation needs training cells, or with perturbation features a vector: an error lists the others."""
    known, features = set(processor.vocabulary.perturbations), processor.perturbation_features
    for split in ("val", "test"):
        names = pd.unique(obs.loc[obs["split"] == split, "perturbation"])
        if features is not None:
            singles = {part for name in names for part in processor.split_combination(str(name))}
            features.check_covers(singles, f"held out for {split}")
            continue
        unknown = [n for n in names if not set(processor.split_combination(str(n))) <= known]
        if unknown:
            raise ValueError(
                f"{len(unknown)} perturbations held out for {split} have no training cell in any context, so a model "
                f"on perturbation ids cannot predict them: {unknown[:10]}; hold out others, or train on "
                "perturbation_features"
            )
