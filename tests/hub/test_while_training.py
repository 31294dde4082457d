"""A run is read while it trains, saves checkpoints and removes them."""

import time

import launches
import pytest

import pertstate
import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.hub.unfinished import checkpoints_of


@pytest.mark.slow
def test_every_reading_is_of_one_whole_checkpoint(tmp_path):
    """With one checkpoint at a time and one at every step, each that is read goes away soon."""
    simulate_screen(num_contexts=3, num_perturbations=2, num_genes=30, cells_per_group=24, seed=1).write_h5ad(
        tmp_path / "screen.h5ad"
    )
    run, screen = tmp_path / "run", tmp_path / "screen.h5ad"
    words = [
        screen,
        "--output_dir",
        run,
        "--preset",
        "tiny",
        "--set_size",
        "8",
        "--max_steps",
        "150",
        "--use_cpu",
        "true",
    ]
    words += ["--validation", "none", "--save_steps", "1", "--save_total_limit", "1", "--residual", "output"]
    process = launches.start([launches.TRAIN, *words])
    until = time.monotonic() + 60
    while not checkpoints_of(run) and time.monotonic() < until:
        time.sleep(0.01)
    names, read = [], 0
    while not (run / "config.json").exists() and read < 200:
        names.append(pertstate.load(run).name)
        read += 1
        if read % 20 == 1:
            assert pertstate.cli.main(["info", str(run)]) == 0
            predict = ["predict", "--model", run, "--adata", screen, "--output", tmp_path / "out.h5ad"]
            assert pertstate.cli.main([*map(str, predict), "--quiet", "--overwrite"]) == 0
    done = process.communicate()
    assert done.returncode == 0, done.stderr
    seen = [name for name in dict.fromkeys(names) if name != "run"]
    assert len(seen) > 10 and all(name.startswith("run/checkpoint-") for name in seen)
    assert [int(name.rpartition("-")[2]) for name in seen] == sorted(int(name.rpartition("-")[2]) for name in seen)
    assert pertstate.load(run).name == "run"
