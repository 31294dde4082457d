"""A file that is written whole: the new one, or the old one as it was, and nothing beside it."""

import os
import resource
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from pertstate import StateConfig, StateForPerturbation
from pertstate.base.files import PARTIAL, partial_of, place_of_file, whole_file
from pertstate.base.vocabulary import PerturbationFeatures, Vocabulary
from pertstate.data.manifest import Manifest
from pertstate.evaluation.comparison import write_table


@pytest.fixture
def full_disk():
    """A disk that takes the first 4,000 bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(str(path)) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(f".a.json.{os.getpid()}-")
        assert partial.name.endswith(PARTIAL) and partial != partial_of(path)
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("written", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, old, written):
    path = tmp_path / "a.json"
    if old is not None:
        path.write_text(old)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        if written:
            partial.write_text("a part")
        raise KeyboardInterrupt
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == ({"a.json": old} if old else {})


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "else").mkdir()
    target, link = tmp_path / "else" / "a.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("first", "second"):
        with whole_file(link) as partial:
            partial.write_text(text)
        assert link.is_symlink() and target.read_text() == text and os.listdir(tmp_path / "else") == ["a.json"]


@pytest.mark.parametrize("what", ["fifo", "socket", "folder", "link to a fifo", "links in a circle"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, what, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("out")
    if what == "folder":
        path.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("out")
    elif what == "links in a circle":
        Path("other").symlink_to("out")
        path.symlink_to("other")
    else:
        os.mkfifo("pipe" if what.startswith("link") else "out")
        if what.startswith("link"):
            path.symlink_to("pipe")
    before = {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()}
    with pytest.raises((ValueError, OSError), match="is no regular file|is a folder|Too many levels"), whole_file(path):
        pass
    assert {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()} == before


def test_a_device_is_no_regular_file():
    """The function is only asked about the device, so nothing is written to it."""
    with pytest.raises(ValueError, match="/dev/null is no regular file but a device"):
        place_of_file("/dev/null")


def test_a_pipe_behind_a_link_is_no_regular_file():
    reads, writes = os.pipe()
    with open(reads), open(writes, "w"), pytest.raises(ValueError, match=f"/dev/fd/{writes} is no regular file"):
        place_of_file(f"/dev/fd/{writes}")


def test_errors_of_the_disk_are_one_sentence_in_whatever_form_they_come(tmp_path, full_disk):
    numbers = torch.zeros(10_000)
    writers = {
        "pt": lambda path: torch.save(numbers, path),
        "safetensors": lambda path: save_file({"a": numbers}, path),
        "txt": lambda path: path.write_bytes(b"x" * 10_000),
    }
    for ending, write in writers.items():
        path = tmp_path / f"a.{ending}"
        with pytest.raises(OSError) as caught, whole_file(path) as partial:
            write(partial)
        said = str(caught.value)
        assert "cannot be written, nothing is left of it: " in said and f"a.{ending}" in said, said
        assert "File too large" in said or "the disk is full, or a limit on the size of files is met" in said, said
    assert os.listdir(tmp_path) == []


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (
        RuntimeError("of the program"),
        FileNotFoundError(2, "No such file or directory", "input"),
        KeyError("a"),
    ):
        with pytest.raises(type(error)) as caught, whole_file(tmp_path / "a"):
            raise error
        assert caught.value is error


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("mask, rights", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_have_the_rights_of_other_files(tmp_path, mask, rights):
    """Safetensors writes files that only their owner may read."""
    model = StateForPerturbation(StateConfig.from_preset("tiny", input_dim=3, num_perturbations=2))
    before = os.umask(mask)
    try:
        save_features(tmp_path / "perturbation_features.safetensors", NAMES[:3])
        model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    written = [tmp_path / "perturbation_features.safetensors", tmp_path / "model" / "model.safetensors"]
    assert [path.stat().st_mode & 0o777 for path in written] == [rights] * 2
    assert not list(tmp_path.rglob("*.partial"))


def test_two_files_are_written_whole_together(tmp_path):
    """The state of a stream is written like this: whoever finds the first file finds the second, too."""
    first, second = tmp_path / "values.json", tmp_path / "arrays.bin"
    with whole_file(first) as values, whole_file(second) as arrays:
        values.write_text("values")
        arrays.write_text("arrays")
    assert first.read_text() == "values" and second.read_text() == "arrays"
    with pytest.raises(ValueError), whole_file(first) as values, whole_file(second) as arrays:
        values.write_text("other")
        arrays.write_text("other")
        raise ValueError
    assert first.read_text() == "values" and second.read_text() == "arrays" and len(os.listdir(tmp_path)) == 2


NAMES = [f"gene {i}" for i in range(1000)]


def save_vocabulary(path, names):
    Vocabulary(genes=names).save(path)


def save_features(path, names):
    PerturbationFeatures(names, np.ones((len(names), 3))).save(path)


def save_csv(path, names):
    write_table(pd.DataFrame({"name": names}), path, overwrite=True)


def save_manifest(path, names):
    empty = dict.fromkeys(Manifest.__dataclass_fields__)
    Manifest(**{**empty, "genes": names}).write(path)


@pytest.mark.parametrize(
    "save, name",
    [
        (save_vocabulary, "vocabulary.json"),
        (save_features, "perturbation_features.safetensors"),
        (save_csv, "table.csv"),
        (save_csv, "table.json"),
        (save_manifest, "store.json"),
    ],
)
def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk, save, name):
    path = tmp_path / name
    save(path, NAMES[:3])
    before = path.read_bytes()
    with pytest.raises(Exception, match="File too large"):
        save(path, NAMES)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]
