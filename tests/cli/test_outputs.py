"""Outputs of all commands: what may be replaced, by whom, and what a full disk leaves."""

import os
import shutil
import socket
from pathlib import Path

import anndata as ad
import finetuning_runs
import h5py
import launches
import pandas as pd
import pytest
import yaml
from legacy_writer import LegacyFolderWriter

from pertstate.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = finetuning_runs.make_folder(tmp_path_factory.mktemp("outputs"))
    finetuning_runs.run(folder, "adapter", "second", lora_rank=2)
    LegacyFolderWriter().write(folder / "legacy")
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": {"datasets": str(folder / "first.h5ad")}}))
    assert main(words(folder, "predict", folder / "predicted.h5ad")) == 0
    return folder


COMMANDS = ("predict", "evaluate", "configs", "prepare", "merge", "convert")
FILES = {"predict": "out.h5ad", "evaluate": "out.csv", "configs": "out.yaml"}


def words(folder: Path, command: str, output: Path) -> list[str]:
    of = {
        "predict": ["--model", folder / "base", "--adata", folder / "first.h5ad", "--quiet", "--perturbation", "pert_1"]
        + ["--output", output],
        "evaluate": [
            "--predicted",
            folder / "predicted.h5ad",
            "--real",
            folder / "first.h5ad",
            "--train",
            folder / "first.h5ad",
        ]
        + ["--quiet", "--output", output],
        "configs": ["demo", "--output", output],
        "prepare": ["--config", folder / "data.yaml", "--quiet", "--output", output],
        "merge": [folder / "adapter", output],
        "convert": [folder / "legacy", output],
    }
    return [command, *map(str, of[command])]


