"""Cells in memory that the processes of a machine hold once."""

import json

import launches
import numpy as np
import pytest

from pertstate.base.cell_source import ROOM
from pertstate.data import simulate_screen
from pertstate.data.cells import load
from pertstate.data.source import FileSource
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor


# Reads blocks of 20 cells; then one process writes, and the other one sees it.
SCRIPT = """
import json, os, sys
from pathlib import Path
import numpy as np
from accelerate import PartialState
import pertstate.base.anndata_source as reading
import pertstate.data.shared_arrays as shared
from pertstate.data.cells import choose, read_cells
from pertstate.data.source import FileSource
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor

reading.VALUES_OF_BLOCK = 20 * 30
if sys.argv[3] == "apart":
    shared._place = lambda: ("a machine", str(os.getpid()))
state = PartialState(cpu=True)
paths = [Path(sys.argv[1])]
source = FileSource({"screen": paths}, StateProcessor())
read = []
source.progress = read.append
groups, processor = choose(source, Splits({"screen": paths}, {"screen"}))
read.clear()
own, read_rows = [], reading.PartReader.read
reading.PartReader.read = lambda reader, rows: own.append(rows.stop - rows.start) or read_rows(reader, rows)
room = shared.SharedRoom()
features = read_cells(source, groups, processor, room).features
np.save(f"{sys.argv[2]}/{state.process_index}.npy", features)
state.wait_for_everyone()
if state.process_index == 0:
    features[3, 4] = 77
other = room.empty((2, 3))  # of its own, as the genes of a decoder are
other[:] = 5
state.wait_for_everyone()
maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "pertstate-cells" in line]
found = {"part": room.part, "parts": room.parts, "seen": float(features[3, 4]), "maps": len(maps), "told": sum(read), "own": sum(own)}
Path(sys.argv[2], f"{state.process_index}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared") / "screen.h5ad"
    simulate_screen(num_contexts=2, num_perturbations=3, num_genes=30, cells_per_group=21, seed=3).write_h5ad(path)
    return path


def run(screen, folder, how):
    (folder / "script.py").write_text(SCRIPT)
    done = launches.run_together([folder / "script.py", screen, folder, how])
    assert done.returncode == 0, done.stderr[-3000:]
    return [(json.loads((folder / f"{rank}.json").read_text()), np.load(folder / f"{rank}.npy")) for rank in range(2)]


@pytest.fixture(scope="module")
def whole(screen):
    cells, _ = load(FileSource({"screen": [screen]}, StateProcessor()), Splits({"screen": [screen]}, {"screen"}))
    return cells.features


def test_two_processes_fill_and_hold_one_array(screen, whole, tmp_path):
    found = run(screen, tmp_path, "together")
    assert [one["part"] for one, _ in found] == [0, 1] and {one["parts"] for one, _ in found} == {2}
    assert all(np.array_equal(features, whole) for _, features in found)
    assert [one["seen"] for one, _ in found] == [77, 77]
    assert [one["maps"] for one, _ in found] == [2, 2]
    assert [one["told"] for one, _ in found] == [len(whole)] * 2
    read = [one["own"] for one, _ in found]
    assert sum(read) == len(whole) and min(read) > len(whole) // 3


def test_processes_that_share_no_memory_hold_all_cells_each(screen, whole, tmp_path):
    found = run(screen, tmp_path, "apart")
    assert {(one["part"], one["parts"], one["maps"], one["own"]) for one, _ in found} == {(0, 1, 0, len(whole))}
    assert all(np.array_equal(features, whole) for _, features in found)
    assert [one["seen"] for one, _ in found] == [77, whole[3, 4]]


def test_a_single_process_fills_all():
    assert (ROOM.part, ROOM.parts) == (0, 1)
    assert ROOM.empty((2, 3)).shape == (2, 3) and ROOM.empty((2, 3)).dtype == np.float32
