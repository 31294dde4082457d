"""A file that is written whole: the new one, or the old one as it was, and nothing beside it."""

import os
import resource

import numpy as np
import pandas as pd
import pytest

from pertstate.base.files import partial_of, whole_file
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
        assert partial == partial_of(path) == tmp_path / "a.json.partial"
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


def test_what_a_kill_left_is_written_over(tmp_path):
    path = tmp_path / "a.json"
    partial_of(path).write_text("a part, longer than the file")
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_of_two_files_of_which_one_names_the_other(tmp_path):
    """As the state of a stream is written: whoever finds the first file finds the second, too."""
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
    write_table(pd.DataFrame({"name": names}), path)


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
