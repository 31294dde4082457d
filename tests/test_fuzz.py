"""Damaged and unusual files: every reader gives the numbers that were written, or one clear error, and leaves nothing."""

import json
import shutil
import traceback
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pertstate
from pertstate import StateForPerturbation, StateProcessor
from pertstate.configuration_state import StateConfig
from pertstate.data import (
    CellStore,
    load_store,
    prepare,
    read_h5ad,
)
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.cells import load
from pertstate.data.info import describe
from pertstate.data.matrices import RowReader
from pertstate.data.reading import AnnDataFile
from pertstate.data.stores import open_store, write_parquet
from pertstate.evaluation import controls_of
from pertstate.evaluation.prediction import predict


pytestmark = pytest.mark.filterwarnings("ignore")

CELLS, GENES = 12, 5
PACKAGE = Path(pertstate.__file__).parent
ENVIRONMENT = Path(pytest.__file__).parents[1]
LABELS = ["control", "A", "B"] * (CELLS // 3)
FUZZ = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def counts() -> np.ndarray:
    values = np.random.default_rng(0).poisson(2.0, (CELLS, GENES)).astype(np.float32)
    values[3] = 0  # a cell without counts
    values[0, 0] = 3
    return values


def screen(matrix=None) -> ad.AnnData:
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(LABELS, ["unused", "B", "control", "A"]),
            "cell_type": pd.Categorical(["T", "U"] * (CELLS // 2)),
            "rank": np.arange(CELLS),
        },
        index=[f"cell{i}" for i in range(CELLS)],
    )
    return ad.AnnData(
        sp.csr_matrix(counts()) if matrix is None else matrix,
        obs=obs,
        var=pd.DataFrame(index=[f"gene{i}" for i in range(GENES)]),
        layers={"dense": counts()},
        obsm={"E": np.arange(CELLS * 3, dtype=np.float32).reshape(CELLS, 3)},
    )


def write(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path)
    return path


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def put(file: h5py.File, name: str, value, encoding: str | None = None):
    """Another dataset under a name, with the attributes of the one before it."""
    attributes = dict(file[name].attrs) if name in file else {}
    if name in file:
        del file[name]
    file.create_dataset(name, data=value)
    file[name].attrs.update(attributes)
    if encoding is not None:
        file[name].attrs["encoding-type"] = encoding


# Every way to read a file. Each gives (values, names of cells, names of genes), with the values of the file.


def by_rows(path, source, _):
    with AnnDataFile(path) as data:
        kind, _, name = source.partition("/")
        matrix = data.X if kind == "X" else getattr(data, kind)[name]
        return dense(matrix[:]), list(data.obs_names), list(data.var_names)


def whole(path, source, _):
    data = read_h5ad(path)
    kind, _, name = source.partition("/")
    matrix = data.X if kind == "X" else getattr(data, kind)[name]
    matrix = matrix.to_numpy() if isinstance(matrix, pd.DataFrame) else dense(matrix)
    return matrix, list(data.obs_names), list(data.var_names)


def prepared(path, source, folder):
    try:
        store = prepare(DataArguments(datasets=str(path), input=source), folder / "store", quiet=True)
        found = store.to_anndata()
        values = found.obsm["embedding"] if source.startswith("obsm") else dense(found.X)
        return values, list(found.obs_names), list(found.var_names)
    except (ValueError, KeyError, OSError):
        assert list(folder.glob("store*")) == []
        raise
    finally:
        shutil.rmtree(folder / "store", ignore_errors=True)


def in_memory(path, source, _):
    data = DataArguments(datasets=str(path), input=source, normalize="none")
    cells, processor = load(data.file_source(), data.resolve_splits(), **data.fit_options())
    return cells.features, None, processor.vocabulary.genes


def in_words(path, source, _):
    return describe(path, input=source)


READERS = (by_rows, whole, prepared, in_memory, in_words)


def attempt(read, *arguments):
    """Read a file. Returns (what was read, None) or (None, an error of ours)."""
    try:
        return read(*arguments), None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
        assert_ours(error)
        return None, error


def assert_ours(error: Exception):
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(where).is_relative_to(PACKAGE) and not Path(where).is_relative_to(ENVIRONMENT)
    assert ours and type(error) in (ValueError, KeyError, FileNotFoundError, OSError), repr(error)
    assert len(str(error)) > 20, repr(error)


def assert_refused(path, readers=READERS, source="X", match=""):
    """Assert that every reader refuses the file, and that those which know its name say it."""
    for read in readers:
        result, error = attempt(read, path, source, path.parent)
        assert error is not None, f"{read.__name__} read {result}"
        assert match in str(error), f"{read.__name__}: {error}"
        if read in (by_rows, whole, prepared):
            assert str(path) in str(error), f"{read.__name__}: {error}"


def assert_read(path, expected, source="X", cells=None, genes=None, readers=READERS[:4]):
    """Assert that every reader gives exactly these values. In a store the cells are sorted by label."""
    cells = [f"cell{i}" for i in range(len(expected))] if cells is None else cells
    for read in readers:
        values, names, of_genes = read(path, source, path.parent)
        if read is prepared:
            order = [cells.index(name) for name in names]
            assert sorted(order) == list(range(len(cells)))
            np.testing.assert_array_equal(values, expected[order], read.__name__)
        elif read is in_memory:
            # Sorted by label: the same rows in another order.
            found, wanted = (np.asarray(m, dtype=np.float32).tolist() for m in (values, expected))
            assert sorted(found) == sorted(wanted)
        else:
            assert names == cells
            np.testing.assert_array_equal(values, expected, read.__name__)
        if genes is not None and not source.startswith("obsm"):
            assert of_genes == genes, read.__name__


# Types of values

FORMS = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", ">f8", "i1", "u1", ">i4", ">u2", "u8", "?"])
def test_numbers_of_every_type(tmp_path, form, dtype):
    path = write(screen(FORMS[form](counts())), tmp_path / "screen.h5ad")
    name = "X" if form == "dense" else "X/data"
    with h5py.File(path, "r+") as file:
        put(file, name, file[name][:].astype(dtype))
    expected = counts() > 0 if dtype == "?" else counts()
    # anndata itself cannot hold these as sparse matrices in memory.
    foreign = form != "dense" and dtype in ("f2", ">f4", ">f8", ">i4", ">u2")
    assert_read(path, expected, readers=(by_rows, prepared, in_memory) if foreign else READERS[:4])
    if foreign:
        assert_refused(path, (whole,), match="scipy.sparse does not support")
    assert "counts" in describe(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["c8", "S3", "O"])
def test_values_that_are_no_numbers(tmp_path, form, dtype):
    path = write(screen(FORMS[form](counts())), tmp_path / "screen.h5ad")
    name = "X" if form == "dense" else "X/data"
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        put(file, name, values.astype(str).astype(object) if dtype == "O" else values.astype(dtype))
    assert_refused(path, (by_rows, prepared, in_memory, in_words), match="X holds values of type")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_values_that_are_no_expression(tmp_path, form, value):
    values = counts()
    values[5, 2] = value
    path = write(screen(FORMS[form](values)), tmp_path / "screen.h5ad")
    assert_read(path, values, readers=(by_rows, whole))
    assert_refused(path, (prepared, in_memory), match=f"X holds {value} in cell 'cell5', gene 'gene2'")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [2**24 + 1, 2**31 + 1, 2**32 - 1, 2**32, 2**53, 2**63])
