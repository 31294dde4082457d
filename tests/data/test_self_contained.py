"""Files that name other files, or more than they hold, are refused before anything of them is read."""

import json
import os
import pickle
import socket
import time
import zlib
from pathlib import Path

import anndata as ad
import h5py
import numcodecs.pickles
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from little_room import in_little_room

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
    var = pd.DataFrame(index=[f"g{i}" for i in range(8)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var, obsm={"E": counts.copy()}, uns={"x": np.arange(3)})


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


def replaced(file: h5py.File, name: str, **options) -> h5py.Dataset:
    attributes = dict(file[name].attrs)
    del file[name]
    made = file.create_dataset(name, **options)
    made.attrs.update(attributes)
    return made


def many_rows(file: h5py.File):
    replaced(file, "X/indptr", shape=(10**10,), dtype="i8", chunks=(1 << 20,))


def many_values(file: h5py.File):
    for name, dtype in (("data", "f4"), ("indices", "i4")):
        replaced(file, f"X/{name}", shape=(10**10,), dtype=dtype)
    replaced(file, "X/indptr", data=np.array([0] + [10**10] * 20))


def wide_embedding(file: h5py.File):
    replaced(file, "obsm/E", shape=(20, 10**10), dtype="f4", chunks=(1, 1 << 20))


def wide_parts(file: h5py.File):
    values = file["X/data"][:]
    replaced(file, "X/data", data=values[:0], maxshape=(None,), dtype="f4", chunks=(10**9,)).resize(values.shape)


def one_wide_text(file: h5py.File):
    file.create_dataset("uns/text", (), "S2000000000")


def packed_twice(file: h5py.File):
    """A megabyte of zeros, packed again and again."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((20,))
    made.set_deflate(9)
    made.set_deflate(9)
    codes = h5py.h5d.create(
        file["obs/perturbation"].id, b"more", h5py.h5t.NATIVE_INT8, h5py.h5s.create_simple((20,)), made
    )
    codes.write_direct_chunk((0,), zlib.compress(zlib.compress(bytes(10**6))))


def long_part(file: h5py.File):
    """Twenty values, whose part goes on with zeros."""
    codes = replaced(file, "obs/perturbation/codes", data=np.zeros(20, np.int8), chunks=(20,), compression="gzip")
    codes.id.write_direct_chunk((0,), zlib.compress(bytes(10**8)))


def many_lists(file: h5py.File):
    file.create_dataset("uns/lists", (10**9,), h5py.vlen_dtype(np.int8), chunks=(1 << 20,))


@pytest.mark.parametrize(
    "attack",
    [many_names, wide_names, many_codes, many_rows, many_values, wide_embedding, wide_parts, many_lists, one_wide_text]
    + [packed_twice, long_part],
)
def test_what_a_file_cannot_hold_is_not_made_room_for(path, attack):
    with h5py.File(path, "a") as file:
        attack(file)
    assert path.stat().st_size < 10**6
    start = time.perf_counter()
    for reader in READERS.values():
        with pytest.raises(
            ValueError,
            match="says that it has|holds texts of [12],000,000,000 bytes|in parts of|packed 2 times|has 20 values, and 97,",
        ):
            reader(path)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("options", [{}, {"chunks": (500,), "compression": "gzip"}])
@pytest.mark.parametrize("place", ["var/_index", "obs/_index", "obs/cell_type/categories", "uns/texts"])
def test_names_that_share_one_long_text_are_not_made(path, place, options):
    """A megabyte of text is the name of 5000 genes."""
    with h5py.File(path, "a") as file:
        attributes = dict(file[place].attrs) if place in file else {"encoding-type": "string-array"}
        if place in file:
            del file[place]
        made = file.create_dataset(place, (5000,), h5py.string_dtype(), **options)
        made.attrs.update(attributes)
        made[0], made[1:] = "A" * 10**6, "b"
        file.flush()
        if options:
            mask, chunk = made.id.read_direct_chunk((0,))
            one = zlib.compress(zlib.decompress(chunk)[:16] * 500)
            for start in range(0, 5000, 500):
                made.id.write_direct_chunk((start,), one, mask)
        else:
            at = made.id.get_offset()
    if not options:
        content = bytearray(path.read_bytes())
        content[at : at + 16 * 5000] = content[at : at + 16] * 5000
        path.write_bytes(content)
    assert path.stat().st_size < 2 * 10**6
    for reader in READERS.values():
        said = in_little_room(reader, path)
        assert f"{place} has texts of 5,000,000,000 bytes together" in said, said[:1000]


def test_groups_in_groups_are_counted(path):
    with h5py.File(path, "a") as file:
        group = file["uns"]
        for _ in range(5000):
            group = group.create_group("a")
    start = time.perf_counter()
    for reader in READERS.values():
        with pytest.raises(ValueError, match="is nested more than 50 deep"):
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


class Mark:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


PICKLE = {"id": "pickle", "protocol": 5}
PACKED = {
    "a compressor": (2, "obs/_index", {"compressor": PICKLE}),
    "a filter": (2, "X", {"compressor": None, "filters": [PICKLE]}),
    "the second filter": (2, "obs/_index", {"compressor": None, "filters": [{"id": "vlen-utf8"}, PICKLE]}),
    "a filter of texts": (2, "obs/_index", {"filters": [{"id": "json2"}]}),
    "a codec": (3, "X", {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle"}]}),
    "a codec in parts": (
        3,
        "X",
        {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "pickle"}]}}]},
    ),
    "no codec": (3, "X", {"codecs": [5]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("attack", PACKED)
def test_values_of_zarr_are_unpacked_by_nothing_that_runs_code(tmp_path, attack, together, monkeypatch):
    format, place, entries = PACKED[attack]
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)  # as older versions do
    path = made_zarr(tmp_path / "screen.zarr", format, together)
    for chunk in (path / place).rglob("*"):
        if chunk.is_file() and not chunk.name.startswith(".") and chunk.name != "zarr.json":
            chunk.write_bytes(pickle.dumps(Mark(str(tmp_path / "mark"))))
    change_array(path, format, place, together, **entries)
    for reader in READERS.values():
        with pytest.raises(
            ValueError, match="its values are packed as '(pickle|json2|numcodecs.pickle|5)', expected one of"
        ):
            reader(path)
    assert not (tmp_path / "mark").exists()


def made_zarr(path: Path, format: int, together: bool) -> Path:
    """A store; `together` with the metadata of all arrays in one file, which goes before theirs."""
    adata = screen()
    adata.X = adata.X.toarray()
    with ad.settings.override(zarr_write_format=format):
        adata.write_zarr(path)
    (path / ".zmetadata").unlink(missing_ok=True)
    if format == 3:
        root = json.loads((path / "zarr.json").read_text())
        root.pop("consolidated_metadata", None)
        (path / "zarr.json").write_text(json.dumps(root))
    if together:
        zarr.consolidate_metadata(str(path), zarr_format=format)
    return path


def change_array(path: Path, format: int, place: str, together: bool, **entries):
    file = (
        path / ("zarr.json" if format == 3 else ".zmetadata")
        if together
        else path / place / (".zarray" if format == 2 else "zarr.json")
    )
    content = json.loads(file.read_text())
    array = content
    if together and format == 2:
        array = content["metadata"][f"{place}/.zarray"]
    elif together:
        array = content["consolidated_metadata"]["metadata"][place]
    array.update(entries)
    file.write_text(json.dumps(content))


SIZES = {
    "many codes": ("obs/perturbation/codes", [10**10], [1 << 20]),
    "many names": ("var/_index", [10**10], [1 << 20]),
    "a wide embedding": ("obsm/E", [20, 10**10], [1, 1 << 20]),
    "many values of uns": ("uns/x", [10**12], [1 << 20]),
    "wide parts": ("X", [20, 8], [1 << 20, 1 << 20]),
    "wide names": ("obs/_index", [20], [1 << 40]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("format", [2, 3])
@pytest.mark.parametrize("attack", SIZES)
def test_what_a_store_of_zarr_cannot_hold_is_not_made_room_for(tmp_path, attack, format, together):
    place, shape, chunks = SIZES[attack]
    path = made_zarr(tmp_path / "screen.zarr", format, together)
    grid = (
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}}}
        if format == 3
        else {"chunks": chunks}
    )
    change_array(path, format, place, together, shape=shape, **grid)
    for reader in ("a file", "whole"):
        said = in_little_room(READERS[reader], path)
        assert f"{place} says that it has" in said or f"{place} has" in said and "in parts of" in said, said[:2000]


@pytest.mark.filterwarnings("ignore")
def test_zeros_that_zarr_does_not_write_are_read(tmp_path):
    adata = screen()
    adata.layers["zeros"] = np.zeros(adata.shape, np.float32)
    adata.write_zarr(tmp_path / "screen.zarr")
    assert read_h5ad(tmp_path / "screen.zarr").layers["zeros"].sum() == 0


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