def content(output: Path) -> dict[str, object]:
    if output.is_file():
        if output.suffix == ".h5ad":
            with h5py.File(output) as file:
                return {"X": file["X"][:].tobytes()}
        return {"": output.read_bytes()}
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_replaced_only_with_overwrite(folder, tmp_path, capsys, command):
    output = tmp_path / FILES.get(command, "out")
    assert main(words(folder, command, output)) == 0
    made = content(output)
    if output.is_file():
        output.write_text("old")
    else:
        key = next(output.glob("*.json"))
        (output / "mine.txt").write_text("mine")
        assert key.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(words(folder, command, output)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pertstate {command}: error: {output} exists") and "--overwrite" in said, said
    assert said.count("\n") == 1 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert main([*words(folder, command, output), "--overwrite"]) == 0
    found = content(output)
    if output.is_dir():
        assert found.pop("mine.txt") == b"mine"
    assert found.keys() == made.keys() and os.listdir(tmp_path) == [output.name]
    if command not in ("prepare", "merge", "convert"):
        assert found == made


def test_scores_are_replaced_only_with_overwrite(folder, tmp_path, capsys):
    scores = tmp_path / "scores"
    evaluate = [*words(folder, "evaluate", tmp_path / "out.csv")[:-2], "--scores", str(scores)]
    assert main(evaluate) == 0
    made = content(scores)
    assert set(made) == {"scores.csv", "scores.json", "scores.safetensors"}
    (scores / "mine.txt").write_text("mine")
    (scores / "scores.csv").write_text("old")
    capsys.readouterr()
    assert main(evaluate) == 1
    assert capsys.readouterr().err.startswith(f"pertstate evaluate: error: {scores} exists")
    assert (scores / "scores.csv").read_text() == "old"
    assert main([*evaluate, "--overwrite"]) == 0
    assert content(scores) == {**made, "mine.txt": b"mine"} and os.listdir(tmp_path) == ["scores"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_regular_file_is_refused_before_any_work(folder, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    name = FILES.get(command, "out")
    for make in (os.mkfifo, bind):
        make(name)
        before = os.lstat(name)
        capsys.readouterr()
        assert main([*words(folder, command, Path(name)), "--overwrite"]) == 1
        is_file = "is no regular file but a device, a pipe or a socket; name a file to write"
        expected = is_file if command in FILES else "is a file; name a folder to write"
        assert capsys.readouterr().err == f"pertstate {command}: error: {name} {expected}\n"
        after = os.lstat(name)
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and os.listdir(".") == [name]
        os.unlink(name)


def bind(name: str):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)


@pytest.mark.parametrize("command", FILES)
def test_a_link_stays_a_link(folder, tmp_path, command):
    name = FILES[command]
    (tmp_path / "disk").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    assert main(words(folder, command, tmp_path / name)) == 0
    assert main(words(folder, command, tmp_path / name)) == 1
    assert main([*words(folder, command, tmp_path / name), "--overwrite"]) == 0
    assert (tmp_path / name).is_symlink() and os.listdir(tmp_path / "disk") == [name]
    if command == "predict":
        assert ad.read_h5ad(tmp_path / name).n_obs > 0
    if command == "evaluate":
        assert len(pd.read_csv(tmp_path / name)) > 0


WAIT = """
import sys
import pertstate.cli
command, module, name = sys.argv[1:4]
import importlib
module = importlib.import_module(module)
work = getattr(module, name)
def wait(*args, **kwargs):
    print("working", flush=True)
    sys.stdin.readline()
    return work(*args, **kwargs)
setattr(module, name, wait)
raise SystemExit(pertstate.cli.main(sys.argv[4:]))
"""
WORK = {
    "predict": ("pertstate.evaluation.prediction", "plan_arms"),
    "merge": ("pertstate.hub.merging", "load_adapter"),
    "convert": ("pertstate.legacy.conversion", "_model"),
    "prepare": ("pertstate.data.preparation", "_plan"),
}


@pytest.mark.parametrize("command", WORK)
def test_the_second_of_two_is_told_of_the_first(folder, tmp_path, capsys, command):
    output = tmp_path / FILES.get(command, "out")
    process = launches.start(["-c", WAIT, command, *WORK[command], *words(folder, command, output)])
    assert process.stdout.readline() == "working\n"
    for flags in ([], ["--overwrite"]):
        capsys.readouterr()
        assert main([*words(folder, command, output), *flags]) == 1
        said = capsys.readouterr().err
        assert f"{output} is being written by process {process.pid} on {socket.gethostname()} (" in said, said
        assert said.count("\n") == 1
    done = process.communicate("\n")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == [output.name] and content(output)


@pytest.mark.parametrize("command", COMMANDS)
def test_links_that_loop_or_lead_nowhere_are_one_line(folder, tmp_path, capsys, monkeypatch, command):
    ending = Path(FILES.get(command, "")).suffix
    monkeypatch.chdir(tmp_path)
    for name, target in (("a", "a"), ("b", "c"), ("c", "b"), ("nowhere", "no/such/folder")):
        os.symlink(target + ending, name + ending)
    before = sorted(os.listdir())
    for name in ("a", "b", "a/x", "nowhere", "nowhere/x"):
        for flags in ([], ["--overwrite"]):
            capsys.readouterr()
            assert main([*words(folder, command, Path(name + ending)), *flags]) == 1, name
            said = capsys.readouterr().err
            assert said.startswith(f"pertstate {command}: error: ") and said.count("\n") == 1, said
    assert sorted(os.listdir()) == before and all(os.path.islink(name) for name in before)


@pytest.mark.parametrize(
    "command",
    [
        ["report", "scores", "-o", "x.html", "--plots", "x.html"],
        ["evaluate", "--predicted", "p.h5ad", "--real", "r.h5ad", "--output", "x.csv", "--scores", "./x.csv"],
        ["evaluate", "--predicted", "p.h5ad", "--real", "r.h5ad", "--output", "x.csv", "--plots", "x.csv"],
        ["predict", "--model", "base", "--adata", "first.h5ad", "--output", "x.h5ad", "--cell-eval", "x.h5ad"],
    ],
)
def test_two_outputs_of_one_name_are_refused_before_any_work(folder, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    given = [str(folder / word) if word in ("base", "first.h5ad") else word for word in command]
    assert main(given) == 1
    assert "expected two outputs, found one; name another for one of them" in capsys.readouterr().err
    assert not os.listdir()


FULL = """
import resource, sys
import pertstate.cli
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
raise SystemExit(pertstate.cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(folder, tmp_path, command, over):
    output = tmp_path / FILES.get(command, "out")
    if over:
        assert main(words(folder, command, output)) == 0
    before = content(output) if over else None
    said = set()
    for limit in (400, 3000, 20_000):
        done = launches.run(["-c", FULL, limit, *words(folder, command, output), *(["--overwrite"] if over else [])])
        if done.returncode == 0:
            assert limit > (output.stat().st_size if output.is_file() else 3000)
            break
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.splitlines()[-1]
        assert "cannot be written, nothing is left of it: File too large" in last and str(output) in last, last
        assert os.listdir(tmp_path) == ([output.name] if over else [])
        assert not over or content(output) == before
        said.add(last)
    assert said


@pytest.mark.parametrize("name", ["out.zarr", "out.parquet", "out.csv", "pair.h5ad"])
def test_a_full_disk_and_every_kind_of_prediction(folder, tmp_path, name):
    output = tmp_path / name
    words = [
        "predict",
        "--model",
        folder / "base",
        "--adata",
        folder / "first.h5ad",
        "--quiet",
        "--perturbation",
        "pert_1",
    ]
    words += ["--summary" if output.suffix in (".parquet", ".csv") else "--output", output]
    words += ["--cell-eval", tmp_path / "real.h5ad"] if name == "pair.h5ad" else []
    said = 0
    for limit in (60, 400, 3000, 20_000, 100_000_000):
        done = launches.run(["-c", FULL, limit, *words])
        if done.returncode == 0:
            break
        assert "Traceback" not in done.stderr, done.stderr
        last = done.stderr.splitlines()[-1]
        assert "cannot be written, nothing is left of it: File too large" in last and str(tmp_path) in last, last
        assert os.listdir(tmp_path) == []
        said += 1
    assert said and done.returncode == 0 and name in os.listdir(tmp_path)


def test_a_folder_of_something_else_is_not_overwritten(folder, tmp_path, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    for command in ("prepare", "merge", "convert"):
        capsys.readouterr()
        assert main([*words(folder, command, home), "--overwrite"]) == 1
        assert "so overwrite does not replace it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "thesis.txt"]


def test_merge_beside_the_checkpoints_of_a_run_leaves_them(folder, tmp_path):
    """The folder of a run holds more than its model, and merge must leave the rest."""
    run = Path(shutil.copytree(folder / "base", tmp_path / "run"))
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    assert main([*words(folder, "merge", run), "--overwrite"]) == 0
    assert (run / "checkpoint-3" / "optimizer.pt").read_bytes() == b"state"
