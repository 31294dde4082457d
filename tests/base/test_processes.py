"""Processes that work for another one: what is said where they fail."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from pertstate.base.processes import how_it_ended, with_imports
from pertstate.data import simulate_screen


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    simulate_screen(num_contexts=2, num_perturbations=2, num_genes=20, cells_per_group=8, seed=1).write_h5ad(path)
    return path


@pytest.mark.slow
def test_a_process_that_was_killed_is_said_to_be_killed_and_not_what_it_said_last():
    process = with_imports(__name__).Process(target=killed)
    process.start()
    process.join()
    said = how_it_ended(process.exitcode, "loss 0.4\n")
    assert said == "its process was ended by signal 9 (Killed); systems do so where memory runs out"
    assert "memory" not in how_it_ended(-signal.SIGTERM, "")
    assert how_it_ended(1, "loss 0.4\nno such file\n") == "no such file"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["crossval", "prepare"])
def test_a_script_that_does_not_guard_its_calls_is_told_to(command, screen, tmp_path):
    shutil.copy(screen, tmp_path / "first.h5ad")
    shutil.copy(screen, tmp_path / "second.h5ad")
    (tmp_path / "data.yaml").write_text("data: {datasets: {first: first.h5ad, second: second.h5ad}}\n")
    words = {
        "crossval": [
            "first.h5ad",
            "--over",
            "contexts",
            "--seeds",
            "1",
            "-o",
            "out",
            "--preset",
            "tiny",
            "--max_steps",
            "1",
        ],
        "prepare": ["--config", "data.yaml", "--output", "out", "--num-proc", "2", "--quiet"],
    }[command]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nimport pertstate.cli\nprint('begun')\nsys.exit(pertstate.cli.main({[command, *words]}))\n"
    )
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.count("begun") > 1
    lines = ended.stderr.splitlines()
    for line in (lines[0], lines[-1]):
        assert "A script that starts processes must keep its calls under `if __name__ == '__main__':`" in line, lines
    assert "is being written" not in ended.stderr
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    # With its calls guarded, it works.
    script.write_text(script.read_text().replace("sys.exit(", "if __name__ == '__main__':\n    sys.exit("))
    again = [sys.executable, script]
    assert subprocess.run(again, cwd=tmp_path, capture_output=True).returncode == 0


# The process that forks others imports nothing of ours here, so that the one that it forks does.
LATE = """
import multiprocessing
import signal


def heard():
    import pertstate.base.processes

    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    with context.Pool(1) as pool:
        print(pool.apply(heard))
"""


@pytest.mark.parametrize("preloaded", ["json", "pertstate.base.processes"])
def test_a_forked_process_hears_a_signal_whoever_imported_the_package(preloaded, tmp_path):
    (tmp_path / "script.py").write_text(LATE.replace("PRELOADED", repr(preloaded)))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
