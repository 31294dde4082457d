"""Files on disk: rows equal those in memory, and a file that is not whole gives one clear error."""

import gzip
import os
import re
import resource
import shutil
import tempfile
import time
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from pertstate.data.reading import AnnDataFile, expand_paths, read_h5ad
from pertstate.processing import StateProcessor


CELLS, GENES = 400, 9


def screen() -> ad.AnnData:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"perturbation": ["control", "A"] * (CELLS // 2), "cell_type": "T"})
    obs.index = [f"cell{i}" for i in range(CELLS)]
    dense = (rng.poisson(1.0, (CELLS, GENES)) * np.log(2)).astype(np.float32)
    return ad.AnnData(
        dense,
        obs=obs,
        var=pd.DataFrame(index=[f"gene{i}" for i in range(GENES)]),
        layers={"csr": sp.csr_matrix(dense), "csc": sp.csc_matrix(dense), "double": dense.astype(np.float64)},
        obsm={
            "array": rng.normal(size=(CELLS, 3)),
            "sparse": sp.csr_matrix(dense[:, :4]),
            "frame": pd.DataFrame({"x": np.arange(CELLS), "y": rng.random(CELLS)}, index=obs.index),
        },
        uns={"note": "a screen"},
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "screen.h5ad"
    screen().write_h5ad(path)
    return path


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def matrices(data) -> dict:
    return {"X": data.X, **dict(data.layers.items()), **dict(data.obsm.items())}


def test_labels_and_names_are_those_of_the_file(path):
    whole = read_h5ad(path)
    with AnnDataFile(path) as data:
        pd.testing.assert_frame_equal(data.obs, whole.obs)
        assert data.var_names.tolist() == whole.var_names.tolist()
        assert (data.n_obs, data.obs_names.tolist()) == (CELLS, whole.obs_names.tolist())
        assert data.uns == {"note": "a screen"}
        assert data.X.shape == (CELLS, GENES) and data.obsm["array"].shape == (CELLS, 3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.one_of(
        st.lists(st.integers(0, CELLS - 1), unique=True).map(sorted),  # as the processor asks
        st.lists(st.integers(0, CELLS - 1)),  # in any order, some twice
        st.tuples(st.integers(0, CELLS), st.integers(0, CELLS)).map(sorted).map(lambda ends: slice(*ends)),
        st.just(slice(None)),
    )
)
def test_rows_equal_those_in_memory(path, rows):
    whole = screen()
    rows = rows if isinstance(rows, slice) else np.array(rows, dtype=np.int64)
    with AnnDataFile(path) as data:
        on_disk, in_memory = matrices(data), matrices(whole)
        assert set(on_disk) == set(in_memory)
        for name, matrix in in_memory.items():
            found = on_disk[name][rows]
            assert isinstance(found, np.ndarray) or found.format == "csr", name
            np.testing.assert_array_equal(dense(found), dense(matrix)[rows], err_msg=name)


def test_a_file_that_is_written_anew_has_its_new_genes(tmp_path):
    path, adata = tmp_path / "screen.h5ad", screen()
    for names in ([f"gene{i}" for i in range(GENES)], [f"gene{i}" for i in range(GENES, 2 * GENES)]):
        adata.var_names = names
        adata.write_h5ad(path)
        for _ in range(2):
            with AnnDataFile(path) as data:
                assert data.var_names.tolist() == names
                data.var["mine"] = 1  # a table belongs to who opened the file
    with AnnDataFile(path) as data:
        assert data.var.columns.tolist() == []


def test_a_processor_reads_the_same_from_disk(path):
    whole = screen()
    rows = np.array([0, 1, 90, 91, 300, CELLS - 1])
    for source in ("X", "layers/csr", "layers/csc", "layers/double", "obsm/array", "obsm/sparse", "obsm/frame"):
        processor = StateProcessor.fit(whole, input=source, normalize="none")
        with AnnDataFile(path) as data:
            np.testing.assert_array_equal(processor.features(data, rows), processor.features(whole, rows), source)
            np.testing.assert_array_equal(processor.features(data), processor.features(whole), source)
            assert StateProcessor.fit(data, input=source, normalize="none").vocabulary == processor.vocabulary


def test_a_file_without_x(tmp_path):
    adata = screen()
    adata.X = None
    adata.write_h5ad(tmp_path / "no_x.h5ad")
    with AnnDataFile(tmp_path / "no_x.h5ad") as data:
        assert data.X is None
        with pytest.raises(KeyError, match="the data have no X, found layers .*csr"):
            StateProcessor.fit(data)


def test_what_is_not_asked_for_is_not_read(path, tmp_path):
    broken = tmp_path / "broken_layer.h5ad"
    shutil.copy(path, broken)
    with h5py.File(broken, "r+") as file:
        del file["layers/csc/indptr"]
        del file["obsm/frame/x"]
    with AnnDataFile(broken) as data:
        assert data.X[np.array([3])].shape == (1, GENES)
        for matrix in (data.layers["csc"], data.obsm["frame"]):
            with pytest.raises(ValueError, match="cannot be read as .h5ad"):
                matrix[np.array([3])]


# Files that are not whole


def both_ways(path):
    """The errors of reading every matrix of a file, whole and row by row."""

    def row_by_row(path):
        with AnnDataFile(path) as data:
            for matrix in matrices(data).values():
                if matrix is not None:
                    matrix[:]

    for read in (read_h5ad, row_by_row):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except (OSError, ValueError) as error:
                yield error
            else:
                yield None


def test_a_file_truncated_anywhere_is_one_clear_error(path, tmp_path):
    content = path.read_bytes()
    cut = tmp_path / "cut.h5ad"
    ends = sorted({0, 1, 7, 8, 9, 100, len(content) - 1, *range(0, len(content), len(content) // 60)})
    for end in ends:
        cut.write_bytes(content[:end])
        for error in both_ways(cut):
            assert type(error) is ValueError, f"cut at {end}: {error!r}"
            assert f"{cut} ({end:,} bytes) cannot be read as .h5ad" in str(error)
            assert str(error).endswith("Expected a whole AnnData file; copy or write it again")


@pytest.mark.parametrize("content", [b"", b"perturbation,cell_type\ncontrol,T\n", b"\x89HDF\r\n\x1a\n"])
def test_not_an_h5ad(tmp_path, content):
    path = tmp_path / "table.h5ad"
    path.write_bytes(content)
    for error in both_ways(path):
        assert type(error) is ValueError and "cannot be read as .h5ad" in str(error)


def test_hdf5_that_is_not_anndata(tmp_path):
    path = tmp_path / "other.h5ad"
    with h5py.File(path, "w") as file:
        file["matrix"] = np.zeros(3)
    with pytest.raises(ValueError, match="cannot be read as .h5ad: KeyError"):
        AnnDataFile(path)
    # The handle is closed: the file can be written again.
    with h5py.File(path, "w") as file:
        file["matrix"] = np.zeros(4)


@pytest.mark.parametrize(
    "name, groups, what",
    [
        (
            "cells.h5",
            ["matrix"],
            r"a matrix of 10x Genomics: make an AnnData of it with scanpy.read_10x_h5\(path\), add",
        ),
        ("cells.loom", ["matrix", "row_attrs", "col_attrs"], r"a loom file: .* anndata.io.read_loom\(path\)"),
        ("cells.h5ad", ["mod", "obs_names"], "a MuData file"),
        ("cells.h5seurat", ["assays"], "a Seurat object"),
        ("cells.mtx.gz", None, "a Matrix Market file"),
        ("cells.csv", None, "a table of text"),
    ],
)
def test_files_of_other_formats_say_how_an_anndata_is_made(tmp_path, name, groups, what):
    if groups is None:
        (tmp_path / name).write_text("1,2\n")
    else:
        with h5py.File(tmp_path / name, "w") as file:
            for group in groups:
                file.create_group(group)
    for error in both_ways(tmp_path / name):
        assert re.search(rf"{name} \(.* cannot be read as .h5ad: .* It is {what}", str(error)), error


def test_missing_files_and_folders(tmp_path):
    for read in (read_h5ad, AnnDataFile):
        with pytest.raises(FileNotFoundError, match=r"gone.h5ad: no such file \(looked from "):
            read(tmp_path / "gone.h5ad")
        with pytest.raises(ValueError, match="is a folder; expected one .h5ad or .zarr file"):
            read(tmp_path)


# Names of files


def test_file_folder_and_glob(tmp_path, monkeypatch):
    for name in ("b.h5ad", "a.h5ad", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.h5ad").write_text("")
    one, two, three = tmp_path / "a.h5ad", tmp_path / "b.h5ad", tmp_path / "sub" / "c.h5ad"
    assert expand_paths(one) == [one]
    assert expand_paths(tmp_path) == [one, two]
    assert expand_paths(f"{tmp_path}/[ab].h5ad") == [one, two]
    assert expand_paths(f"{tmp_path}/**/*.h5ad") == [one, two, three]
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in expand_paths("*.h5ad")] == ["a.h5ad", "b.h5ad"]
    monkeypatch.setenv("SCREENS", str(tmp_path))
    assert expand_paths("$SCREENS/a.h5ad") == [one]
    for nothing in ("c.h5ad", f"{tmp_path}/*.zarr", f"{tmp_path}/none"):
        with pytest.raises(
            FileNotFoundError, match="no such file, folder of .h5ad, .h5, .h5ad.gz or .zarr files or glob"
        ):
            expand_paths(nothing)


class TestCompressed:
    """`.h5ad.gz`: what it unpacks to is bounded, and nothing of it is left."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        return tmp_path / "temporary"

    def test_a_file_of_nothing_but_zeros_is_not_unpacked(self, tmp_path, folder):
        with gzip.open(tmp_path / "bomb.h5ad.gz", "wb", 9) as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
        assert (tmp_path / "bomb.h5ad.gz").stat().st_size < 110_000
        for read in (AnnDataFile, read_h5ad):
            with pytest.raises(ValueError, match="bomb.h5ad.gz of 1.* bytes unpacks to more than 200 times as many"):
                read(tmp_path / "bomb.h5ad.gz")
        assert os.listdir(folder) == []

    def test_what_the_disk_has_no_room_for_is_not_unpacked(self, tmp_path, folder, monkeypatch):
        (tmp_path / "large.h5ad.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(1 << 23)))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 0, 12 << 20))
        with pytest.raises(
            ValueError, match=r"more than half of what is left on the disk of .* \(6,291,456 bytes\); set TMPDIR"
        ):
            AnnDataFile(tmp_path / "large.h5ad.gz")
        assert os.listdir(folder) == []

    def test_a_disk_that_is_full_is_told(self, tmp_path, folder):
        (tmp_path / "large.h5ad.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(1 << 20)))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises((OSError, ValueError), match="File too large"):
                AnnDataFile(tmp_path / "large.h5ad.gz")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(folder) == []


def test_patterns_that_stand_for_very_many_files_are_refused(tmp_path):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="its braces stand for more than 10,000 files"):
        expand_paths(f"{tmp_path}/" + "{a,b}" * 40)
    with pytest.raises(ValueError, match=r"expected '\*\*' at most 2 times, found it 20 times"):
        expand_paths(f"{tmp_path}/" + "**/" * 20 + "*.h5ad")
    assert time.perf_counter() - start < 1


def test_a_damaged_table_of_names_is_one_error(tmp_path):
    path = tmp_path / "damaged.h5ad"
    with h5py.File(path, "w") as file:
        file["matrix"] = [1]
    path.write_bytes(path.read_bytes().replace(b"SNOD", b"DONS"))
    with pytest.raises(ValueError, match="cannot be read as .h5ad: .*copy or write it again"):
        AnnDataFile(path)
