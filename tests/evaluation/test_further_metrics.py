"""Further figures: those of the libraries that are known for them, and exact values."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import rbf_kernel

from pertstate.cli import main as pertstate
from pertstate.evaluation.assembly import scores_of
from pertstate.evaluation.baselines import NO_CHANGE, Baselines
from pertstate.evaluation.bootstrap import bootstrap_weights
from pertstate.evaluation.further_metrics import (
    WeightedCells,
    bandwidth_of,
    discrimination,
    sinkhorn_divergence,
    total_variance,
    weighted_kernel,
)
from pertstate.evaluation.group_scores import logged_figures
from pertstate.evaluation.metrics import CEILING, CHEAP, COSTLY, FURTHER, MODEL
from pertstate.evaluation.scores import format_scores
from pertstate.evaluation.scoring import ControlCells, GroupResult, Predicted, score_group
from pertstate.losses.sinkhorn import SinkhornLoss


def rng(seed=0):
    return np.random.default_rng(seed)


def cells(seed: int, number: int, features: int = 12, shift: float = 0.0) -> np.ndarray:
    """Expression, of which about a half is 0."""
    return np.maximum(rng(seed).normal(shift, 1, (number, features)), 0).astype(np.float32)


def scored(predicted, real, controls, name="P", expression=True, metrics=COSTLY, draws=200) -> GroupResult:
    baselines = Baselines(None, lambda name: [name], clip=expression)
    of_context = ControlCells(controls, ("", "c"), draws=draws)
    return score_group(("", "c", name), Predicted(predicted), real, of_context, baselines, metrics=metrics)


def test_figures_of_a_group():
    predicted, real, controls = cells(0, 40), cells(1, 30, shift=0.3), cells(2, 50)
    result = scored(predicted, real, controls)
    found = {name: value[0] for name, value in result.further[MODEL].items()}
    assert found["mse"] == pytest.approx(np.square(predicted.mean(0) - real.mean(0)).mean(), rel=1e-5)
    assert found["variance_ratio"] == pytest.approx(predicted.var(0).sum() / real.var(0).sum(), rel=1e-5)
    assert found["zeros"] == pytest.approx((predicted == 0).mean(), rel=1e-6)
    gamma = 1 / (2 * np.median(pdist(controls.astype(np.float64))) ** 2)
    pairs = [(predicted, predicted), (real, real), (predicted, real)]
    within, within_real, between = (rbf_kernel(*(v.astype(np.float64) for v in of), gamma).mean() for of in pairs)
    assert found["mmd"] == pytest.approx(within + within_real - 2 * between, abs=1e-6)
    ceiling = {name: value[0] for name, value in result.further[CEILING].items()}
    assert ceiling["zeros"] == pytest.approx((real == 0).mean()) and ceiling["variance_ratio"] == 1
    assert "sinkhorn" not in ceiling


def test_a_perfect_prediction():
    real = cells(0, 30)
    found = scored(real, real, cells(1, 40)).further[MODEL]
    assert {name: value[0] for name, value in found.items() if name not in ("variance_ratio", "zeros")} == {
        name: pytest.approx(0, abs=1e-6) for name in ("mse", "mmd", "sinkhorn")
    }
    assert found["variance_ratio"][0] == pytest.approx(1)


def test_the_sinkhorn_divergence_is_that_of_training():
    x, y = cells(0, 20), cells(1, 20, shift=1)
    expected = SinkhornLoss(blur=0.05)(torch.from_numpy(x)[None], torch.from_numpy(y)[None], None)
    assert sinkhorn_divergence(x, y) == pytest.approx(float(expected), abs=1e-5)
    assert scored(x, y, cells(2, 30)).further[MODEL]["sinkhorn"][0] == pytest.approx(float(expected), abs=1e-5)
    # All of one set move by (3, 4): half of the squared distance.
    assert sinkhorn_divergence(np.zeros((3, 2)), np.tile([3.0, 4.0], (5, 1))) == pytest.approx(12.5, rel=1e-3)


def test_what_costs_little_is_logged_in_training_and_equals_the_scores():
    predicted, real, controls = cells(0, 40), cells(1, 30, shift=0.3), cells(2, 50)
    in_training = logged_figures([scored(predicted, real, controls, metrics=(), draws=0)])
    scores = scores_of([scored(predicted, real, controls)], [f"g{i}" for i in range(12)], None, "the model")
    assert {name: in_training[name] for name in CHEAP} == {
        name: pytest.approx(scores.value(MODEL, name), abs=1e-5) for name in CHEAP
    }
    assert not [name for name in in_training if name.startswith("no_change_") and name.endswith(CHEAP)]


def test_resampled_figures_are_those_of_the_drawn_cells():
    """A resampling that draws a cell twice gives the figure of a set in which this cell stands twice."""
    x, y = cells(0, 9), cells(1, 7)
    weights = [bootstrap_weights(rng(2), len(of), 4) for of in (x, y)]
    drawn = [
        [np.repeat(of, np.rint(w * len(of)).astype(int), axis=0) for w in rows] for of, rows in zip((x, y), weights)
    ]
    kernel = weighted_kernel(x, y, *weights, bandwidth=2.0, block=4)
    expected = [np.exp(-cdist(a, b, "sqeuclidean") / 8).mean() for a, b in zip(*drawn)]
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)
    variances = total_variance(x, weights[0], WeightedCells(x, weights[0]).means)
    np.testing.assert_allclose(variances, [of.var(axis=0).sum() for of in drawn[0]], rtol=1e-5)


def test_the_ceiling_is_what_a_perfect_model_reaches():
    """The average ceiling of simulated experiments equals the average score of a model that knows the truth."""
    change = rng(9).normal(0, 0.3, 200)
    found, reached = [], []
    for i in range(40):
        real, drawn = (rng([i, n]).normal(change, 1, (n, 200)).astype(np.float32) for n in (60, 100))
        controls = rng([i, 0]).normal(0, 1, (100, 200)).astype(np.float32)
        result = scored(drawn, real, controls, metrics=("mmd",), draws=0)
        found.append([result.further[CEILING][name][0] for name in ("mse", "mmd")])
        reached.append([np.square(change - real.mean(axis=0)).mean(), result.further[MODEL]["mmd"][0]])
    np.testing.assert_allclose(np.mean(found, axis=0), np.mean(reached, axis=0), rtol=0.02)


def test_the_bandwidth_is_the_median_distance_of_control_cells():
    controls = cells(0, 60)
    assert bandwidth_of(controls) == pytest.approx(np.median(pdist(controls)), rel=1e-5)
    assert np.isnan(bandwidth_of(controls[:1])) and np.isnan(bandwidth_of(np.ones((4, 3), np.float32)))
    # Small groups take part of the control cells; the kernel stays that of the context.
    many = ControlCells(cells(0, 400), ("", "c"), draws=0)
    assert many.first(100).bandwidth == many.bandwidth != bandwidth_of(many.cells[:100])
    result = scored(cells(1, 5), cells(2, 6), np.ones((4, 12), np.float32), metrics=("mmd",), draws=0)
    assert np.isnan(result.further[MODEL]["mmd"][0])


def test_zeros_are_counted_where_values_may_be_zero():
    result = scored(cells(0, 9), cells(1, 8), cells(2, 10), expression=False, metrics=())
    assert set(result.further[MODEL]) == set(result.further[CEILING]) == {"mse", "variance_ratio"}


def test_discrimination_counts_the_changes_that_are_nearer():
    observed = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    names, genes = ["P", "Q", "R"], ["g0", "g1", "g2"]
    np.testing.assert_allclose(discrimination(observed, observed, names, genes), [1, 1, 1])
    swapped = observed[[1, 0, 2]]
    # Of three changes, one is nearer than the own one, and the third is as far.
    np.testing.assert_allclose(discrimination(swapped, observed, names, genes), [1 - 1.5 / 3, 1 - 1.5 / 3, 1])
    # No change is as near to all of them.
    np.testing.assert_allclose(discrimination(np.zeros((3, 3)), observed, names, genes), 1 - 1 / 3)
    # What a perturbation does to its own gene is left out.
    np.testing.assert_allclose(discrimination(swapped, observed, ["g0", "g1", "R"], genes)[:2], [1 - 1 / 3, 1 - 1 / 3])


def results(metrics=COSTLY) -> list[GroupResult]:
    controls = cells(9, 40)
    return [
        scored(cells(i, 25, shift=0.1 * i), cells(50 + i, 20, shift=0.1 * i), controls, f"P{i}", metrics=metrics)
        for i in range(4)
    ]


def test_scores_have_what_was_found():
    features = [f"g{i}" for i in range(12)]
    scores = scores_of(results(), features, None, "the model")
    assert set(FURTHER) <= set(scores.table)
    of_model = scores.table[scores.table["method"] == MODEL]
    changes = [scores.changes[name] - scores.changes["control"] for name in ("predicted", "observed")]
    np.testing.assert_allclose(
        of_model["discrimination"], discrimination(*changes, of_model["perturbation"].tolist(), features)
    )
    averages = scores.averages.set_index(["method", "metric"])
    assert averages.loc[(MODEL, "mmd"), "low"] < averages.loc[(MODEL, "mmd"), "value"]
    assert np.isnan(averages.loc[(MODEL, "zeros"), "share"])
    text, short = format_scores(scores, ("mse", "sinkhorn")), format_scores(scores)
    assert text.splitlines()[0].split()[-5:] == ["pearson", "mae", "energy", "mse", "sinkhorn"]
    assert short.splitlines()[0].split()[-1] == "energy"
    cheap = scores_of(results(metrics=()), features, None, "the model")
    assert set(FURTHER) & set(cheap.table) == set(CHEAP)
    assert cheap.verdict == scores.verdict


def test_another_share_of_zeros_is_a_note():
    controls, real = cells(0, 30), cells(1, 30)
    half = scored(np.maximum(real, 0.01), real, controls)
    features = [f"g{i}" for i in range(12)]
    (note,) = scores_of([half], features, None, "the model").notes
    assert note.startswith("0% of the predicted values are 0, and 5") and "p-values of tests" in note
    assert not scores_of([scored(real, real, controls)], features, None, "the model").notes
    assert half.further[NO_CHANGE]["zeros"][0] == pytest.approx((controls == 0).mean())


def test_names_are_checked_before_data_are_read(capsys):
    words = ["evaluate", "--predicted", "gone.h5ad", "--real", "gone.h5ad", "--metrics"]
    assert pertstate([*words, "mdd"]) == 1
    assert "no figure is called 'mdd', expected some of" in capsys.readouterr().err
