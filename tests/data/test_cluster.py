"""Work on a Dask cluster: the same bytes as on one process, also where a worker is killed."""

import os
import signal
import threading
import time
from functools import partial

import h5py
import numpy as np
import pytest

from pertstate.base.processes import LostProcessError
from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.data.cluster import on_cluster


pytestmark = pytest.mark.dask


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files, named from the folder in which the command stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    for seed in (1, 2):
        screen = simulate_screen(num_contexts=3, num_perturbations=4, num_genes=300, cells_per_group=150, seed=seed)
        screen.obs_names = [f"{seed}-{name}" for name in screen.obs_names]
        screen.write_h5ad(tmp_path / "cells" / f"{seed}.h5ad")
    (tmp_path / "data.yaml").write_text("data: {datasets: {screen: cells}}\nprepare: {shard_megabytes: 1}\n")
    return tmp_path


def prepare(output: str, *flags: str) -> int:
    return pertstate(["prepare", "--config", "data.yaml", "--output", output, "--quiet", *flags])


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is below 0")
    return number**2


def die(path, times: int) -> str:
    """Kill the worker that does this, so many times."""
    with path.open("a") as file:
        file.write("x")
    if len(path.read_text()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@pytest.mark.slow
def test_results_come_in_order_and_the_first_error_is_that_of_all(cluster):
    done = []
    address = cluster.scheduler_address
    assert on_cluster(address, [partial(square, i) for i in range(5)], done.append) == [0, 1, 4, 9, 16]
    assert sorted(done) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="-2 is below 0"):
        on_cluster(address, [partial(square, i) for i in (3, -2)], done.append)


@pytest.mark.slow
def test_what_a_killed_worker_did_is_done_by_another(cluster, tmp_path):
    jobs = [partial(die, tmp_path / "a", 1), partial(square, 3)]
    assert on_cluster(cluster.scheduler_address, jobs, id) == ["done", 9]
    assert (tmp_path / "a").read_text() == "xx"
    with pytest.raises(LostProcessError, match="ended without a result"):
        on_cluster(cluster.scheduler_address, [partial(die, tmp_path / "b", 99)], id)


@pytest.mark.slow
def test_a_store_that_a_cluster_makes_has_the_same_bytes_also_if_a_worker_is_killed(cluster, files):
    assert prepare("alone") == 0
    assert prepare("together", "--scheduler", cluster.scheduler_address) == 0
    assert contents(files / "together") == contents(files / "alone")
    killed = []

    def kill():
        """Kill the worker that has begun a file."""
        while not killed:
            begun = [*files.glob(".*/*.part-*"), *files.glob("*/*.part-*")]
            if begun:
                worker = next(iter(cluster.workers.values()))
                killed.append((begun[0], worker.pid))
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.001)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert prepare("killed", "--scheduler", cluster.scheduler_address) == 0
    killer.join(10)
    assert killed
    assert contents(files / "killed") == contents(files / "alone")


@pytest.mark.slow
def test_an_error_of_a_worker_and_an_absent_scheduler_are_one_line(cluster, files, capsys):
    assert prepare("absent", "--scheduler", "tcp://127.0.0.1:9") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("pertstate prepare: error: no Dask scheduler answers at tcp://127.0.0.1:9")
    with h5py.File(files / "cells" / "2.h5ad", "r+") as file:
        data = file["X/data"] if isinstance(file["X"], h5py.Group) else file["X"]
        data[len(data) // 2] = np.nan
    assert prepare("broken", "--scheduler", cluster.scheduler_address) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "2.h5ad" in said[0] and "nan" in said[0] and not (files / "broken").exists()