def test_whole_numbers_of_any_size(tmp_path, form, value):
    values = counts().astype(np.float64)
    values[5, 2] = value
    path = write(screen(FORMS[form](values)), tmp_path / "screen.h5ad")
    assert_read(path, values, readers=(by_rows, whole, in_memory))
    if value < 2**32:
        assert_read(path, values, readers=(prepared,))
    else:
        assert_refused(path, (prepared,), match="in cells 0 to 11; expected at most 4,294,967,295")


# Sparse matrices


def direct(shape, data, indices, indptr) -> np.ndarray | None:
    """The matrix of CSR arrays, built entry by entry. None if the arrays contradict one another."""
    rows, columns = shape
    whole = len(indptr) == rows + 1 and len(data) == len(indices) and indptr[0] == 0 and indptr[-1] == len(data)
    if not whole or any(a > b for a, b in zip(indptr, indptr[1:])):
        return None
    if any(not 0 <= column < columns for column in indices):
        return None
    values = np.zeros(shape)
    for row in range(rows):
        for entry in range(indptr[row], indptr[row + 1]):
            values[row, indices[entry]] += data[entry]
    return values


edges = st.sampled_from([0, 1, 2, 4, 5, 11, 12, 13, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)])


@st.composite
def sparse_arrays(draw):
    """Arrays of a CSR matrix, unsorted, with entries in parts and stored zeros, and with at most one mistake."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=CELLS, max_size=CELLS))
    indptr = [0, *np.cumsum(lengths).tolist()]
    indices = draw(st.lists(st.integers(0, GENES - 1), min_size=indptr[-1], max_size=indptr[-1]))
    data = draw(st.lists(st.sampled_from([0, 1, 2, 200]), min_size=indptr[-1], max_size=indptr[-1]))
    shape = [CELLS, GENES]
    arrays = {"indptr": indptr, "indices": indices, "data": data, "shape": shape}
    name = draw(st.sampled_from(["none", *arrays]))
    if name != "none" and arrays[name]:
        array = arrays[name]
        place = draw(st.integers(0, len(array) - 1))
        what = draw(st.sampled_from(["value", "cut", "longer", "swap"] if name != "data" else ["cut", "longer"]))
        if what == "value":
            array[place] = draw(edges)
        elif what == "cut":
            del array[place:]
        elif what == "longer":
            array.append(array[-1])
        else:
            array[place], array[0] = array[0], array[place]
    return arrays


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write(screen(), tmp_path_factory.mktemp("template") / "screen.h5ad")


@pytest.mark.slow
@settings(FUZZ, max_examples=150)
@given(arrays=sparse_arrays(), transposed=st.booleans(), unsigned=st.booleans())
def test_sparse_arrays_of_any_content(template, tmp_path, arrays, transposed, unsigned):
    path = tmp_path / "screen.h5ad"
    shutil.copy(template, path)
    rows, columns = (CELLS, GENES) if not transposed else (GENES, CELLS)
    if transposed:  # the same arrays, read as those of columns, one for each gene
        arrays = {**arrays, "indptr": arrays["indptr"][: GENES + 1], "shape": arrays["shape"][::-1]}
        stored = arrays["indptr"][-1] if arrays["indptr"] and 0 <= arrays["indptr"][-1] < 100 else 0
        arrays |= {"data": arrays["data"][:stored], "indices": arrays["indices"][:stored]}
    types = {"indptr": np.uint64 if unsigned else np.int64, "indices": np.int64, "data": np.uint8}
    with h5py.File(path, "r+") as file:
        for name, dtype in types.items():
            values = [v % 2**64 if dtype is np.uint64 else v for v in arrays[name]]
            put(file, f"X/{name}", np.array(values, dtype=dtype))
        file["X"].attrs["shape"] = np.array(arrays["shape"][:: -1 if transposed else 1], dtype=np.int64)
        file["X"].attrs["encoding-type"] = "csc_matrix" if transposed else "csr_matrix"
    signed = [v % 2**64 if unsigned else v for v in arrays["indptr"]]
    fits = list(arrays["shape"]) == ([rows, columns] if not transposed else [columns, rows][::-1])
    expected = direct((rows, columns), arrays["data"], arrays["indices"], signed) if fits and signed else None
    for read in (by_rows, whole, prepared):
        result, error = attempt(read, path, "X", tmp_path)
        if expected is None:
            assert error is not None and str(path) in str(error), f"{read.__name__} read {result}"
            continue
        assert error is None, error
        wanted = expected.T if transposed else expected
        values, names, _ = result
        if read is prepared:
            np.testing.assert_array_equal(values, wanted[[int(name[4:]) for name in names]])
        elif np.array_equal(wanted, wanted.astype(np.uint8)):  # scipy sums the parts of an entry in their own type
            np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("X/indptr", np.linspace(0, 40, CELLS + 1), "not integers"),
        ("X/indices", np.zeros(40, dtype=np.float32), ""),
        ("X/data", np.ones((40, 1)), "should have one dimension"),
        ("X/data", np.float32(1), "should have one dimension"),
    ],
)
def test_sparse_arrays_of_another_kind(template, tmp_path, name, value, match):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        put(file, name, value)
    assert_refused(path, match=match)


def test_indptr_whose_differences_overflow(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        stored = int(file["X/indptr"][-1])
        put(file, "X/indptr", np.array([0, 2**63 - 1, -2] + [stored] * (CELLS - 2), dtype=np.int64))
    assert_refused(path, match="indptr of X should rise from 0")


@pytest.mark.parametrize("dtype", ["f2", ">f4", ">i4", "u1"])
def test_columns_that_are_transposed_on_disk(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(RowReader, "_in_memory", 0)
    path = write(screen(sp.csc_matrix(counts())), tmp_path / "screen.h5ad")
    with h5py.File(path, "r+") as file:
        put(file, "X/data", file["X/data"][:].astype(dtype))
    assert_read(path, counts(), readers=(by_rows, prepared))
    with h5py.File(path, "r+") as file:
        file["X/indices"][2] = CELLS
    assert_refused(path, (by_rows, prepared, in_words), match="indices of X should be 0 to 11, found 0 to 12")


@pytest.mark.parametrize("shape", [(CELLS,), (CELLS, GENES, 1), (-CELLS, GENES), (GENES, CELLS), (CELLS, GENES + 1)])
def test_a_shape_that_disagrees(template, tmp_path, shape):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = shape
    assert_refused(path, match="cannot be read as .h5ad")


def test_a_chunk_of_hdf5_that_was_never_written(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        for name in ("X/data", "X/indices"):
            values = file[name][:]
            del file[name]
            chunked = file.create_dataset(name, values.shape, values.dtype, chunks=(10,))
            chunked[10:] = values[10:]
    assert_refused(path, match="1 of 5 chunks of X/data are missing")


# Parts of a file


@pytest.mark.parametrize(
    "name",
    ["X/data", "X/indices", "X/indptr", "obs", "var", "obs/_index", "var/_index"]
    + ["obs/perturbation/categories", "obs/perturbation/codes", "obs/perturbation", "obs/cell_type"],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_part_that_is_gone_or_empty(template, tmp_path, name, empty):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        del file[name]
        if empty:
            file.create_group(name)
    labels = name.startswith("obs/") and "_index" not in name
    assert_refused(path, (prepared, in_memory, in_words) if labels else READERS)


@pytest.mark.parametrize("attribute", ["_index", "column-order"])
def test_an_attribute_that_is_gone(template, tmp_path, attribute):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        del file["obs"].attrs[attribute]
    assert_refused(path, match="cannot be read as .h5ad")


def test_no_x_and_another_matrix(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        del file["X"]
    assert_refused(path, (prepared, in_memory, in_words), match="the data have no X, found layers ['dense']")
    assert_read(path, counts(), source="layers/dense")


@pytest.mark.parametrize("shape", [(), (CELLS,), (CELLS, GENES, 2), (CELLS - 1, GENES), (CELLS, GENES - 1)])
def test_matrices_of_another_shape(template, tmp_path, shape):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        put(file, "layers/dense", np.ones(shape))
    assert_refused(path, (by_rows, prepared, in_words), source="layers/dense", match="layers/dense has")
    assert_read(path, counts(), readers=(by_rows, prepared))  # what is not asked for does no harm


@pytest.mark.parametrize(
    "value, match",
    [
        (np.ones(CELLS), "obsm/E has 1 dimensions"),
        (np.ones((CELLS, 2, 2)), "dimensions, expected cells x features"),
        (np.full((CELLS, 2), b"x"), "values of type"),
        (np.ones((CELLS, 0)), "obsm/E has no dimensions"),
        (np.ones((CELLS, 2)) * 1j, "values of type complex128"),
        (np.full((CELLS, 2), np.nan), "obsm/E holds nan in cell 'cell0', dimension 0"),
    ],
)
def test_invalid_embeddings_are_refused(template, tmp_path, value, match):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        put(file, "obsm/E", value)
    readers = (prepared,) if value.ndim == 1 else (prepared, in_memory)
    assert_refused(path, readers, source="obsm/E", match=match)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("form", ["array", "csr", "csc", "frame", "half", "bool"])
def test_embeddings_of_every_form(tmp_path, suffix, form):
    values = np.arange(CELLS * 2).reshape(CELLS, 2) % 7
    adata = screen()
    frame = pd.DataFrame({"a": values[:, 0], "b": values[:, 1].astype(np.float32)}, index=adata.obs_names)
    forms = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "frame": lambda _: frame, "array": np.asarray}
    make = forms.get(form, lambda v: v.astype({"half": np.float16, "bool": bool}[form]))
    adata.obsm["E"] = make(values)
    expected = values.astype(bool) if form == "bool" else values
    assert_read(write(adata, tmp_path / f"screen{suffix}"), expected, source="obsm/E")


# Labels and names


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize(
    "column, expected",
    [
        ([1, 2], ["1", "2"]),
        ([1.0, 2.5], ["1", "2.5"]),
        ([True, False], ["True", "False"]),
        (pd.array([1, 2], dtype="Int64"), ["1", "2"]),
        (pd.array([True, False], dtype="boolean"), ["True", "False"]),
        (pd.Categorical([1, 2], [3, 2, 1]), ["1", "2"]),
        (pd.Categorical(["b", "a"], ["unused", "a", "b"]), ["b", "a"]),
        (["é", "e\u0301"], ["é", "e\u0301"]),
        (["🧬" * 3, "x" * 70_000], ["🧬" * 3, "x" * 70_000]),
        (np.array([1, 2], dtype=">i4"), ["1", "2"]),
        ([1.0, np.nan], None),
        (pd.array([1, None], dtype="Int64"), None),
        (pd.array([True, None], dtype="boolean"), None),
        (pd.Categorical([1.5, np.nan]), None),
        (pd.Categorical(["a", None]), None),
        (["a", ""], None),
        (["a", " \t"], None),
    ],
)
def test_labels_of_every_type(tmp_path, suffix, column, expected):
    adata = screen()
    adata.obs["cell_type"] = (np.array(column) if isinstance(column, list) else column)[[0, 1] * (CELLS // 2)]
    path = write(adata, tmp_path / f"screen{suffix}")
    if expected is None:
        assert_refused(path, (prepared, in_memory), match="obs['cell_type'] is ")
        assert "- obs['cell_type'] is " in in_words(path, "X", None)  # what is missing before a model can be trained
        return
    found = prepare(DataArguments(datasets=str(path)), tmp_path / "store", quiet=True).obs()["cell_type"]
    wanted = {f"cell{i}": expected[i % 2] for i in range(CELLS)}
    assert found.astype(str).to_dict() == wanted
    data = DataArguments(datasets=str(path))
    cells, _ = load(data.file_source(), data.resolve_splits(), **data.fit_options())
    assert set(cells.groups["context"]) == set(expected)


def test_names_with_nul(tmp_path):
    """HDF5 cannot hold such names, but zarr can. Pandas and numpy end them at different places."""
    adata = screen()
    adata.var_names = ["g", "g\0", "g\0\0", "a\0b", "c"]
    path = write(adata, tmp_path / "screen.zarr")
    assert_refused(path, (in_memory,), match="'genes' holds")
    adata = screen()
    adata.obs["cell_type"] = ["T\0", "U"] * (CELLS // 2)
    path = write(adata, tmp_path / "labels.zarr")
    assert_refused(path, (prepared, in_memory, in_words), match="obs['cell_type'] holds 'T\\x00', a label with a NUL")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_names_of_any_writing(tmp_path, suffix):
    adata = screen()
    genes = ["é", "e\u0301", "🧬", "x" * 70_000, " g "]
    adata.var_names, adata.obs_names = genes, [f"🧫{i}" for i in range(CELLS)]
    assert_read(write(adata, tmp_path / f"s{suffix}"), counts(), cells=list(adata.obs_names), genes=genes)


def test_names_that_are_numbers(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        put(file, "var/_index", np.arange(GENES), "array")
        put(file, "obs/_index", np.arange(100, 100 + CELLS), "array")
    names = [str(100 + i) for i in range(CELLS)]
    assert_read(path, counts(), cells=names, genes=[str(i) for i in range(GENES)])


def test_names_that_stand_twice(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        put(file, "var/_index", ["g0", "g1", "g2", "g3", "g0"])
    assert_refused(path, (prepared, in_memory), match="gene names are not unique, found ['g0'] twice")
    assert "gene names stand twice" in describe(path)
    with h5py.File(path, "r+") as file:
        put(file, "var/_index", [f"gene{i}" for i in range(GENES)])
        put(file, "obs/_index", ["same"] * CELLS)
    store = prepare(DataArguments(datasets=str(path)), tmp_path / "store", quiet=True)
    assert store.obs().index.tolist() == ["same"] * CELLS
    assert store.totals(np.arange(CELLS)).sum() == counts().sum()


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("codes", np.array([99] + [1] * 11, dtype=np.int8), "codes need to be between"),
        ("codes", np.array([-2] + [1] * 11, dtype=np.int8), "codes need to be between"),
        ("codes", np.array([255] + [1] * 11, dtype=np.uint8), "codes need to be between"),
        ("codes", np.array([2] * 15, dtype=np.int8), "has the shape (15,), expected 12 cells"),
        ("codes", np.array([[2]] * 12, dtype=np.int8), "has the shape (12, 1), expected 12 cells"),
        ("codes", np.array([2.0] * 12), "codes need to be array-like integers"),
        ("codes", np.array([-1] + [2] * 11, dtype=np.int8), "is empty in 1 cell, first in 'cell0'"),
        ("categories", ["unused", "B", "control", "B"], "categories must be unique"),
    ],
)
def test_categories_that_contradict(template, tmp_path, name, value, match):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        put(file, f"obs/perturbation/{name}", value)
    assert_refused(path, (prepared,), match=match)
    _, error = attempt(in_memory, path, "X", tmp_path)
    assert error is not None


def test_columns_of_another_length(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    for length in (CELLS - 1, CELLS + 8):
        with h5py.File(path, "r+") as file:
            put(file, "obs/rank", np.arange(length))
        assert_refused(path, (whole, prepared))
        assert_read(path, counts(), readers=(in_memory,))  # which does not read the column


@pytest.mark.parametrize(
    "column, expected",
    [
        (np.full(CELLS, 2**64 - 1, dtype=np.uint64), [str(2**64 - 1)] * CELLS),
        ([np.inf, -np.inf, np.nan] * 4, ["inf", "-inf", "nan"] * 4),
        (np.arange(CELLS, dtype=np.float16), [f"{i}.0" for i in range(CELLS)]),
        (np.arange(CELLS, dtype=">i4"), [str(i) for i in range(CELLS)]),
        (pd.array([1, None] * 6, dtype="Int64"), ["1", "nan"] * 6),
    ],
)
def test_other_columns_of_every_type(tmp_path, column, expected):
    adata = screen()
    adata.obs["other"] = column
    path = write(adata, tmp_path / "screen.h5ad")
    found = prepare(DataArguments(datasets=str(path)), tmp_path / "store", quiet=True).obs()["other"]
    assert found.astype(str).to_dict() == {f"cell{i}": value for i, value in enumerate(expected)}


# Few cells and genes


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_files_with_few_cells_or_genes(tmp_path, suffix):
    write(screen()[:0].copy(), tmp_path / f"empty{suffix}")
    assert_refused(tmp_path / f"empty{suffix}", (in_memory,), match="the files hold no cells")
    _, error = attempt(prepared, tmp_path / f"empty{suffix}", "X", tmp_path)
    assert "the files hold no cells" in str(error)
    assert "0 cells x 5 genes" in describe(tmp_path / f"empty{suffix}")
    assert "0 cells x 3 dimensions" in describe(tmp_path / f"empty{suffix}", input="obsm/E")
    genes = write(screen()[:, :0].copy(), tmp_path / f"genes{suffix}")
    assert_refused(genes, (prepared, in_memory), match="the data have no genes")
    one = write(screen()[:, :1].copy(), tmp_path / f"one{suffix}")
    assert_read(one, counts()[:, :1], genes=["gene0"])
    cell = write(screen()[:1].copy(), tmp_path / f"cell{suffix}")
    assert_read(cell, counts()[:1], readers=(by_rows, whole, prepared))
    nothing = write(screen(sp.csr_matrix((CELLS, GENES), dtype=np.float32)), tmp_path / f"nothing{suffix}")
    assert_read(nothing, np.zeros((CELLS, GENES)))


def test_a_table_of_files_before_2019(template, tmp_path):
    path = Path(shutil.copy(template, tmp_path))
    with h5py.File(path, "r+") as file:
        for name in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers"):
            del file[name]
        rows = [(f"cell{i}".encode(), i % 3, b"TU"[i % 2 : i % 2 + 1], i) for i in range(CELLS)]
        types = [("index", "S10"), ("perturbation", "i1"), ("cell_type", "S4"), ("rank", "i4")]
        file["obs"] = np.array(rows, dtype=types)
        file["uns/perturbation_categories"] = np.array([b"control", b"A", b"B"])
        file["var"] = np.array([(f"gene{i}".encode(), i) for i in range(GENES)], dtype=[("index", "S10"), ("k", "i4")])
        file["obsm"] = np.array([((i, 2 * i),) for i in range(CELLS)], dtype=[("E", "f4", (2,))])
        del file.attrs["encoding-type"], file.attrs["encoding-version"]
    assert_read(path, counts(), genes=[f"gene{i}" for i in range(GENES)])
    assert_read(path, np.outer(np.arange(CELLS), [1, 2]), source="obsm/E")
    store = prepare(DataArguments(datasets=str(path)), tmp_path / "store", quiet=True)
    assert store.obs()["perturbation"].astype(str).to_dict() == {f"cell{i}": LABELS[i] for i in range(CELLS)}


# Predictions


@pytest.fixture(scope="module")
def predictor():
    """A model of the screen, and its processor."""
    processor = StateProcessor.fit(screen(), set_size=4)
    torch.manual_seed(0)
    config = StateConfig.from_preset("tiny", input_dim=GENES, num_perturbations=2, set_size=4)
    return StateForPerturbation(config), processor


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("form", FORMS)
def test_predictions_start_from_the_cells_of_the_file(tmp_path, predictor, suffix, form):
    path = write(screen(FORMS[form](counts())), tmp_path / f"screen{suffix}")
    predict(*predictor, path, tmp_path / "predicted.h5ad", quiet=True, overwrite=True)
    found = ad.read_h5ad(tmp_path / "predicted.h5ad")
    assert sorted(set(found.obs["control_barcode"])) == ["cell0", "cell3", "cell6", "cell9"]
    rows = [int(name[4:]) for name in found.obs["control_barcode"]]
    totals = np.maximum(counts().sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(controls_of(found), np.log1p(counts() / totals * 1e4)[rows], rtol=1e-6)


def test_predictions_of_damaged_files_are_not_written(template, tmp_path, predictor):
    def nan(file):
        file["X/data"][0] = np.nan

    def codes(file):
        file["obs/perturbation/codes"][0] = 99

    def missing(file):
        del file["X/indices"]

    def far(file):
        file["X/indices"][0] = GENES

    def rising(file):
        file["X/indptr"][1] = 2**30

    def text(file):
        put(file, "X/data", file["X/data"][:].astype("S3"))

    def unknown(file):
        put(file, "var/_index", [f"other{i}" for i in range(GENES)])

    for damage in (nan, codes, missing, far, rising, text, unknown):
        path = Path(shutil.copy(template, tmp_path / f"{damage.__name__}.h5ad"))
        with h5py.File(path, "r+") as file:
            damage(file)
        before = sorted(tmp_path.iterdir())
        _, error = attempt(
            lambda path=path: predict(*predictor, path, tmp_path / "predicted.h5ad", quiet=True, overwrite=True)
        )
        assert error is not None, damage.__name__
        assert sorted(tmp_path.iterdir()) == before


# Damaged bytes


def boundaries(path: Path) -> list[int]:
    """Where the data of each dataset or chunk of an HDF5 file start and end."""
    found = {0, 8, 96}

    def visit(_, node):
        if isinstance(node, h5py.Dataset):
            chunks = [node.id.get_chunk_info(i) for i in range(node.id.get_num_chunks())] if node.chunks else []
            places = [(c.byte_offset, c.size) for c in chunks] or [(node.id.get_offset(), node.id.get_storage_size())]
            for start, size in places:
                if start is not None:
                    found.update({start, start + size, start + size // 2})

    with h5py.File(path) as file:
        file.visititems(visit)
    return sorted(found)


def test_truncated_at_every_boundary(template, tmp_path):
    content, path = template.read_bytes(), tmp_path / "cut.h5ad"
    ends = [end for end in boundaries(template) if end < len(content)]
    assert len(ends) > 20
    for number, end in enumerate(ends):
        path.write_bytes(content[:end])
        assert_refused(
            path, READERS if number % 8 == 0 else (by_rows,), match=f"({end:,} bytes) cannot be read as .h5ad"
        )


@pytest.mark.parametrize("name", ["X/data", "X/indices", "X/indptr", "obs/_index", "var/_index"])
# Chunks of format 2 are not cut: its compressor, Blosc, reads beyond the end of a cut chunk, and any result is possible.
@pytest.mark.parametrize(
    "how, format", [("gone", 2), ("empty", 2), ("zeros", 2), ("gone", 3), ("empty", 3), ("zeros", 3), ("cut", 3)]
)
def test_chunks_of_zarr(tmp_path, name, how, format):
    with ad.settings.override(zarr_write_format=format):
        path = write(screen(), tmp_path / "screen.zarr")
    assert_read(path, counts(), readers=(by_rows,))
    [chunk] = [file for file in (path / name).rglob("*") if file.name == "0"]
    content = chunk.read_bytes()
    if how == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}[how])
    assert_refused(path, match="")


# Stores


def stored_values(store: CellStore):
    found = store.to_anndata()
    data = DataArguments(store=str(store.path))
    cells, _ = load_store(store, data.resolve_splits(store.groups))
    return dense(found.X), cells.features[:]


@pytest.fixture(scope="module", params=["sparse", "dense"])
def small_store(request, template, tmp_path_factory) -> CellStore:
    data = DataArguments(datasets=str(template))
    folder = tmp_path_factory.mktemp(request.param)
    return prepare(data, folder / "store", PrepareArguments(layout=request.param), quiet=True)


def damaged(store: CellStore, folder: Path, file: str, content: bytes, size: bool = True) -> Path:
    """A copy of a store with other bytes in one file, and with a JSON that gives the hash of these bytes."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store.path, copy)
    (copy / file).write_bytes(content)
    if size and file != "store.json":
        manifest = json.loads((copy / "store.json").read_text())
        for shard in manifest["shards"]:
            shard["bytes"] = len(content) if shard["file"] == file else shard["bytes"]
        (copy / "store.json").write_text(json.dumps(manifest))
    return copy


