"""One rule says which names mean a repository on the Hub."""

from pathlib import Path

import pytest

from pertstate.base.hub_names import is_repository, split_revision


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder `runs` with a checkpoint folder, and a file, in the current folder."""
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "screen.h5ad").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["user/name", "arcinstitute/ST-Tahoe", "Nobody/my_model-2.1"])
def test_names_of_repositories(here, name):
    assert is_repository(name) and is_repository(Path(name))


@pytest.mark.parametrize(
    "name",
    [
        "runs/model",  # a folder
        "runs/screen.h5ad",  # a file
        "runs/modle",  # misspelt
        "./model",
        "../model",
        "/model",
        "model",
        "model/",
        "",
        "a/b/c",
        "user/a name",
        "user/name..",
        "~/model",
        "user/name@main",  # see `split_revision`
    ],
)
def test_names_that_mean_no_repository(here, name):
    assert not is_repository(name)


def test_a_revision_belongs_to_no_name():
    assert split_revision("user/name") == ("user/name", None)
    assert split_revision("user/name@") == ("user/name", None)
    assert split_revision("user/name@v1") == ("user/name", "v1")
    assert split_revision("user/name@refs/pr/1") == ("user/name", "refs/pr/1")
