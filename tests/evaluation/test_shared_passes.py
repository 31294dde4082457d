"""`pertstate predict` under `accelerate launch`: several processes write what one writes."""

from pathlib import Path

import launches
import pytest
from trainers import simulated_cells

from pertstate import StateForPerturbation
from pertstate.configuration_state import StateConfig


COMMAND = ["-m", "pertstate.cli", "predict"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list:
    """Of a prediction of nine groups of 24 cells in passes of two sentences of 12."""
    folder = tmp_path_factory.mktemp("shared_passes")
    _, processor = simulated_cells(folder)
    processor.set_size = 12
    fields = {"input_dim": processor.feature_dim, "num_perturbations": 3}
    StateForPerturbation(StateConfig.from_preset("tiny", **fields)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    adata = folder / "screen.h5ad"
    return [*COMMAND, "--model", folder / "model", "--adata", adata, "--batch-size", "1", "--quiet", "--device", "cpu"]


@pytest.mark.parametrize("option, name, count", [("--output", "cells.h5ad", 3), ("--summary", "table.csv", 2)])
def test_the_output_is_that_of_one_process(words, option, name, count, tmp_path):
    for folder in ("one", "several"):
        (tmp_path / folder).mkdir()
    one = launches.run([*words, option, tmp_path / "one" / name])
    several = launches.run_together([*words, option, tmp_path / "several" / name], count)
    assert (one.returncode, several.returncode) == (0, 0), several.stderr[-3000:]
    # It is said once, by the process that writes.
    assert several.stdout.count("perturbations in 4 contexts") == 1
    expected, found = (Path(tmp_path, folder, name) for folder in ("one", "several"))
    assert [path.name for path in found.parent.iterdir()] == [name]
    assert found.read_bytes() == expected.read_bytes()


def test_counts_are_drawn_by_one_process(words, tmp_path):
    done = launches.run_together([*words, "--output", tmp_path / "x.h5ad", "--sample-counts", "1"], 2)
    assert done.returncode == 1 and "several processes (2) predict expectations" in done.stderr
    assert not (tmp_path / "x.h5ad").exists()
