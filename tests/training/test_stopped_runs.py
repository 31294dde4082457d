"""Many runs of one command: signals, kills, damaged files of theirs, and names of folds."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import launches
import pytest
from kills import killed_at_each_change

import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.hub.unfinished import checkpoints_of
from pertstate.training.crossval import CROSSVAL, SETTINGS, begin, safe_name
from pertstate.training.staging import missing_of


SMALL = ["--preset", "tiny", "--set_size", "8", "--use_cpu", "true", "--validation", "none", "--save_strategy", "steps"]


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    simulate_screen(num_contexts=2, num_perturbations=2, num_genes=30, cells_per_group=16, seed=1).write_h5ad(path)
    return path


def words(screen, output, *flags) -> list[str]:
    found = ["crossval", screen, "--over", "contexts", "--seeds", "1", "-o", output, *SMALL, *flags]
    return [str(word) for word in found]


def wait_for_checkpoints(folder: Path, number: int):
    """Until so many runs have saved a checkpoint."""
    until = time.monotonic() + 120

    def begun() -> int:
        return len({path.parent.parent for path in folder.glob("runs/*/*/checkpoint-*/files.json")})

    while begun() < number and time.monotonic() < until:
        time.sleep(0.05)


GOES_ON = "the same command, without --overwrite, goes on\n"


def test_a_signal_to_the_command_alone_stops_all_runs_with_their_steps(screen, tmp_path, capfd):
    output = tmp_path / "cv"
    flags = ["--max_steps", "1000000", "--save_steps", "20", "--save_total_limit", "100000"]

    def stop():
        wait_for_checkpoints(output, 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = Thread(target=stop)
    thread.start()
    code = pertstate.cli.main(words(screen, output, "--jobs", "2", *flags))
    thread.join()
    said = capfd.readouterr().err
    assert code == 143 and said.startswith("pertstate crossval: stopped by SIGTERM; ") and said.endswith(GOES_ON)
    assert multiprocessing.active_children() == []
    runs = [*output.glob("runs/state/*")]
    assert len(runs) == 2 and all(missing_of(path) is None for run in runs for path in checkpoints_of(run))
    assert all(sorted(os.listdir(run)) == sorted(path.name for path in checkpoints_of(run)) for run in runs)
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.lock")]


def test_a_signal_to_all_processes_is_heard_once(screen, tmp_path):
    """As `timeout`, schedulers and terminals send it: to the command, its runs, and the process that forks them."""
    output = tmp_path / "cv"
    words_of = words(screen, output, "--max_steps", "1000000", "--save_steps", "20", "--save_total_limit", "100000")
    process = launches.start(["-m", "pertstate.cli", *words_of])
    wait_for_checkpoints(output, 1)
    os.killpg(process.pid, signal.SIGTERM)
    done = process.communicate()
    assert done.returncode == 143 and done.stderr.count("\n") == 1 and done.stderr.endswith(GOES_ON), done.stderr
    [run] = output.glob("runs/state/*")
    checkpoints = checkpoints_of(run)
    assert all(missing_of(path) is None for path in checkpoints)
    assert sorted(os.listdir(run)) == sorted(path.name for path in checkpoints)
    # The step at which it was stopped; a run that is killed leaves those that it saves by itself.
    assert any(int(path.name.rpartition("-")[2]) % 20 for path in checkpoints)
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.lock")]


def test_kills_leave_nothing_for_ever(screen, tmp_path):
    """Killed again and again while it pools its scores; the scores are always whole, and the last run clears away."""
    output = tmp_path / "cv"
    family = ["--families", "state-perturbation-mean"]
    assert pertstate.cli.main(words(screen, output, *family)) == 0
    made = {path: path.read_bytes() for path in output.glob("scores/*/*")}
    results = (output / "results.json").read_bytes()

    def work():
        assert pertstate.cli.main(words(screen, output, *family)) == 0

    def check():
        assert {path: path.read_bytes() for path in output.glob("scores/[!.]*/*")} == made
        assert (output / "results.json").read_bytes() == results

    assert killed_at_each_change(work, check, output, 3) > 3
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".lock", ".new"))]


def test_a_kill_while_it_begins_anew_leaves_no_part_of_a_run(tmp_path):
    """`--overwrite` removes older runs, each wholly or not at all."""
    before, output = tmp_path / "before", tmp_path / "cv"
    for name in ("a", "b", "c"):
        (before / "runs" / name).mkdir(parents=True)
        (before / "runs" / name / "config.json").write_text("{}")
    (before / SETTINGS).write_text('{"over": "contexts"}')

    def work():
        begin(output, output, {"over": "seeds"}, True, CROSSVAL)

    def check():
        runs = [*output.glob("runs/*")]
        assert not runs or len([*output.glob("runs/*/config.json")]) == 3
        shutil.rmtree(output)
        shutil.copytree(before, output)

    shutil.copytree(before, output)
    assert killed_at_each_change(work, check, output) > 2


@pytest.mark.parametrize(
    "text",
    ["[]", '"\\u001b[31m"', "null", "NaN", "9" * 5000, "[" * 100_000, '{"over": 1, "over": 2}', "{", '{"over": 1e999}'],
    ids=range(9),
)
def test_settings_that_are_damaged_are_refused_in_a_line(tmp_path, text):
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(ValueError, match="name another folder, or begin anew with --overwrite") as error:
        begin(tmp_path, tmp_path, {"over": "contexts"}, False, CROSSVAL)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 700


def test_different_names_of_folds_are_different_folders():
    names = ["A 549", "A/549", "A_549", "A:549", "x" * 300, "x" * 301, "\u00e4" * 200, "..", "a\nb", "\ud800"]
    found = [safe_name(name) for name in names]
    assert len(set(found)) == len(names) and found[2] == "A_549"
    assert all(len(os.fsencode(name)) < 200 and not set(name) & set("/\n:") for name in found)
