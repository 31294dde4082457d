"""Batches by cells: the sentences of an epoch in their order, no more cells than asked for, equally many batches each epoch."""

import numpy as np
import pytest

from pertstate.data.cell_batches import CellBatches, StreamedCellBatches


class Sentences:
    """Sentences of these sizes, in another order in each epoch, as those of a [`SentenceDataset`]."""

    def __init__(self, sizes, set_size=None):
        self.of_epoch, self.set_size = np.asarray(sizes), set_size or max(sizes)
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.order = np.random.default_rng(epoch).permutation(len(self.of_epoch))

    def sizes(self):
        return self.of_epoch[self.order]

    def __iter__(self):
        yield from ({"control_cells": np.zeros((size, 1))} for size in self.sizes())


SIZES = {
    "short": np.random.default_rng(0).integers(20, 300, 500),
    "full": np.full(160, 64),
    "mostly full": np.where(np.arange(300) % 7 == 0, 5, 64),
    "two": np.array([10, 6]),
}


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("cells", [1000, 1024, 8192])
def test_each_sentence_stands_once_in_its_order_in_batches_of_no_more_cells(name, cells):
    data = Sentences(SIZES[name])
    batches = CellBatches(data, cells)
    for epoch in range(5):
        batches.set_epoch(epoch)
        taken = list(batches)
        assert len(taken) == len(batches) and all(taken)
        assert [i for batch in taken for i in batch] == list(range(len(data.of_epoch)))
        assert max(data.sizes()[batch].sum() for batch in taken) <= cells


@pytest.mark.parametrize("cells, of_batch", [(1024, 16), (1000, 15), (1087, 16)])
def test_full_sentences_fill_their_batches(cells, of_batch):
    sizes = [len(batch) for batch in CellBatches(Sentences(np.full(of_batch * 10, 64)), cells)]
    assert sizes == [of_batch] * 10


def test_short_sentences_fill_most_of_their_batches():
    data = Sentences(SIZES["short"])
    used = [data.sizes()[batch].sum() for batch in CellBatches(data, 8192)]
    assert np.mean(used) > 0.9 * 8192


@pytest.mark.parametrize("world_size, multiple_of", [(1, 4), (3, 3), (2, 8)])
def test_processes_share_the_batches_out_in_whole_steps(world_size, multiple_of):
    data = Sentences(SIZES["short"])
    parts = [CellBatches(data, 2000, rank, world_size, multiple_of) for rank in range(world_size)]
    taken = [list(part) for part in parts]
    assert {len(of_rank) for of_rank in taken} == {len(parts[0])}
    assert len(parts[0]) * world_size % multiple_of == 0
    together = [batch for batches in zip(*taken) for batch in batches]
    assert [i for batch in together for i in batch] == list(range(500))


@pytest.mark.parametrize(
    "sizes, cells, multiple_of, message",
    [
        (
            [64] * 9,
            127,
            1,
            r"cells_per_batch=127: expected room for at least three sentences, of up to 64 cells; use 192",
        ),
        ([10, 6, 3], 25, 1, r"cells_per_batch=25: .* use 30 or more"),
        ([10, 6, 3], 40, 4, r"the 19 cells of an epoch are too few for the 4 batches of an optimiser step; lower"),
    ],
)
def test_too_small_batches_and_too_few_cells_are_one_clear_error(sizes, cells, multiple_of, message):
    with pytest.raises(ValueError, match=message):
        CellBatches(Sentences(sizes), cells, multiple_of=multiple_of)


@pytest.mark.parametrize("name", list(SIZES))
def test_a_stream_is_taken_in_its_order_and_no_sentence_is_read_ahead(name):
    data, read = Sentences(SIZES[name]), []

    class Watched(Sentences):
        def __iter__(self):
            for sentence in super().__iter__():
                read.append(len(sentence["control_cells"]))
                yield sentence

    taken = []
    for batch in StreamedCellBatches(Watched(SIZES[name]), 1024):
        taken += [len(sentence["control_cells"]) for sentence in batch]
        assert taken == read and sum(len(sentence["control_cells"]) for sentence in batch) <= 1024
    assert taken == data.sizes().tolist()


def test_a_stream_needs_room_for_a_sentence():
    with pytest.raises(ValueError, match=r"cells_per_batch=63: expected room for a sentence of 64 cells; raise it"):
        StreamedCellBatches(Sentences([5], set_size=64), 63)
