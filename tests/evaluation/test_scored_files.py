"""Scores that the workers of a Dask cluster find: the same as those of one process, also where a worker is killed."""

import os
import signal
import threading
import time

import anndata as ad
import numpy as np
import pytest

from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.evaluation.comparison import evaluate


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Real cells, and cells of another draw that stand for predicted ones, named from the folder in which the command stands."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("real", 1), ("predicted", 2)):
        screen = simulate_screen(num_contexts=2, num_perturbations=20, num_genes=40, cells_per_group=30, seed=seed)
        screen = screen if name == "real" else screen[screen.obs["perturbation"] != "control"].copy()
        screen.X = np.log1p(screen.X.toarray()).astype(np.float32)
        screen.obs_names = [f"{name}-{barcode}" for barcode in screen.obs_names]
        screen.write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


def scored(output: str, *flags: str) -> int:
    words = [
        "--predicted",
        "predicted.h5ad",
        "--real",
        "real.h5ad",
        "--train",
        "real.h5ad",
        "--metrics",
        "discrimination",
    ]
    return pertstate(["evaluate", *words, "--include-seen", "--scores", output, "--quiet", *flags])


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.dask
@pytest.mark.slow
def test_scores_that_a_cluster_finds_have_the_same_bytes_also_if_a_worker_is_killed(cluster, files):
    assert scored("alone") == 0
    assert scored("together", "--scheduler", cluster.scheduler_address) == 0
    assert contents(files / "together") == contents(files / "alone")
    killed = []

    def kill():
        """Kill a worker that has something to do."""
        while not killed:
            busy = [worker.address for worker in [*cluster.scheduler.workers.values()] if worker.processing]
            for worker in cluster.workers.values():
                if worker.worker_address in busy and not killed:
                    killed.append(worker.pid)
                    os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.001)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert scored("killed", "--scheduler", cluster.scheduler_address) == 0
    killer.join(10)
    assert killed
    assert contents(files / "killed") == contents(files / "alone")


@pytest.mark.dask
def test_what_a_cluster_cannot_score_is_said_before(files):
    real = ad.read_h5ad("real.h5ad")
    with pytest.raises(
        ValueError, match="score predicted cells of a file; write them with pertstate predict, and give both"
    ):
        evaluate(ad.read_h5ad("predicted.h5ad"), real, real, scheduler="tcp://127.0.0.1:9", quiet=True)
    with pytest.raises(ValueError, match="found in one process; leave --scheduler or --cell-eval out"):
        evaluate("predicted.h5ad", "real.h5ad", scheduler="tcp://127.0.0.1:9", cell_eval=True, quiet=True)
