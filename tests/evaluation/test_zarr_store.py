"""A zarr whose writing fails is gone when the error is raised: no thread writes on."""

import os

import numpy as np
import pytest
import zarr

from pertstate.base.outputs import whole_folder
from pertstate.evaluation.cells_file import ZARR_FOLDER
from pertstate.evaluation.zarr_store import ending_with_its_block


CHUNKS = 40


def test_no_file_is_written_after_a_failure(tmp_path):
    """One chunk of forty cannot be written, and the threads have the others to write."""
    for number in range(5):
        with pytest.raises(OSError), whole_folder(tmp_path / "out.zarr", ZARR_FOLDER) as partial:
            with ending_with_its_block(partial) as store:
                array = zarr.open_group(store, mode="w", zarr_format=2).create_array(
                    "values", shape=(CHUNKS, 50_000), chunks=(1, 50_000), dtype="float64"
                )
                (partial / "values" / f"{number}.0").mkdir()  # in the place of a file
                array[:] = np.random.default_rng(number).random((CHUNKS, 50_000))
        assert os.listdir(tmp_path) == []


def test_the_store_is_not_written_after_its_block(tmp_path):
    with ending_with_its_block(tmp_path) as store:
        group = zarr.open_group(store, mode="w", zarr_format=2)
        group.create_array("values", shape=(4,), dtype="int32")[:] = np.arange(4)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="no longer written"):
        group["values"][:] = 1
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    np.testing.assert_array_equal(zarr.open_group(tmp_path, mode="r")["values"][:], np.arange(4))
