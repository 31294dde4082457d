"""Cells of small groups are read together, and each group gets its own."""

import numpy as np
import pytest

from pertstate.evaluation.read_ahead import read_ahead


@pytest.mark.parametrize("together", [1, 5, 1000])
def test_each_group_gets_its_cells_and_few_reads_are_made(together):
    table = np.arange(40.0).reshape(20, 2)
    rows = [np.array(of) for of in ([3, 1], [0], [19, 18, 17, 2, 5, 6, 7], [4], [9, 8])]
    reads = []

    def read(of):
        reads.append(len(of))
        return table[of]

    for found, of in zip(read_ahead(rows, read, together), rows, strict=True):
        np.testing.assert_array_equal(found, table[of])
    assert reads == {1: [2, 1, 7, 1, 2], 5: [3, 7, 3], 1000: [13]}[together]
    assert list(read_ahead([], read)) == []
