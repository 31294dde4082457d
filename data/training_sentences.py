"""The interface of training data to the Trainer, for cells in memory, in a store or in a stream."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pertstate.data.cells import Cells
from pertstate.data.group_sums import GroupSums
from pertstate.data.record import RecordedGroup
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from transformers import TrainerState

    from pertstate.training.arguments import StateTrainingArguments


class TrainingSentences(Dataset, ABC):
    """
    Sentences that a [`StateTrainer`] trains on. [`SentenceDataset`] and [`SentenceStream`] are its two kinds.

    The defaults here are those of a dataset with a length, which the Trainer can index, count and skip by itself.

    Attributes:
        processor ([`StateProcessor`]): encodes the labels.
        set_size (`int`): the most cells of a sentence.
        notes (`list[str]`): what was left out of the data when they were read, in sentences.
    """

    processor: StateProcessor
    set_size: int
    notes: list[str] = []

    @property
    @abstractmethod
    def num_sentences(self) -> int:
        """
        Sentences of one epoch.

        Raises:
            ValueError: it is not known.
        """

    @abstractmethod
    def training_cells(self) -> Cells | None:
        """Training cells and control cells, which the baselines of an evaluation learn from; None where none are at hand."""

    @abstractmethod
    def recorded_groups(self) -> list[RecordedGroup]:
        """All groups of the data, with their splits."""

    @abstractmethod
    def learned_controls(self) -> list[tuple[str, str]]:
        """The (dataset, context) pairs whose control cells stand in sentences."""

    def hashes(self) -> tuple[np.ndarray, bool] | None:
        """
        Hashes of the training cells, see [`~pertstate.data.record.hashes_of`], and whether they are those of all; None where
        cells have no barcodes.
        """
        return None

    @abstractmethod
    def group_sums(self, part: int = 0, parts: int = 1, progress: bool = False) -> GroupSums:
        """
        Counts and sums of the training cells and of their controls, each cell once.

        Args:
            part, parts (`int`): take this one of so many shares, which together are all cells.
            progress (`bool`): show a progress bar.
        """

    def steps_per_epoch(self, args: "StateTrainingArguments") -> int:
        """Optimiser steps of one epoch; errors as in `num_sentences`."""
        of_batch = args.train_batch_size * args.world_size
        sentences = self.num_sentences
        batches = sentences // of_batch if args.dataloader_drop_last else math.ceil(sentences / of_batch)
        return max(1, math.ceil(batches / args.gradient_accumulation_steps))

    def epoch_of(self, args: "StateTrainingArguments", state: "TrainerState") -> float | None:
        """Epochs that the training has done so far; None where the length of one is not known."""
        return state.epoch or 0.0

    def loader(self, args: "StateTrainingArguments", collate: Callable) -> DataLoader | None:
        """
        The loader that training reads from; None where the Trainer is to make one.

        Raises:
            ValueError: the arguments ask for what these data cannot do.
        """
        return None

    def save_state(self, folder: str | os.PathLike):
        """Write to a checkpoint what [`TrainingSentences.load_state`] needs; nothing, where the step says it all."""

    def load_state(self, folder: str | os.PathLike) -> bool:
        """
        Go back to where a checkpoint was saved.

        Returns:
            `bool`: whether the next sentence is the one that was still to come. If not, the Trainer skips those that
            were read.
        """
        return False
