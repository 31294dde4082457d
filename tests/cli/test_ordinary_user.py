"""Files that the user may not read, and folders that the user may not write: one line, exit code 1, and nothing left."""

import os
import shutil
from pathlib import Path

import launches
import pytest

import pertstate.cli
from pertstate.data import simulate_screen


# The superuser may read and write everything. In these processes it may not, as it gives up the capabilities for that (2 to 4 of
# capabilities(7): DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER).
CODE = """
import ctypes, os, sys
if os.geteuid() == 0:
    libc, header, data = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0], data[1] = data[0] & ~0b1110, data[1] & ~0b1110
    assert libc.capset(header, data) == 0
from pertstate.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    screen = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=30, cells_per_group=24, seed=1)
    screen.write_h5ad(folder / "screen.h5ad")
    fields = {"preset": "tiny", "set_size": 8, "max_steps": 2, "save_steps": 1, "use_cpu": True, "quiet": True}
    held = {"test_contexts": ["type_2"], "validation": "none"}
    pertstate.fit(folder / "screen.h5ad", folder / "run", **held, **fields)
    (folder / "data.yaml").write_text(f"data: {{datasets: {{s: {folder}/screen.h5ad}}}}\n")
    (folder / "run.yaml").write_text(
        f"data: {{datasets: {{s: {folder}/screen.h5ad}}, test_contexts: [type_2]}}\nmodel: {{preset: tiny, set_size: 8}}\n"
        f"training: {{max_steps: 1, use_cpu: true}}\n"
    )
    pertstate.cli.main(["prepare", "--config", f"{folder}/data.yaml", "--output", f"{folder}/store", "--quiet"])
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of all of it, whose rights a test may take away."""
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


def refused(place: Path, denied: Path, mode: int, *words) -> str:
    """The error of a command while a file or folder has other rights."""
    before = sorted(place.rglob("*"))
    denied.chmod(mode)
    done = launches.run(["-c", CODE, *map(str, words)], cwd=place)
    denied.chmod(0o755)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert error.startswith(f"pertstate {words[0]}: error: ") and "Permission denied" in error
    assert sorted(place.rglob("*")) == before
    return error


COMMANDS = {
    "info": ["info", "screen.h5ad"],
    "train": ["train", "screen.h5ad", "--output_dir", "new"],
    "predict": ["predict", "--model", "run", "--adata", "screen.h5ad", "--output", "out.h5ad", "--quiet"],
    "evaluate": ["evaluate", "--model", "run", "--real", "screen.h5ad", "--quiet"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_cells_that_may_not_be_read(place, command):
    said = refused(place, place / "screen.h5ad", 0, *COMMANDS[command])
    assert (
        "screen.h5ad: Permission denied; this user may not read it, or may not write to it: ls -ld shows its rights"
        in said
    )


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "vocabulary.json", "processor_config.json", "record.json"]
)
def test_a_checkpoint_of_which_a_file_may_not_be_read(place, name):
    for command in (COMMANDS["predict"], ["info", "run"]):
        assert f"run/{name}: Permission denied" in refused(place, place / "run" / name, 0, *command)


@pytest.mark.parametrize(
    "words",
    [
        COMMANDS["predict"],
        ["info", "run"],
        ["report", "run", "-o", "report.html"],
        ["merge", "run", "merged"],
        ["train", "run.yaml", "--output_dir", "run", "--resume_from_checkpoint", "last"],
    ],
)
def test_a_folder_that_may_not_be_read(place, words):
    assert "run" in refused(place, place / "run", 0, *words)


def test_a_store_that_may_not_be_read(place):
    train = ["train", "store", "--output_dir", "new", "--max_steps", "1", "--preset", "tiny"]
    for words in (["info", "store"], train):
        assert "store" in refused(place, place / "store", 0, *words)
        assert "store/store.json: Permission denied" in refused(place, place / "store" / "store.json", 0, *words)
    (shard,) = (place / "store").glob("*.arrow")
    assert f"store/{shard.name}: Permission denied" in refused(place, shard, 0, *train)


def test_vectors_that_may_not_be_read(place):
    vectors = place / "vectors.csv"
    vectors.write_text("name,a\npert_0,1\n")
    words = ["train", "screen.h5ad", "--perturbation_features", "vectors.csv", "--output_dir", "new"]
    assert "error: vectors.csv: Permission denied; this user may not read it" in refused(place, vectors, 0, *words)


def test_a_run_file_that_may_not_be_read(place):
    said = refused(place, place / "run.yaml", 0, "train", "run.yaml", "--output_dir", "new")
    assert said.startswith("pertstate train: error: run.yaml: Permission denied")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "run.yaml", "--output_dir", "new"],
        COMMANDS["predict"],
        ["report", "run", "-o", "report.html"],
        [*COMMANDS["evaluate"], "--output", "scores.csv"],
        ["prepare", "--config", "data.yaml", "--output", "new", "--quiet"],
        ["configs", "demo", "--output", "new.yaml"],
    ],
)
def test_a_folder_that_may_not_be_written_is_named_before_any_work(place, words):
    said = refused(place, place, 0o555, *words)
    assert f"error: {os.path.realpath(place)}: Permission denied" in said


def test_a_run_that_may_not_be_written_stays_as_it_was(place):
    weights = (place / "run" / "model.safetensors").read_bytes()
    said = refused(place, place / "run", 0o555, "train", "run.yaml", "--output_dir", "run", "--overwrite")
    assert "run" in said and (place / "run" / "model.safetensors").read_bytes() == weights
