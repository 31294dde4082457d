"""Genes by the names that are meant, each once."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertstate import StateProcessor
from pertstate.base.cell_values import take_rows
from pertstate.base.gene_view import JoinedGenes, scale_of, view_of
from pertstate.data.arguments import DataArguments


COUNTS = np.array([[1, 0, 3, 5], [2, 2, 0, 0], [0, 4, 1, 9]])
NAMES = ["A", "B", "A", "C"]


def cells(values, names=NAMES) -> ad.AnnData:
    return ad.AnnData(values, var=pd.DataFrame({"about": ["w", "x", "y", "z"]}, index=pd.Index(names)))


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_columns_of_one_gene_are_summed_or_the_first_is_read(form):
    data = cells(form(COUNTS.astype(np.float32)))
    view, place = view_of(data, "X", None, False, "sum")
    assert view.var_names.tolist() == ["A", "B", "C"] and place == "X"
    np.testing.assert_array_equal(take_rows(view.X, slice(None)).toarray(), [[4, 0, 5], [2, 2, 0], [1, 4, 9]])
    np.testing.assert_array_equal(take_rows(view.X, [0, 2]).toarray(), [[4, 0, 5], [1, 4, 9]])
    view, _ = view_of(data, "X", None, False, "first")
    np.testing.assert_array_equal(take_rows(view.X, slice(None)).toarray(), COUNTS[:, [0, 1, 3]])
    assert view.var["about"].tolist() == ["w", "x", "z"]


def test_a_sum_fits_where_its_parts_are_small_integers():
    big = np.full((2, 4), 250, dtype=np.uint8)
    view, _ = view_of(cells(big), "X", None, False, "sum")
    assert take_rows(view.X, slice(None)).toarray().tolist() == [[500, 250, 250]] * 2


@pytest.mark.parametrize("base", [None, 2.0])
def test_log1p_values_are_summed_before_their_logarithm(base):
    r = np.random.default_rng(0)
    linear = r.gamma(0.5, 2.0, (50, 40)) * (r.random((50, 40)) < 0.5)
    linear = 1e4 * linear / linear.sum(axis=1, keepdims=True)
    scale = 1.0 if base is None else np.log(base)
    values = (np.log1p(linear) / scale).astype(np.float32)
    codes = np.arange(40) % 30
    wanted = np.zeros((50, 30))
    np.add.at(wanted.T, codes, linear.T)
    joined = JoinedGenes(values, codes, "sum", base)
    np.testing.assert_allclose(joined[slice(None)].toarray(), np.log1p(wanted) / scale, rtol=1e-5, atol=1e-6)


def test_layers_and_raw_are_joined_too():
    data = cells(np.zeros((3, 4), dtype=np.float32))
    data.layers["counts"] = COUNTS
    view, place = view_of(data, "layers/counts", None, False, "sum")
    np.testing.assert_array_equal(take_rows(view.layers["counts"], [1]).toarray(), [[2, 2, 0]])
    data.raw = cells(COUNTS.astype(np.float32), ["B", "B", "B", "C"])
    view, place = view_of(data, "raw/X", None, False, "sum")
    assert place == "X" and take_rows(view.X, [0]).toarray().tolist() == [[4, 5]]


def test_unknown_ways_are_refused_and_unique_names_cost_nothing():
    data = cells(COUNTS.astype(np.float32), list("ABCD"))
    assert view_of(data, "X", None, False, "sum")[0] is data
    with pytest.raises(ValueError, match="duplicate_genes='sums'; did you mean 'sum'"):
        view_of(data, "X", None, False, "sums")


def screen_with_twins() -> ad.AnnData:
    r = np.random.default_rng(1)
    names = [f"G{i}" for i in range(18)] + ["G3", "G3"]
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 20, "cell_type": "k562"}, index=[f"c{i}" for i in range(40)])
    return ad.AnnData(
        sp.csr_matrix(r.poisson(3.0, (40, 20)).astype(np.float32)), obs=obs, var=pd.DataFrame(index=names)
    )


def test_a_file_in_which_genes_stand_twice(tmp_path):
    data = screen_with_twins()
    data.write_h5ad(tmp_path / "twins.h5ad")
    path = str(tmp_path / "twins.h5ad")
    with pytest.raises(ValueError, match=r"found \['G3'\] twice; say with duplicate_genes: first, or sum"):
        DataArguments(datasets=path).file_source()
    processor = StateProcessor.fit(data, duplicate_genes="sum")
    assert processor.vocabulary.genes == [f"G{i}" for i in range(18)]
    total = data.X.toarray()
    summed = total[:, :18].copy()
    summed[:, 3] += total[:, 18] + total[:, 19]
    wanted = np.log1p(summed / total.sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(processor.features(data), wanted, rtol=1e-6)
    # Training reads the matrix from the file like this.
    source = DataArguments(datasets=path, duplicate_genes="sum").file_source()
    with source.blocks() as blocks:
        read = np.vstack([block().expression.toarray() for _, block in blocks])
    np.testing.assert_array_equal(read, summed)
    # The checkpoint holds the setting, so that data to predict from are read in the same way.
    processor.save_pretrained(tmp_path / "saved")
    again = StateProcessor.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.features(data), processor.features(data))
    assert scale_of(data, "X").values == "counts"