def test_a_json_cut_anywhere(small_store, tmp_path):
    content = (small_store.path / "store.json").read_bytes().rstrip()
    for end in range(0, len(content), 7):
        copy = damaged(small_store, tmp_path, "store.json", content[:end])
        _, error = attempt(CellStore, copy)
        assert f"{copy / 'store.json'} is not a whole JSON file" in str(error)


def leaves(tree, path=()):
    """The places of all values in nested lists and dicts."""
    yield path
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_a_json_of_any_content(small_store, tmp_path, data):
    manifest = json.loads((small_store.path / "store.json").read_text())
    place = data.draw(st.sampled_from([path for path in leaves(manifest) if path]))
    holder = manifest
    for key in place[:-1]:
        holder = holder[key]
    value = data.draw(st.sampled_from([None, True, 0, -1, 3, 2**70, 1.5, "", "x", [], {}, [None], {"a": 1}]))
    holder[place[-1]] = value
    copy = damaged(small_store, tmp_path, "store.json", json.dumps(manifest).encode())
    result, error = attempt(lambda: stored_values(CellStore(copy)))
    # Names, notes and the hash of a source can be any text; nothing else may change unseen.
    if place[0] in ("cells", "groups", "shards", "expression", "layout", "dtype", "embedding_dim"):
        assert error is not None or json.loads((small_store.path / "store.json").read_text()) == manifest, place
    if error is None:
        np.testing.assert_array_equal(result[0], stored_values(small_store)[0])


