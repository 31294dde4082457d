"""What values are: counts, log1p and of which total and base, normalised, counts that are not whole; and conversions."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch

from pertstate import StateProcessor
from pertstate.base.constants import Values
from pertstate.base.value_scale import Scale, converted, differ, look_at
from pertstate.data import Splits, prepare
from pertstate.data.arguments import DataArguments
from pertstate.data.cells import load
from pertstate.data.source import FileSource
from pertstate.data.store import StoreSource


def counts(seed: int, depth: float = 1.0, cells: int = 200, genes: int = 300) -> np.ndarray:
    """Counts of cells of different depths; many genes are rare."""
    r = np.random.default_rng(seed)
    rates = r.lognormal(-1, 1.5, genes) * depth
    return r.poisson(rates * r.gamma(4, 0.25, (cells, 1))).astype(np.float32)


def log1p_of(values: np.ndarray, total: float = 1e4, base: float | None = None) -> np.ndarray:
    sums = values.sum(axis=1, keepdims=True)
    logged = np.log1p(values / np.where(sums == 0, 1, sums) * total)
    return (logged if base is None else logged / np.log(base)).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [0.5, 1, 10])
@pytest.mark.parametrize("dense", [True, False])
def test_every_kind_is_told_from_the_others(seed, depth, dense):
    form = np.asarray if dense else sp.csr_matrix
    whole = counts(seed, depth)
    assert look_at(form(whole)).values == Values.COUNTS
    noise = np.random.default_rng(seed).uniform(0.8, 1.1, whole.shape).astype(np.float32)
    for fractional in (whole * noise, np.maximum(whole - 0.3, 0), whole * 0.37 * noise):
        assert look_at(form(fractional)).values == Values.FRACTIONAL
    for total in (1e4, 1e6, 1234.5):
        for base in (None, 2.0, 10.0):
            found = look_at(form(log1p_of(whole, total, base)))
            assert (found.values, found.base) == (Values.LOG1P, base)
            assert found.total == pytest.approx(total, rel=1e-3)
    # With some of the genes, cells do not sum to one number, but it still shows that they were whole counts.
    some = log1p_of(whole)[:, ::6]
    assert (look_at(form(some)).values, look_at(form(some)).total) == (Values.LOG1P, None)
    assert look_at(form(np.expm1(log1p_of(whole)))).values == Values.LINEAR


def test_values_with_little_evidence_are_not_misjudged():
    assert look_at(np.zeros((5, 4))).values == Values.ZEROS
    assert look_at(sp.csr_matrix((np.zeros(3), [0, 1, 2], [0, 3]), (1, 4))).values == Values.ZEROS
    assert look_at(np.ones((4, 3), dtype=bool)).values == Values.COUNTS
    one = log1p_of(counts(0)[:1])
    assert (look_at(one).values, look_at(one).total) == (Values.LOG1P, None)


def test_low_depth_is_reported():
    assert "cells are shallow: " in look_at(counts(0, 0.02)).too_shallow()
    assert look_at(counts(0, 3)).too_shallow() is None


@pytest.mark.parametrize("base", [None, 2.0, 10.0])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_conversions_are_exact(base, form):
    whole = counts(1).astype(np.float64)
    whole = whole[whole.sum(axis=1) > 0]
    given = log1p_of(whole, 5000, base)
    made = converted(form(given), Scale(Values.LOG1P, 5000, base), Scale(Values.LOG1P, 1e6))
    made = made.toarray() if sp.issparse(made) else made
    np.testing.assert_allclose(made, np.log1p(whole / whole.sum(axis=1, keepdims=True) * 1e6), rtol=2e-5, atol=1e-6)


def test_scales_differ_only_where_both_are_certain():
    ten, million, unknown = Scale(Values.LOG1P, 1e4), Scale(Values.LOG1P, 1e6), Scale(Values.LOG1P)
    assert differ(ten, million) and not differ(ten, unknown) and not differ(unknown, million)
    assert not differ(ten, Scale(Values.LOG1P, 10_003)) and differ(ten, Scale(Values.LOG1P, 1e4, 2.0))


# In files, training and prediction


def screen(values: np.ndarray, **layers) -> ad.AnnData:
    names = np.resize(["control", "A", "control", "B"], len(values))
    adata = ad.AnnData(
        sp.csr_matrix(values), obs={"perturbation": names, "cell_type": ["c"] * len(values)}, layers=layers
    )
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(len(values))], [f"g{i}" for i in range(values.shape[1])]
    return adata


def test_fractional_counts_are_refused_by_themselves_and_taken_when_said():
    whole = counts(2)
    values = whole * np.random.default_rng(0).uniform(0.9, 1.1, whole.shape).astype(np.float32)
    adata = screen(values)
    with pytest.raises(ValueError, match="X seems to hold fractional counts .*: set normalize='counts_to_log1p'"):
        StateProcessor.fit(adata)
    processor = StateProcessor.fit(adata, normalize="counts_to_log1p")
    expected = adata.copy()
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    np.testing.assert_allclose(processor.features(adata), expected.X.toarray(), atol=1e-5)
    assert processor.scale == {"values": Values.FRACTIONAL} and processor(adata, "A")["control_cells"].max() > 0


def test_the_base_of_the_logarithm_is_found_and_taken_out():
    whole = counts(3)
    for base in (2, 10):
        adata = screen(whole)
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata, base=base)
        del adata.uns["log1p"]
        processor = StateProcessor.fit(adata, genes=50)
        assert processor.scale == {"values": Values.LOG1P, "total": 1e4}
        with pytest.raises(
            ValueError, match=f"to the base {base}, the model was trained on log1p of 10,000 counts per cell;"
        ):
            processor(adata, "A")


def test_data_of_another_scale_are_an_error_or_converted():
    whole = counts(4)
    trained, other = screen(log1p_of(whole)), screen(log1p_of(whole, 1e6))
    processor = StateProcessor.fit(trained)
    assert processor.scale == {"values": Values.LOG1P, "total": 1e4}
    message = "X holds log1p of 1,000,000 counts per cell, the model was trained on log1p of 10,000 counts per cell; .* convert_scale"
    with pytest.raises(ValueError, match=message):
        processor(other, "A")
    expected = processor(trained, "A")["control_cells"]
    found = processor(other, "A", convert_scale=True)["control_cells"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # The conversion of these data does not change how other data are read afterwards.
    assert torch.equal(processor(trained, "A")["control_cells"], expected)
    with pytest.raises(
        ValueError, match="X holds log1p of 10,000 .* in one file and log1p of 1,000,000 .* convert_scale: true"
    ):
        StateProcessor.fit([trained, other])


def test_a_checkpoint_is_trained_further_on_another_scale_only_if_asked(tmp_path):
    whole = counts(6)
    processor = StateProcessor.fit(screen(log1p_of(whole)))
    screen(log1p_of(whole, 1e6)).write_h5ad(tmp_path / "other.h5ad")
    splits = Splits({"other": [tmp_path / "other.h5ad"]}, {"other"})
    with pytest.raises(ValueError, match="holds log1p of 1,000,000 .*, or convert them with convert_scale: true"):
        load(FileSource(splits.datasets, processor), splits, processor=processor)
    cells, further = load(FileSource(splits.datasets, processor, convert_scale=True), splits, processor=processor)
    expected = processor.features(screen(log1p_of(whole)))
    np.testing.assert_allclose(cells.features.sum(), expected.sum(), rtol=1e-5)
    assert further.scale == processor.scale
    store = prepare(DataArguments(datasets={"other": str(tmp_path / "other.h5ad")}), tmp_path / "store", quiet=True)
    with pytest.raises(ValueError, match="holds log1p of 1,000,000 .*; scale the data alike$"):
        load(StoreSource(store), splits, processor=processor)


def test_scaled_values_are_refused_and_the_other_matrices_named():
    adata = screen(log1p_of(counts(5)), counts=sp.csr_matrix(counts(5)))
    adata.X = adata.X.toarray() - adata.X.mean(axis=0).A1
    with pytest.raises(
        ValueError, match=r"scaled or centred.*other matrices are \['layers/counts'\]: name one with input="
    ):
        StateProcessor.fit(adata)


def _mixed(one: np.ndarray, other: np.ndarray) -> str:
    with pytest.raises(ValueError, match="cells are on several scales") as error:
        look_at(sp.csr_matrix(np.vstack([one, other])))
    return str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_cells_of_several_scales_are_an_error_that_says_each(seed):
    one, other = counts(seed), counts(seed + 10)
    logged = log1p_of(one)
    of_each = "(64 of 128 cells looked at)"
    ten_thousand = f"log1p of 10,000 counts per cell {of_each}"
    assert f"{ten_thousand}; log1p of 1,000,000 counts per cell {of_each}; scale all" in _mixed(
        logged, log1p_of(other, 1e6)
    )
    assert f"log1p of 10,000 counts per cell, to the base 2 {of_each}" in _mixed(logged, log1p_of(other, base=2.0))
    assert f"{ten_thousand}; counts {of_each}" in _mixed(logged, other)
    assert f"normalised to 10,000 counts per cell, not log1p {of_each}" in _mixed(logged, np.expm1(log1p_of(other)))
    # With some of the genes, there is no total.
    assert f"log1p {of_each}; counts " in _mixed(logged[:, ::6], other[:, ::6])


def test_a_base_under_which_one_gene_is_all_of_a_cell_is_none():
    """Rounded values of a gene that all cells express alike: 10 to the power of them is the sum of all values."""
    logged = log1p_of(counts(0)).round(1)
    logged[:, 0] = 8.6
    assert look_at(logged).base is None


@pytest.mark.parametrize("cells", [6, 10, 40, 200])
@pytest.mark.parametrize("depth", [0.1, 1, 10])
def test_cells_of_one_scale_are_no_mixture(cells, depth):
    for seed in range(6):
        whole = counts(seed, depth, cells, 60)
        smooth = whole + np.roll(whole, 1, 0) + np.roll(whole, 2, 0)
        logged = log1p_of(whole)
        alike = [whole, whole / 2, np.maximum(whole - 0.3, 0), np.log1p(whole), smooth / 3, log1p_of(smooth)[:, :-1]]
        some = [logged[:, ::6], logged[:, :-5], logged[:, :-1]]
        rounded = [values.round(digits) for values in (logged, logged[:, ::6]) for digits in (1, 2, 3)]
        for values in (*alike, *some, *rounded, np.repeat(logged[:3], 20, axis=0), np.expm1(logged)):
            look_at(sp.csr_matrix(values))


def test_counts_and_normalised_values_can_be_scaled_together():
    assert look_at(np.vstack([counts(0), np.expm1(log1p_of(counts(1)))])).values == Values.LINEAR


def _screen_of(values: np.ndarray) -> ad.AnnData:
    labels = ["control", "A"] * (len(values) // 2)
    obs = {"perturbation": labels, "cell_type": "x", "qc": ["bad"] * (len(values) // 2) + ["good"] * (len(values) // 2)}
    return ad.AnnData(
        sp.csr_matrix(values),
        obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(len(values))]),
        var=pd.DataFrame(index=[f"G{i}" for i in range(values.shape[1])]),
    )


def test_a_few_cells_of_another_scale_are_found_wherever_they_are(tmp_path):
    whole = np.minimum(counts(0, cells=6000, genes=40), 9)
    logged = log1p_of(whole)
    for name, few in (("log1p of 1,000,000 counts per cell", log1p_of(whole, 1e6)), ("counts, ", whole)):
        values = logged.copy()
        values[600:610] = few[600:610]  # none of those that are looked at first
        assert look_at(values[:600]).total == 10000
        _screen_of(values).write_h5ad(tmp_path / "s.h5ad")
        with pytest.raises(
            ValueError, match=rf"s.h5ad: X holds log1p of 10,000 counts per cell, but some of .* {name}"
        ):
            load(
                FileSource({"s": [tmp_path / "s.h5ad"]}, StateProcessor()), Splits({"s": [tmp_path / "s.h5ad"]}, {"s"})
            )


def test_cells_that_are_left_out_do_not_say_what_the_values_are(tmp_path):
    whole = counts(0, cells=5000, genes=40)
    values = np.vstack([whole[:2500], log1p_of(whole[2500:])])
    _screen_of(values).write_h5ad(tmp_path / "s.h5ad")
    splits = Splits({"s": [tmp_path / "s.h5ad"]}, {"s"})
    source = FileSource(splits.datasets, StateProcessor(exclude={"qc": ["bad"]}))
    _, processor = load(source, splits)
    assert (processor.normalize, processor.scale) == ("none", {"values": "log1p", "total": 10000.0})
    with pytest.raises(ValueError, match="s.h5ad: cells are on several scales"):
        FileSource(splits.datasets, StateProcessor())
