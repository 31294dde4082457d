"""Batches of about so many cells, instead of so many sentences."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from pertstate.base.constants import CONTROL_CELLS


if TYPE_CHECKING:
    from pertstate.data.sentences import SentenceDataset
    from pertstate.data.streaming import Sentence, SentenceStream


class CellBatches(Sampler[list[int]]):
    """
    The sentences of an epoch in their order, in batches of at most so many cells.

    All epochs have the same number of batches, so that a training counts its steps in advance. Each process gets every n-th
    batch, and all of them get as many.

    Args:
        dataset ([`SentenceDataset`]): the sentences.
        cells (`int`): the most cells of a batch.
        rank, world_size (`int`): the batches of this process, of so many processes.
        multiple_of (`int`): the number of batches is a multiple of this: those of an optimiser step, of all processes.

    Raises:
        ValueError: a batch has no room for three sentences, or there are too few cells for one optimiser step.
    """

    def __init__(
        self, dataset: "SentenceDataset", cells: int, rank: int = 0, world_size: int = 1, multiple_of: int = 1
    ):
        self.dataset, self.cells, self.rank, self.world_size = dataset, cells, rank, world_size
        sizes = dataset.sizes()
        longest, step = int(sizes.max()), int(np.gcd.reduce(sizes))
        # A batch takes the sentences that begin within a window of the epoch's cells. The last of them may end beyond it.
        window = cells // step * step - longest + step
        if window < 2 * longest:
            raise ValueError(
                f"cells_per_batch={cells}: expected room for at least three sentences, of up to {longest} cells; use "
                f"{3 * longest} or more, or lower set_size"
            )
        self._total = int(sizes.sum())
        self.batches = math.ceil(math.ceil(self._total / window) / multiple_of) * multiple_of
        if self._total / self.batches < longest and self.batches > 1:
            raise ValueError(
                f"cells_per_batch={cells}: the {self._total} cells of an epoch are too few for the {multiple_of} batches of an "
                "optimiser step; lower gradient_accumulation_steps or the number of processes"
            )

    def __len__(self) -> int:
        return self.batches // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        sizes = self.dataset.sizes()
        starts = np.cumsum(sizes) - sizes
        # Exact: whole numbers alone.
        of_batch = starts * self.batches // self._total
        bounds = np.searchsorted(of_batch, np.arange(self.batches + 1))
        for number in range(self.rank, self.batches, self.world_size):
            yield list(range(bounds[number], bounds[number + 1]))

    def set_epoch(self, epoch: int):
        self.dataset.set_epoch(epoch)


class StreamedCellBatches(IterableDataset):
    """
    The sentences of a stream in lists of at most so many cells. A list ends where another full sentence may not fit, so no
    sentence is read ahead.

    Args:
        stream ([`SentenceStream`]): the sentences.
        cells (`int`): the most cells of a list.

    Raises:
        ValueError: a sentence has more cells.
    """

    def __init__(self, stream: "SentenceStream", cells: int):
        if cells < stream.set_size:
            raise ValueError(
                f"cells_per_batch={cells}: expected room for a sentence of {stream.set_size} cells; raise it, or lower set_size"
            )
        self.stream, self.cells = stream, cells

    def set_epoch(self, epoch: int):
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[list["Sentence"]]:
        batch: list[Sentence] = []
        cells = 0
        for sentence in self.stream:
            batch.append(sentence)
            cells += len(sentence[CONTROL_CELLS])  # type: ignore[arg-type]  # an array
            if cells + self.stream.set_size > self.cells:
                yield batch
                batch, cells = [], 0
        if batch:
            yield batch
