"""What a run would be, without the run."""

import re

import launches
import pytest

from pertstate.data import simulate_screen


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("dry") / "screen.h5ad"
    simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=24, seed=1).write_h5ad(path)
    return path


def dry(screen, folder, *flags):
    words = [screen, "--test_contexts", "type_3", "--preset", "tiny", "--output_dir", folder / "a" / "run", "--dry_run"]
    return launches.run([launches.TRAIN, *words, "--use_cpu", "true", *flags])


def test_it_says_what_the_run_needs_and_writes_nothing(screen, tmp_path):
    done = dry(screen, tmp_path, "--max_steps", "60", "--early_stopping_patience", "4")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert f"output_dir: {tmp_path}/a/run" in done.stderr and "held-out contexts: screen.type_3 (test)" in done.stderr
    time = re.search(
        r"time: (\S+) s a step; 60 steps, and (\d+) evaluations of (\S+) s: at most about (.*)", done.stderr
    )
    assert time[2] == "20" and time[4].endswith(
        "without the scores of the test split; early stopping may end it sooner"
    )
    assert re.search(r"memory: [\d.]+ GiB at the peak\n", done.stderr)
    assert re.search(r"disk: about \d+ MiB for each checkpoint with its optimiser", done.stderr)
    assert done.stderr.rstrip().endswith("dry run: nothing was written") and "  loss " not in done.stderr


def test_trainings_that_choose_the_steps_are_counted(screen, tmp_path):
    done = dry(screen, tmp_path)
    assert "400 steps, 3 times (the first 2 choose how many of them are best): at most about " in done.stderr
    of_step = float(re.search(r"time: (\S+) s a step", done.stderr)[1])
    seconds = re.search(r"at most about (\d+) (s|min),", done.stderr)
    assert int(seconds[1]) * {"s": 1, "min": 60}[seconds[2]] == pytest.approx(1200 * of_step, rel=0.1, abs=31)


def test_a_model_that_is_fitted_takes_no_steps(screen, tmp_path):
    words = [screen, "--model_type", "state-linear", "--output_dir", tmp_path / "run", "--dry_run"]
    done = launches.run([launches.TRAIN, *words, "--use_cpu", "true"])
    assert "the model is fitted in one pass over the training cells: it takes no steps" in done.stderr
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []


def test_it_refuses_what_the_run_would_refuse(screen, tmp_path):
    assert dry(screen, tmp_path, "--learning_rate", "nan").returncode == 1
    folder = tmp_path / "a" / "run"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    done = dry(screen, tmp_path)
    assert done.returncode == 1 and "holds a run; continue it with" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["config.json"]