def test_codes_and_lengths_of_groups(small_store, tmp_path):
    manifest = json.loads((small_store.path / "store.json").read_text())
    for name, place, value in (
        ("perturbation", 0, -1),
        ("perturbation", 0, 2),
        ("context", 1, 5),
        ("offset", 1, 1),
        ("length", 0, 0),
    ):
        groups = {key: list(column) for key, column in manifest["groups"].items()}
        groups[name][place] = value
        content = json.dumps({**manifest, "groups": groups}).encode()
        _, error = attempt(CellStore, damaged(small_store, tmp_path, "store.json", content))
        assert "these fields are damaged or contradict one another: ['groups']" in str(error)


def shard_of(store: CellStore) -> tuple[str, bytes, pa.RecordBatch]:
    [shard] = store.manifest.shards
    content = (store.path / shard["file"]).read_bytes()
    [batch] = pa.ipc.open_stream(content).read_all().to_batches()
    return shard["file"], content, batch


def test_an_arrow_file_cut_anywhere(small_store, tmp_path):
    name, content, _ = shard_of(small_store)
    messages = [i for i in range(len(content)) if content[i : i + 4] == b"\xff\xff\xff\xff"]
    assert len(messages) >= 3
    for end in sorted({1, *messages, *range(0, len(content) - 8, 97)}):  # the last message only says that it is the end
        copy = damaged(small_store, tmp_path, name, content[:end])
        if end == 0:
            continue
        _, error = attempt(lambda copy=copy: stored_values(CellStore(copy)))
        if error is None:
            assert end >= messages[-1]
        else:
            assert str(copy) in str(error)


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_damaged_bytes_of_arrow_never_crash(small_store, tmp_path, data):
    name, content, _ = shard_of(small_store)
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.sampled_from([1, 2, 8, 64]))
    fill = data.draw(st.sampled_from([0, 1, 127, 255]))
    stop = min(start + length, len(content))
    copy = damaged(small_store, tmp_path, name, content[:start] + bytes([fill]) * (stop - start) + content[stop:])
    result, error = attempt(lambda: stored_values(CellStore(copy)))
    assert (error is None and result[0].shape == (CELLS, GENES)) or str(copy) in str(error)


