"""Cell sentences: sets of perturbed cells, each with a set of matching control cells."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from cellstate.configuration_state import closest
from cellstate.data.cells import Cells
from cellstate.modeling_perturbation import (
    BATCH_IDS,
    CELL_MASK,
    CONTEXT_IDS,
    CONTROL_CELLS,
    GENE_LABELS,
    LABELS,
)
from cellstate.processing import StateProcessor


@dataclass(frozen=True)
class Group:
    """Cells of one dataset, context and perturbation (and batch), and the control cells that match them."""

    dataset: str
    context: str
    perturbation: str
    batch: str | None
    rows: np.ndarray
    controls: np.ndarray


class SentenceDataset(Dataset):
    """
    Sentences of one split, drawn anew each epoch.

    A sentence is up to `set_size` perturbed cells of one [`Group`] and as many control cells of the same dataset and
    context (and batch). In an epoch each perturbed cell stands in exactly one sentence; controls are drawn without
    replacement within a sentence. The order and the draws depend on `seed` and the epoch alone.

    Args:
        cells ([`Cells`]): features and labels.
        processor ([`StateProcessor`]): encodes the labels.
        split (`str`): `"train"`, `"val"` or `"test"`.
        set_size (`int`): cells of a sentence.
        seed (`int`): of the draws.
        control_matching (`str`): which controls belong to a perturbed cell.

            - `"context"`: those of its dataset and context
            - `"batch"`: those of its dataset, context and batch
        small_groups (`str`): what becomes of a group with fewer cells than `set_size`.

            - `"pad"`: a shorter sentence, padded with a mask in its batch
            - `"repeat"`: in training, its cells (and controls) are repeated at random up to `set_size`; in evaluation
              every cell counts once, as with `"pad"`
        control_sentences (`bool`): in training, also map control cells to control cells of their context.
        heldout_controls (`bool`): let the control cells of contexts without any training perturbation take part in
            those control sentences.
        shuffle (`bool`): shuffle cells and sentences each epoch. Off, sentences stand group by group.
        multiple_of (`int`): leave out the last few sentences of each epoch so that their number is a multiple of this
            (the sentences of an optimiser step); the next epoch draws anew.

    Raises:
        ValueError: a group has no matching controls, or the split has no cells.
    """

    def __init__(
        self,
        cells: Cells,
        processor: StateProcessor,
        split: str,
        set_size: int,
        seed: int = 0,
        control_matching: str = "context",
        small_groups: str = "pad",
        control_sentences: bool = True,
        heldout_controls: bool = True,
        shuffle: bool = True,
        multiple_of: int = 1,
    ):
        for name, value, allowed in (
            ("control_matching", control_matching, ("context", "batch")),
            ("small_groups", small_groups, ("pad", "repeat")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}; {closest(value, allowed)}")
        if control_matching == "batch" and "batch" not in cells.obs:
            raise ValueError("control_matching='batch' needs batch_key, the obs column with each cell's batch")
        self.cells, self.processor = cells, processor
        self.set_size, self.seed, self.shuffle = set_size, seed, shuffle
        self.repeat = small_groups == "repeat" and split == "train"
        self.groups = _make_groups(
            cells.obs,
            processor.control,
            split,
            control_matching,
            control_sentences and split == "train",
            heldout_controls,
        )
        # Groups of one perturbation share its ids or features, which may be wide.
        names, self._perturbation = np.unique([group.perturbation for group in self.groups], return_inverse=True)
        self.perturbations = processor.encode(names)
        self.context_ids = processor.encode_contexts([group.context for group in self.groups])
        self.batch_ids = None
        if "batch" in cells.obs:
            categories = processor.encode_batches(cells.obs["batch"].cat.categories)
            self.batch_ids = categories[cells.obs["batch"].cat.codes.to_numpy()]
        self.multiple_of = multiple_of
        self.set_epoch(0)
        if not self._sentences:
            raise ValueError(
                f"split {split!r} makes {self._drawn} sentences of up to {set_size} cells, fewer than the {multiple_of} of "
                "one optimiser step; lower per_device_train_batch_size, gradient_accumulation_steps or set_size"
            )

    def set_epoch(self, epoch: int):
        """Draw the sentences of this epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        sentences = []
        for index, group in enumerate(self.groups):
            rows = generator.permutation(group.rows) if self.shuffle else group.rows
            largest = min(self.set_size, len(group.controls))
            sentences += [(index, part) for part in np.array_split(rows, -(-len(rows) // largest))]
        order = generator.permutation(len(sentences)) if self.shuffle else np.arange(len(sentences))
        order = order[: len(sentences) // self.multiple_of * self.multiple_of]
        self.epoch, self._drawn, self._sentences = epoch, len(sentences), [sentences[i] for i in order]

    def __len__(self) -> int:
        return len(self._sentences)

    def rows(self, i: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Group number, perturbed rows and control rows of sentence `i` in this epoch."""
        index, targets = self._sentences[i]
        group = self.groups[index]
        generator = np.random.default_rng([self.seed, self.epoch, i, 1])
        if self.repeat and len(targets) < self.set_size:
            extra = self.set_size - len(targets)
            targets = np.concatenate([targets, generator.choice(targets, extra)])
            if len(group.controls) < self.set_size:
                extra = self.set_size - len(group.controls)
                drawn = np.concatenate([group.controls, generator.choice(group.controls, extra)])
                return index, targets, drawn
        return index, targets, generator.choice(group.controls, len(targets), replace=False)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        index, targets, controls = self.rows(i)
        sentence = {
            CONTROL_CELLS: self.cells.features[controls],
            LABELS: self.cells.features[targets],
            **{key: values[self._perturbation[index]] for key, values in self.perturbations.items()},
            CONTEXT_IDS: self.context_ids[index],
        }
        if self.batch_ids is not None:
            sentence[BATCH_IDS] = self.batch_ids[controls]
        if self.cells.genes is not None:
            sentence[GENE_LABELS] = self.cells.genes[targets]
        return sentence


class SentenceCollator:
    """
    Sentences to one batch: cells padded to the longest sentence, with `cell_mask` where any is shorter.

    Example:
    ```python
    >>> import numpy as np
    >>> long = {"control_cells": np.ones((3, 2)), "perturbation_ids": np.array([4])}
    >>> short = {"control_cells": np.ones((1, 2)), "perturbation_ids": np.array([5])}
    >>> batch = SentenceCollator()([long, short])
    >>> batch["cell_mask"]
    tensor([[ True,  True,  True],
            [ True, False, False]])
    >>> batch["perturbation_ids"]
    tensor([[4],
            [5]])
    ```
    """

    per_cell = (CONTROL_CELLS, LABELS, GENE_LABELS, BATCH_IDS)

    def __call__(self, sentences: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        sizes = np.array([len(sentence[CONTROL_CELLS]) for sentence in sentences])
        longest = int(sizes.max())
        batch = {}
        for key, first in sentences[0].items():
            if key in self.per_cell:
                padded = np.zeros((len(sentences), longest, *first.shape[1:]), dtype=first.dtype)
                for row, sentence in zip(padded, sentences):
                    row[: len(sentence[key])] = sentence[key]
                batch[key] = torch.from_numpy(padded)
            else:
                batch[key] = torch.from_numpy(np.stack([sentence[key] for sentence in sentences]))
        if sizes.min() < longest:
            batch[CELL_MASK] = torch.from_numpy(np.arange(longest) < sizes[:, None])
        return batch


def _make_groups(
    obs: pd.DataFrame,
    control: str,
    split: str,
    control_matching: str,
    control_sentences: bool,
    heldout_controls: bool,
) -> list[Group]:
    by = ["dataset", "context"] + (["batch"] if control_matching == "batch" else [])
    obs = obs.assign(row=np.arange(len(obs))).reset_index(drop=True)
    pools = {
        key: group["row"].to_numpy()
        for key, group in obs[obs["split"] == "control"].groupby(by, observed=True, sort=True)
    }
    groups, lonely = [], []
    for key, group in obs[obs["split"] == split].groupby([*by, "perturbation"], observed=True, sort=True):
        *of_pool, perturbation = key
        controls = pools.get(tuple(of_pool))
        if controls is None:
            lonely.append(" / ".join(map(str, key)))
            continue
        batch = of_pool[2] if control_matching == "batch" else None
        groups.append(Group(of_pool[0], of_pool[1], perturbation, batch, group["row"].to_numpy(), controls))
    if lonely:
        where = "dataset, context and batch" if control_matching == "batch" else "dataset and context"
        raise ValueError(
            f"{len(lonely)} groups of perturbed cells have no control cells of their {where}: {lonely[:10]}; add "
            "controls, leave the context out with contexts="
            + (", or use control_matching='context'" if control_matching == "batch" else "")
        )
    if not groups:
        raise ValueError(f"split {split!r} has no cells")
    if control_sentences:
        trained = {(group.dataset, group.context) for group in groups}
        datasets = {dataset for dataset, _ in trained}
        for key, rows in pools.items():
            # A held-out context's controls are unperturbed cells like any other; whether they may be seen is an option.
            if key[:2] in trained or (heldout_controls and key[0] in datasets):
                groups.append(Group(key[0], key[1], control, key[2] if len(key) > 2 else None, rows, rows))
    return groups
