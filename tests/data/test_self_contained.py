"""Files that name other files, or more than they hold, are refused before anything of them is read."""

import os
import socket
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertstate.cli import main as pertstate
from pertstate.data.arguments import DataArguments
from pertstate.data.info import describe
from pertstate.data.reading import AnnDataFile, read_h5ad


SECRET = "a line of somebody else's file"


def screen(n: int = 20) -> ad.AnnData:
    obs = pd.DataFrame(
        {"perturbation": ["control", "A"] * (n // 2), "cell_type": "k"}, index=[f"c{i}" for i in range(n)]
    )
    counts = np.random.default_rng(0).poisson(2.0, (n, 8)).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(8)]))


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET * 100)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["names"] = np.array([SECRET] * 20, dtype=h5py.string_dtype())
        file["X"] = np.ones((20, 8), dtype=np.float32)
    screen().write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


def external_link(file: h5py.File, folder: Path, place: str):
    del file[place]
    file[place] = h5py.ExternalLink(str(folder / "secret.h5"), "/names")


def external_storage(file: h5py.File, folder: Path, place: str):
    del file[place]
    options = {"shape": (20,), "dtype": "S20", "external": [(str(folder / "secret.txt"), 0, 400)]}
    file.create_dataset(place, **options)


def virtual(file: h5py.File, folder: Path, place: str):
    del file[place]
    layout = h5py.VirtualLayout(shape=(20,), dtype=h5py.string_dtype())
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "names", shape=(20,))
    file.create_virtual_dataset(place, layout)


READERS = {
    "a file": lambda path: AnnDataFile(path),
    "whole": read_h5ad,
    "a run": lambda path: DataArguments(datasets=str(path)).file_source(),
    "info": describe,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", ["obs/_index", "obs/cell_type/categories", "layers/more", "uns/deep/er", "X/data"])
@pytest.mark.parametrize("attack", [external_link, external_storage, virtual])
def test_nothing_of_another_file_is_read(path, attack, place, reader):
    with h5py.File(path, "a") as file:
        file.require_dataset(place, (1,), "f4") if place not in file else None
        attack(file, path.parent, place)
    with pytest.raises(ValueError, match=f"{place} .*only what lies in the file itself is read") as error:
        READERS[reader](path)
    assert SECRET not in str(error.value)


def test_a_command_ends_with_one_line(path, capsys):
    with h5py.File(path, "a") as file:
        external_link(file, path.parent, "obs/_index")
    assert pertstate(["info", str(path)]) == 1
    said = capsys.readouterr()
    assert "obs/_index is a link to another file" in said.err and len(said.err.splitlines()) == 1 and not said.out


def test_links_within_the_file_are_followed_and_may_go_in_circles(path):
    with h5py.File(path, "a") as file:
        file["obs/copy"] = file["obs/perturbation"]
        file["uns/soft"] = h5py.SoftLink("/obs/perturbation")
        file["uns/nowhere"] = h5py.SoftLink("/not/there")
        file["uns/up"] = file["/"]
    with AnnDataFile(path) as data:
        assert data.n_obs == 20 and data.some_obs(slice(0, 1), ["perturbation"]).iloc[0, 0] == "control"


def many_names(file: h5py.File):
    del file["var/_index"]
    file.create_dataset("var/_index", (200_000_000,), h5py.string_dtype(), chunks=(1 << 20,), compression="gzip")


def wide_names(file: h5py.File):
    del file["obs/_index"]
    file.create_dataset("obs/_index", (20,), "S1000000000", chunks=(1,), compression="gzip")


def many_codes(file: h5py.File):
    del file["obs/perturbation/codes"]
    file.create_dataset("obs/perturbation/codes", (10**10,), "i1", chunks=(1 << 20,), compression="gzip")


@pytest.mark.parametrize("attack", [many_names, wide_names, many_codes])
def test_what_a_file_cannot_hold_is_not_made_room_for(path, attack):
    with h5py.File(path, "a") as file:
        attack(file)
    assert path.stat().st_size < 10**6
    start = time.perf_counter()
    for reader in READERS.values():
        with pytest.raises(ValueError, match="says that it has|holds texts of 1,000,000,000 bytes"):
            reader(path)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_is_not_waited_for(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = Path("screen.h5ad")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    for reader in ("a file", "whole", "info"):
        with pytest.raises(ValueError, match=f"expected a file, found a {kind}"):
            READERS[reader](path)


def test_a_zarr_store_stays_in_its_folder(tmp_path):
    store = tmp_path / "screen.zarr"
    screen().write_zarr(store)
    with AnnDataFile(store) as data:
        assert data.n_obs == 20
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text(SECRET)
    (store / "inside").symlink_to("obs")  # leads to another place of the store
    AnnDataFile(store)
    chunk = next(path for path in (store / "obs").rglob("*") if path.is_file() and path.parent.name != "obs")
    for link in (store / "uns" / "more", chunk):
        kept = link.read_bytes() if link.exists() else None
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "elsewhere" / "secret")
        for reader in READERS.values():
            with pytest.raises(ValueError, match="is a link to .* which lies elsewhere"):
                reader(store)
        link.unlink()
        if kept is not None:
            link.write_bytes(kept)
    os.mkfifo(store / "X" / "pipe")
    with pytest.raises(ValueError, match="X/pipe: expected a file or a folder, found a pipe"):
        AnnDataFile(store)


def test_files_of_everyday_are_read(tmp_path):
    """Files are read with constant columns, which compress to almost nothing, and without any values."""
    data = screen(3000)
    data.obs["constant"] = 0
    data.obs["word"] = pd.Categorical(["the same"] * 3000)
    data.uns["zeros"] = np.zeros(10**6)
    data.write_h5ad(tmp_path / "gzip.h5ad", compression="gzip")
    data.write_zarr(tmp_path / "all.zarr")
    ad.AnnData(obs=data.obs).write_h5ad(tmp_path / "labels.h5ad")
    for name in ("gzip.h5ad", "all.zarr", "labels.h5ad"):
        with AnnDataFile(tmp_path / name) as read:
            assert read.n_obs == 3000