def rewritten(store: CellStore, folder: Path, change) -> Path:
    name, _, batch = shard_of(store)
    batch = change(batch)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return damaged(store, folder, name, sink.getvalue().to_pybytes())


def replaced(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.names.index(name), name, column)


@pytest.mark.parametrize("number", [GENES, -1, 2**31 - 1])
def test_gene_ids_beyond_the_genes(template, tmp_path, number):
    store = prepare(DataArguments(datasets=str(template)), tmp_path / "store", quiet=True)

    def change(batch):
        ids = batch.column("gene_ids")
        values = ids.values.to_numpy().copy()
        values[4] = number
        return replaced(batch, "gene_ids", pa.ListArray.from_arrays(ids.offsets, pa.array(values)))

    copy = rewritten(store, tmp_path, change)
    for use in (lambda: CellStore(copy).to_anndata(), lambda: stored_values(CellStore(copy))):
        _, error = attempt(use)
        assert f"gene ids should be 0 to {GENES - 1}, found" in str(error) and str(copy) in str(error)


@pytest.mark.parametrize("name", ["gene_ids", "gene_values", "total", "barcode"])
def test_columns_that_are_gone_or_of_another_type(template, tmp_path, name):
    store = prepare(DataArguments(datasets=str(template)), tmp_path / "store", quiet=True)
    other = pa.array([[1.5]] * CELLS)
    for change in (lambda batch: batch.drop_columns([name]), lambda batch: replaced(batch, name, other)):
        copy = rewritten(store, tmp_path, change)
        _, error = attempt(lambda copy=copy: CellStore(copy).obs())
        assert f"expected the columns {{'{name}': " in str(error) and str(copy) in str(error)
    copy = rewritten(store, tmp_path, lambda batch: batch.slice(1))
    _, error = attempt(lambda: CellStore(copy).obs())
    assert f"expected {CELLS} cells, found {CELLS - 1}" in str(error)


def test_damaged_parquet(template, tmp_path, monkeypatch):
    import datasets

    store = prepare(DataArguments(datasets=str(template)), tmp_path / "store", quiet=True)
    write_parquet(store, tmp_path / "parquet")
    [file] = (tmp_path / "parquet" / "data").iterdir()
    content = file.read_bytes()
    for number, (start, stop, length) in enumerate(
        [(0, 4, 0), (100, 180, 80), (len(content) - 8, len(content), 8), (len(content) - 200, len(content) - 150, 50)]
        + [(end, len(content), 0) for end in (0, 10, len(content) // 2, len(content) - 1)]
    ):
        broken = content[:start] + b"\xff" * length + content[stop:]
        file.write_bytes(broken)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache{number}"))
        _, error = attempt(open_store, tmp_path / "parquet")
        if len(broken) != len(content):
            assert f"{file}: expected {len(content):,} bytes, found {len(broken):,}" in str(error)
            manifest = json.loads((tmp_path / "parquet" / "store.json").read_text())
            manifest["shards"][0]["bytes"] = len(broken)
        else:
            assert f"{tmp_path / 'parquet'} cannot be read as parquet" in str(error)
