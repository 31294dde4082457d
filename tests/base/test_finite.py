"""Numbers that are finite in float32: what goes into a model, and what comes out of it."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pertstate import StateForPerturbation, StateProcessor
from pertstate.base.cell_values import resolve_target_sum
from pertstate.base.constants import Normalize
from pertstate.base.doses import DoseScale
from pertstate.base.finite import LARGEST, are_finite, check_predicted, check_totals, within_reach, wrong
from pertstate.base.vocabulary import PerturbationFeatures
from pertstate.configuration_state import StateConfig
from pertstate.data import simulate_screen


TOO_LARGE = [np.inf, 1e39, 1e300, np.finfo(np.float64).max]


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=10, cells_per_group=8, seed=0)
    adata.obs["dose"] = 1.0
    adata.obsm["E"] = np.random.default_rng(0).normal(size=(adata.n_obs, 4))
    return adata


def with_value(adata, value, sparse=False, place="X", row=3, column=5):
    changed = adata.copy()
    matrix = np.array(changed.obsm["E"] if place == "E" else sp.csr_matrix(changed.X).toarray(), dtype=np.float64)
    matrix[row, column % matrix.shape[1]] = value
    if place == "E":
        changed.obsm["E"] = matrix
    else:
        changed.X = sp.csr_matrix(matrix) if sparse else matrix
    return changed


def test_float32_sets_the_limit():
    for value in (0.0, -1.5, LARGEST, -LARGEST, 1e-310):
        assert are_finite(np.array([1.0, value])) and not wrong(np.array([value])).any()
    for value in (np.nan, np.inf, -np.inf, 1e39, -1e300):
        assert not are_finite(np.array([1.0, value])) and wrong(np.array([1.0, value])).tolist() == [False, True]
    assert not are_finite(np.array([np.inf], dtype=np.float16)) and are_finite(np.array([6e4], dtype=np.float16))
    assert are_finite(np.array([2**63], dtype=np.uint64)) and are_finite(np.zeros(0))
    assert within_reach(1) and within_reach(np.float32(0.1)) and within_reach(1e30) and within_reach(1e-30)
    for value in (0, -1, np.nan, np.inf, 1e31, 1e-31, "1", None, True):
        assert not within_reach(value)


def test_an_error_names_the_cell_and_the_feature():
    values = np.ones((3, 2), dtype=np.float32)
    check_predicted(values, ["g1", "g2"], str)
    values[2, 1] = np.nan
    with pytest.raises(FloatingPointError, match=r"predicts nan for 'g2' of cell 2 \(1 of 6 values"):
        check_predicted(values, ["g1", "g2"], lambda row: f"cell {row}")
    with pytest.raises(ValueError, match=r"X: c1 sums to 1e\+31 \(1 such cells read\)"):
        check_totals(np.array([0.0, 1e31, 5.0]), "X", lambda at: f"c{at}")
    with pytest.raises(ValueError, match="c0 sums to inf"):
        check_totals(np.array([np.inf]), "X", lambda at: f"c{at}")


# What goes in


@pytest.mark.parametrize("value", [*TOO_LARGE, np.nan, -np.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_value_that_float32_lacks_is_refused_by_cell_and_gene(screen, value, sparse):
    bad = with_value(screen, value, sparse)
    cell, gene = screen.obs_names[3], screen.var_names[5]
    message = re.escape(f"X holds {np.float64(value)} in cell {cell!r}, gene {gene!r}")
    with pytest.raises(ValueError, match=message):
        StateProcessor.fit(bad)
    processor = StateProcessor.fit(screen)
    for read in (lambda: processor.features(bad), lambda: processor(bad, "pert_0")):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match=message):
        StateProcessor.fit(screen, normalize="none").features(bad)


@pytest.mark.parametrize("value", [*TOO_LARGE, np.nan, -1e300])
def test_a_dimension_that_float32_lacks_is_refused(screen, value):
    bad = with_value(screen, value, place="E")
    message = re.escape(f"obsm/E holds {np.float64(value)} in cell {screen.obs_names[3]!r}, dimension 1")
    processor = StateProcessor.fit(screen, input="obsm/E")
    with pytest.raises(ValueError, match=message):
        processor.features(bad)


@pytest.mark.parametrize("normalize", ["counts_to_log1p", "none"])
@pytest.mark.parametrize("value", [1e31, 3e38])
def test_a_cell_whose_counts_no_model_can_add_up_is_refused(screen, normalize, value):
    bad, processor = with_value(screen, value), StateProcessor.fit(screen, normalize=normalize)
    with pytest.raises(ValueError, match=re.escape(f"X: cell {screen.obs_names[3]!r} sums to {value:g}")):
        processor.features(bad)


def test_a_cell_of_next_to_nothing_is_refused(screen):
    bad = screen.copy()
    bad.X = sp.csr_matrix(bad.X).toarray().astype(np.float64) * 1.25
    bad.X[3] = 1e-310
    with pytest.raises(ValueError, match="cell .* sums to 1e-309"):
        StateProcessor.fit(bad, normalize="counts_to_log1p").features(bad)


def test_large_values_that_float32_holds_are_read(screen):
    fine = with_value(screen, 1e6)
    features = StateProcessor.fit(fine).features(fine)
    assert np.isfinite(features).all() and features.max() > 9


@pytest.mark.parametrize("dose", [np.inf, np.nan, 0.0, -1.0, 1e300, 1e-300, "1e300", "inf", "x", None])
def test_a_dose_is_a_number_that_a_model_can_compute_with(screen, dose):
    bad = screen.copy()
    bad.obs["dose"] = bad.obs["dose"].astype(object)
    name = bad.obs["perturbation"].iloc[-1]
    bad.obs.loc[bad.obs_names[-1], "dose"] = dose
    with pytest.raises(ValueError, match=rf"obs\['dose'\] holds .* for '{name}'; expected a number above 0"):
        StateProcessor.fit(bad, dose_key="dose")
    processor = StateProcessor.fit(screen, dose_key="dose")
    if isinstance(dose, float):
        for asked in (
            lambda: processor(screen, "pert_0", doses=[dose]),
            lambda: processor.encode([f"pert_0@{dose}".replace("e+", "e")]),
        ):
            with pytest.raises(ValueError, match="expected numbers above 0"):
                asked()


def test_weights_and_ratios_of_doses_are_finite(screen):
    processor = StateProcessor.fit(screen)
    for weight in (np.inf, np.nan, 1e300, -1.0):
        with pytest.raises(ValueError, match="doses: expected finite numbers from 0"):
            processor.encode(["pert_0"], doses=[weight])
    assert processor.encode(["pert_0"], doses=[0.0])["perturbation_doses"].tolist() == [[0.0]]
    dosed = StateProcessor.fit(screen, dose_key="dose")
    for dose in (1e16, 1e25, 1e-7, 0.1):
        name = dosed.label_reader.at_doses("pert_0+pert_1", [dose, 1.0])
        assert dosed.label_reader.parts(name) == [("pert_0", dose), ("pert_1", 1.0)]
        assert np.isfinite(dosed.encode([name])["perturbation_doses"]).all()
    for encoding in ("log", "linear"):
        scale = DoseScale(encoding, {"A": [1e-20, 1e-10]})
        assert np.isfinite(scale.weight("A", 1.0))
    with pytest.raises(ValueError, match=r"perturbation 'A' at the dose 1e25: a weight of 1e\+45 is too large"):
        DoseScale("linear", {"A": [1e-20]}).weight("A", 1e25)


def test_vectors_and_their_sums_are_finite():
    for value in (np.nan, np.inf, 1e39, 1e300):
        with pytest.raises(ValueError, match=r"expected finite numbers \(float32\), found .* in the vector of 'B'"):
            PerturbationFeatures(["A", "B"], np.array([[1.0, 2.0], [3.0, value]]))
    features = PerturbationFeatures(["A", "B"], np.array([[3e38, 0.0], [3e38, 1.0]]))
    with pytest.raises(ValueError, match=r"the vectors of \['A', 'B'\] sum to a number that is infinite in float32"):
        features.encode([["A"], ["A", "B"]])
    with pytest.raises(ValueError, match=r"the vectors of \['A'\] times \[2.0\] sum to"):
        features.encode([["A"]], [[2.0]])


@pytest.mark.parametrize("total", [np.inf, np.nan, 1e300, 1e-300, 0, -1.0, True])
def test_what_counts_are_scaled_to_is_finite(screen, total):
    with pytest.raises(ValueError, match="expected a number of counts above 0, or 'median'"):
        StateProcessor.fit(screen, target_sum=total)
    with pytest.raises(ValueError, match="expected a number of counts above 0"):
        resolve_target_sum(total, Normalize.COUNTS_TO_LOG1P, "X", lambda: np.ones(1))


@pytest.mark.parametrize("base", [np.nan, np.inf, 0.0, 1.0, -2.0, "e", np.array([2.0, 3.0]), 1e300])
def test_the_base_of_a_logarithm_is_one(screen, base):
    bad = screen.copy()
    bad.X = np.log1p(sp.csr_matrix(bad.X).toarray() * 1.3)
    bad.uns["log1p"] = {"base": base}
    with pytest.raises(ValueError, match=r"uns\['log1p'\]\['base'\] is .*, expected the base of a logarithm"):
        StateProcessor.fit(bad)
    for fine in (None, 2.0, np.array(10.0), 2):
        bad.uns["log1p"] = {"base": fine}
        assert np.isfinite(StateProcessor.fit(bad).features(bad)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_config_has_finite_numbers(value):
    for field in ("initializer_range", "blur", "decoder_weight"):
        with pytest.raises(ValueError, match=field):
            StateConfig(**{field: value}, input_dim=4, num_perturbations=2)


# What comes out


def test_predictions_that_are_not_finite_are_refused(screen):
    processor = StateProcessor.fit(screen, set_size=4)
    model = StateForPerturbation(StateConfig.from_preset("tiny", **StateConfig.sizes(processor), set_size=4)).eval()
    sentences = processor(screen, "pert_0")
    with torch.no_grad():
        model.output_head.layers[-1].bias.fill_(float("inf"))
        outputs = model(**sentences)
        assert not torch.isfinite(outputs.predictions).all()
        message = r"the model predicts (nan|inf) for 'gene_0' of cell '[^']*\|pert_0'"
        with pytest.raises(FloatingPointError, match=message):
            processor.decode(outputs, sentences)


def test_a_frame_of_predictions_names_its_features(screen):
    processor = StateProcessor.fit(screen, input="obsm/E", gene_input="X", set_size=4)
    assert processor.output_names(2) == ["dim_0", "dim_1"]
    assert StateProcessor.fit(screen).output_names(10) == list(screen.var_names)
    assert pd.Index(processor.vocabulary.genes).equals(pd.Index(screen.var_names))
