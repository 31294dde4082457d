"""Cell sentences: sets of perturbed cells, each with a set of matching control cells."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader

from pertstate.base.cell_sentences import SentenceLayout
from pertstate.base.constants import (
    BATCH_IDS,
    CELL_MASK,
    CELL_PLACES,
    CONTEXT_IDS,
    CONTROL_CELLS,
    GENE_LABELS,
    LABELS,
    Split,
    Values,
)
from pertstate.base.messages import closest, counted
from pertstate.base.printable import get_logger
from pertstate.data.cell_batches import CellBatches
from pertstate.data.cells import Cells
from pertstate.data.cells_on_device import CellsOnDevice, RowsOnDevice
from pertstate.data.group_sums import GroupSums
from pertstate.data.record import RecordedGroup, hashes_of, lowest, recorded_groups
from pertstate.data.training_sentences import TrainingSentences
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from pertstate.training.arguments import StateTrainingArguments

logger = get_logger(__name__)

_HASHED = 1 << 20  # barcodes that are read at once


@dataclass(frozen=True)
class Group:
    """Cells of one dataset, context and perturbation (and batch), and the control cells that match them, as rows."""

    dataset: str
    context: str
    perturbation: str
    batch: str | None
    rows: range
    controls: range


class SentenceDataset(TrainingSentences):
    """
    Sentences of one split, drawn anew each epoch.

    A sentence is up to `set_size` perturbed cells of one [`Group`] and as many control cells of the same dataset and
    context (and batch). In an epoch each perturbed cell stands in exactly one sentence, unless `sentences_per_group`
    is set otherwise. Controls are drawn without replacement within a sentence. The order and the draws
    depend on `seed` and the epoch alone, and are the same whether the cells lie in memory or in a store.

    A loader gets a whole batch at once: it is read in one go, and is collated already. The workers of a loader share the
    memory map of a store.

    Args:
        cells ([`Cells`]): features and groups.
        processor ([`StateProcessor`]): encodes the labels.
        split (`str`): `"train"`, `"val"` or `"test"`.
        set_size (`int`): cells of a sentence.
        seed (`int`): seed of the draws.
        control_matching (`str`): which controls belong to a perturbed cell.

            - `"context"`: those of its dataset and context
            - `"batch"`: those of its dataset, context and batch; where there are none, those of its dataset and context
              (`num_without_batch_controls` counts the cells that this concerns, and the log says how many)
        small_groups (`str`): what becomes of a group with fewer cells than `set_size`.

            - `"pad"`: a shorter sentence, padded with a mask in its batch
            - `"repeat"`: in training, its cells (and controls) are repeated at random up to `set_size`; in evaluation
              every cell counts once, as with `"pad"`
        control_sentences (`bool`): in training, also map control cells to control cells of their context.
        heldout_controls (`bool`): let the control cells of contexts without any training perturbation take part in
            those control sentences.
        controls_only (`bool`): in training, map control cells to control cells of their context, of all contexts, and
            nothing else.
        sentences_per_group (`str`): how groups are weighted in a training epoch.

            - `"proportional"`: each cell stands in one sentence
            - `"equal"`: every group gives as many sentences as the average group has. Of a larger group, some cells wait
              for another epoch; the cells of a smaller group stand in several sentences
            - `"capped"`: as `"proportional"`, but at most `sentence_cap` sentences of a group; its other cells wait for
              another epoch
        sentence_cap (`int`, *optional*): with `"capped"`, the largest number of sentences of a group.
        shuffle (`bool`): shuffle cells and sentences each epoch. If False, sentences stand group by group.
        multiple_of (`int`): the number of sentences of an epoch is a multiple of this (the sentences of an optimiser
            step). Sentences beyond the last multiple are left out of the epoch. If there are fewer sentences than
            this, each step takes all of them, and a warning says so.

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
        controls_only: bool = False,
        sentences_per_group: str = "proportional",
        sentence_cap: int | None = None,
        shuffle: bool = True,
        multiple_of: int = 1,
    ):
        for name, value, allowed in (
            ("control_matching", control_matching, ("context", "batch")),
            ("small_groups", small_groups, ("pad", "repeat")),
            ("sentences_per_group", sentences_per_group, ("proportional", "equal", "capped")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}; {closest(value, allowed)}")
        if control_matching == "batch" and "batch" not in cells.groups:
            raise ValueError("control_matching='batch' needs batch_key, the obs column with each cell's batch")
        if (sentence_cap is not None) != (sentences_per_group == "capped") or (sentence_cap or 1) < 1:
            raise ValueError(
                "sentence_cap, a whole number from 1, belongs to sentences_per_group='capped'; found "
                f"sentence_cap={sentence_cap!r} with {sentences_per_group!r}"
            )
        self.cells, self.processor, self.notes = cells, processor, cells.notes
        self.set_size, self.seed, self.shuffle = set_size, seed, shuffle
        self._there: CellsOnDevice | None = None
        # What the control cells of each (dataset, context) express, where the model reads it.
        self._expressed: dict[tuple[str, str], tuple[np.ndarray, int]] = {}
        self.repeat = small_groups == "repeat" and split == Split.TRAIN
        self.groups, self.num_without_batch_controls = _make_groups(
            cells.groups,
            processor.control,
            split,
            control_matching,
            control_sentences and split == Split.TRAIN,
            heldout_controls,
            controls_only and split == Split.TRAIN,
        )
        if self.num_without_batch_controls:
            logger.warning(
                f"{split}: {self.num_without_batch_controls} perturbed cells have no controls of their batch; they are "
                "matched with those of their context"
            )
        # Groups of one perturbation share its ids or features, which may be wide.
        names, self._perturbation = np.unique([group.perturbation for group in self.groups], return_inverse=True)
        self.perturbations = processor.encode(names)
        self.context_ids = processor.encode_contexts([group.context for group in self.groups])
        self.has_batches = "batch" in cells.groups
        if self.has_batches:
            names = cells.groups["batch"]
            encoded = processor.encode_batches(names.unique())
            self._batch_of_group = names.map(dict(zip(names.unique(), encoded))).to_numpy()
            self._first_of_group = cells.groups["start"].to_numpy()
        self._equal = sentences_per_group == "equal" and split == Split.TRAIN
        self._cap = sentence_cap if split == Split.TRAIN else None
        self._row_type = np.min_scalar_type(int(cells.groups["stop"].max()))
        self.multiple_of = multiple_of
        # Shared with the processes of a loader, which may live on between epochs.
        self._asked = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.set_epoch(0)
        if self._drawn < multiple_of:
            logger.warning(
                f"{split}: the data make {self._drawn} sentences of up to {set_size} cells, fewer than the {multiple_of} of one "
                "optimiser step: each step takes all of them"
            )

    def set_epoch(self, epoch: int):
        """Draw the sentences of this epoch."""
        self._asked[0] = epoch
        self._draw_epoch(epoch)

    def _draw_epoch(self, epoch: int):
        generator = np.random.default_rng([self.seed, epoch])
        largest = np.array([min(self.set_size, len(group.controls)) for group in self.groups])
        counts = -(-np.array([len(group.rows) for group in self.groups]) // largest)
        if self._equal:
            wanted = np.full(len(counts), -(-counts.sum() // len(counts)))
        else:
            wanted = counts if self._cap is None else np.minimum(counts, self._cap)
        # Rows of all sentences one after another: arrays, so that the processes of a loader share them.
        rows, of_groups = [], []
        for group, count, number in zip(self.groups, counts, wanted):
            for first in range(0, number, count):
                size = len(group.rows)
                drawn = generator.permutation(size) if self.shuffle else np.arange(size)
                of_sentence = np.full(count, size // count)
                of_sentence[: size % count] += 1
                of_sentence = of_sentence[: number - first]
                rows.append((drawn[: of_sentence.sum()] + group.rows.start).astype(self._row_type))
                of_groups.append(of_sentence)
        self._rows, sizes = np.concatenate(rows), np.concatenate(of_groups)
        stops = np.cumsum(sizes)
        order = generator.permutation(len(sizes)) if self.shuffle else np.arange(len(sizes))
        order = order[: len(sizes) // self.multiple_of * self.multiple_of or len(sizes)]
        self.epoch, self._drawn = epoch, len(sizes)
        self._group = np.repeat(np.arange(len(wanted)), wanted)[order]
        self._bounds = np.stack([stops - sizes, stops], axis=1)[order]

    def group_sums(self, part: int = 0, parts: int = 1, progress: bool = False) -> GroupSums:
        cells = self.training_cells()
        log1p = self.processor.values == Values.LOG1P
        return GroupSums.of_cells(
            cells.features, cells.groups, self.processor.control, part, parts, progress, log1p=log1p
        )

    def recorded_groups(self) -> list[RecordedGroup]:
        return recorded_groups(self.cells.groups)

    def learned_controls(self) -> list[tuple[str, str]]:
        return sorted({(group.dataset, group.context) for group in self.groups})

    def hashes(self) -> tuple[np.ndarray, bool] | None:
        ids, groups = self.cells.ids, self.cells.groups
        if ids is None:
            return None
        spans = groups.loc[groups["split"] == Split.TRAIN, ["perturbation", "start", "stop"]].to_numpy()
        return lowest(
            hashes_of(ids(np.arange(first, min(first + _HASHED, stop))), str(name))
            for name, start, stop in spans
            for first in range(start, stop, _HASHED)
        )

    def place_cells(self, there: CellsOnDevice | None):
        """Read cells from a device from now on, where batches are then made; None: from memory or the store again."""
        self._there = there

    def training_cells(self) -> Cells:
        groups = self.cells.groups
        training = groups["split"].isin([Split.TRAIN, Split.CONTROL])
        return Cells(self.cells.features, self.cells.genes, groups[training])

    @property
    def num_sentences(self) -> int:
        return len(self)

    def __len__(self) -> int:
        return len(self._group)

    @property
    def group_numbers(self) -> np.ndarray:
        """The number of the group of each sentence of this epoch."""
        self._catch_up()
        return self._group

    def sizes(self) -> np.ndarray:
        """The cells of each sentence of this epoch."""
        self._catch_up()
        sizes = self._bounds[:, 1] - self._bounds[:, 0]
        return np.maximum(sizes, self.set_size) if self.repeat else sizes

    def _catch_up(self):
        if self._asked[0] != self.epoch:
            self._draw_epoch(int(self._asked[0]))

    def steps_per_epoch(self, args: "StateTrainingArguments") -> int:
        if args.cells_per_batch is None:
            return super().steps_per_epoch(args)
        of_step = args.world_size * args.gradient_accumulation_steps
        return self._cell_batches(args).batches // of_step

    def _cell_batches(self, args: "StateTrainingArguments") -> CellBatches:
        of_step = args.world_size * args.gradient_accumulation_steps
        cells = args.cells_of_batch(self.set_size)
        return CellBatches(self, cells, args.process_index, args.world_size, of_step)

    def loader(self, args: "StateTrainingArguments", collate: Callable) -> DataLoader | None:
        if args.cells_per_batch is None:
            return None
        # Each process has its own batches already: accelerate is not to deal them out once more.
        return DataLoaderShard(
            self,
            device=args.device,
            _non_blocking=args.dataloader_pin_memory,
            batch_sampler=self._cell_batches(args),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def rows(self, i: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Group number, perturbed rows and control rows of sentence `i` in this epoch."""
        self._catch_up()
        index, (start, stop) = int(self._group[i]), self._bounds[i]
        targets, controls = self._rows[start:stop].astype(np.int64), self.groups[index].controls
        generator = np.random.default_rng([self.seed, self.epoch, i, 1])
        if self.repeat and len(targets) < self.set_size:
            targets = np.concatenate([targets, generator.choice(targets, self.set_size - len(targets))])
            if len(controls) < self.set_size:
                extra = generator.choice(len(controls), self.set_size - len(controls))
                return index, targets, controls.start + np.concatenate([np.arange(len(controls)), extra])
        return index, targets, controls.start + generator.choice(len(controls), len(targets), replace=False)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {key: value[0].cpu().numpy() for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, indices: list[int]) -> "SentenceBatch":
        """The batch of these sentences, collated."""
        drawn = [self.rows(i) for i in indices]
        groups = np.array([index for index, _, _ in drawn])
        targets, controls = [rows for _, rows, _ in drawn], [rows for _, _, rows in drawn]
        layout = SentenceLayout([len(rows) for rows in targets])
        place = self.cells if self._there is None else self._there
        batch = {
            CONTROL_CELLS: self._read(layout, place.features, controls),
            LABELS: self._read(layout, place.features, targets),
            **{key: values[self._perturbation[groups]] for key, values in self.perturbations.items()},
            CONTEXT_IDS: self.context_ids[groups],
        }
        places = [(self.groups[index].dataset, self.groups[index].context) for index in groups]
        batch |= self.processor.control_values(places, self.cells.features.__getitem__, self._pool, self._expressed)
        if self.has_batches:
            batch[BATCH_IDS] = layout.spread(self.batch_ids(np.concatenate(controls)))
        if place.genes is not None:
            batch[GENE_LABELS] = self._read(layout, place.genes, targets)
        return SentenceBatch(layout.batch(batch))

    def _pool(self, place: tuple[str, str]) -> np.ndarray:
        """The rows of all control cells of a (dataset, context)."""
        groups = self.cells.groups
        here = (groups["split"] == Split.CONTROL) & (groups["dataset"] == place[0]) & (groups["context"] == place[1])
        return np.concatenate(
            [np.arange(start, stop) for start, stop in groups.loc[here, ["start", "stop"]].to_numpy()]
        )

    def batch_ids(self, rows: np.ndarray) -> np.ndarray:
        """The id of the experimental batch of each of some cells; -1 for one that the processor does not know."""
        return self._batch_of_group[np.searchsorted(self._first_of_group, rows, side="right") - 1]

    @staticmethod
    def _read(layout: SentenceLayout, matrix, rows: list[np.ndarray]) -> "np.ndarray | torch.Tensor":
        if isinstance(matrix, RowsOnDevice):
            return matrix.read(layout, rows)
        take = partial(np.take, matrix, axis=0, mode="clip") if isinstance(matrix, np.ndarray) else matrix.take
        return layout.read(rows, matrix.shape[1], lambda taken, out: take(taken, out=out))


class SentenceBatch(dict):
    """
    The tensors of several sentences, as [`SentenceCollator`] gives them. Those that lie in pinned memory go to a device without
    being waited for.
    """

    def pin_memory(self) -> "SentenceBatch":
        """With the tensors of the host in pinned memory."""
        return SentenceBatch({key: of.pin_memory() if of.device.type == "cpu" else of for key, of in self.items()})

    def to(self, device, non_blocking: bool = False) -> "SentenceBatch":
        """On a device."""
        pinned = {key: of.device.type == "cpu" and of.is_pinned() for key, of in self.items()}
        return SentenceBatch({key: of.to(device, non_blocking=non_blocking or pinned[key]) for key, of in self.items()})


class SentenceCollator:
    """
    Makes one batch of sentences: cells are padded to the longest sentence, and `cell_mask` is there where any is shorter.
    A batch that is collated already ([`SentenceBatch`]) stays as it is.

    Args:
        places (`bool`): a batch with much padding also says where its cells are, `cell_places`, for a model that computes
            nothing of the padding.

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
    # The part of a batch that is padding, from which on the places of the cells are worth while.
    much = 1 / 8

    def __init__(self, places: bool = False):
        self.places = places

    def __call__(self, sentences: "list[dict[str, np.ndarray]] | SentenceBatch") -> SentenceBatch:
        batch = self._collated(sentences)
        mask = batch.get(CELL_MASK)
        if self.places and mask is not None:
            places = mask.flatten().nonzero().squeeze(1)
            if len(places) <= (1 - self.much) * mask.numel():
                batch[CELL_PLACES] = places
        return batch

    def _collated(self, sentences) -> SentenceBatch:
        if isinstance(sentences, SentenceBatch):
            return SentenceBatch(sentences)
        layout = SentenceLayout([len(sentence[CONTROL_CELLS]) for sentence in sentences])
        batch = {}
        for key in sentences[0]:
            values = [sentence[key] for sentence in sentences]
            batch[key] = layout.spread(np.concatenate(values)) if key in self.per_cell else np.stack(values)
        return SentenceBatch(layout.batch(batch))


def _make_groups(
    table: pd.DataFrame,
    control: str,
    split: str,
    control_matching: str,
    control_sentences: bool,
    heldout_controls: bool,
    controls_only: bool,
) -> tuple[list[Group], int]:
    """The groups of a split, and how many perturbed cells found no controls of their batch."""
    by = ["dataset", "context", "perturbation"] + (["batch"] if control_matching == "batch" else [])

    def spans(part: pd.DataFrame, keys: list[str]) -> dict[tuple, range]:
        # The batches of a group stand beside one another, so that its rows are one range.
        found = part.groupby(keys, sort=True, observed=True).agg(start=("start", "min"), stop=("stop", "max"))
        return {key: range(*span) for key, span in zip(found.index, found.to_numpy())}

    of_controls = table[table["split"] == Split.CONTROL]
    pools = spans(of_controls, ["dataset", "context"])
    of_batches = spans(of_controls, ["dataset", "context", "batch"]) if control_matching == "batch" else {}
    groups, lonely, fallen_back = [], [], 0
    for key, rows in spans(table[table["split"] == split], by).items():
        dataset, context, perturbation, *batch = key
        controls = pools.get((dataset, context))
        if controls is None:
            lonely.append(" / ".join(map(str, key)))
            continue
        if batch:
            own = of_batches.get((dataset, context, *batch))
            fallen_back += len(rows) if own is None else 0
            controls = own or controls
        groups.append(Group(dataset, context, perturbation, batch[0] if batch else None, rows, controls))
    if lonely:
        raise ValueError(
            f"{counted(len(lonely), 'group')} of perturbed cells without control cells of their dataset and context: "
            f"{lonely[:10]}; add controls, or leave the context out with contexts="
        )
    if not groups and not controls_only:
        raise ValueError(f"split {split!r} has no cells")
    if control_sentences or controls_only:
        trained = {(group.dataset, group.context) for group in groups}
        datasets = {dataset for dataset, _ in trained}
        for key, rows in (of_batches or pools).items():
            # The control cells of a held-out context are unperturbed; `heldout_controls` says whether training may use them.
            if controls_only or key[:2] in trained or (heldout_controls and key[0] in datasets):
                groups.append(Group(key[0], key[1], control, key[2] if len(key) > 2 else None, rows, rows))
    if not groups:
        raise ValueError("controls_only: the data have no control cells, so there is nothing to train on; add some")
    return groups, fallen_back
