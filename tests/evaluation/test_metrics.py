"""Figures of merit and baselines: exact values, and those known of real data."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr

from pertstate.data.cells import sort_into_groups
from pertstate.evaluation import (
    MeanChanges,
    energy_between,
    pearson_of_change,
    score_group,
)
from pertstate.evaluation.metrics import (
    ADDITIVE,
    METRICS,
    MODEL,
    NO_CHANGE,
    PERTURBATION_MEAN,
    average,
    mean_distance,
)
from pertstate.processing import StateProcessor


def rng(seed=0):
    return np.random.default_rng(seed)


def double_sum(x, y) -> float:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return cdist(x, y).mean() - cdist(x, x).mean() / 2 - cdist(y, y).mean() / 2


# Figures


def test_pearson_of_change_is_that_of_scipy():
    predicted, real, control = rng().normal(size=(3, 50))
    expected = pearsonr(predicted - control, real - control).statistic
    assert pearson_of_change(predicted, real, control) == pytest.approx(expected, abs=1e-12)
    # Of the change, not of the expression, whose genes differ by far more.
    level = 100 * rng(1).random(50)
    shifted = pearson_of_change(predicted + level, real + level, control + level)
    assert shifted == pytest.approx(expected, abs=1e-10)


def test_pearson_of_exact_changes():
    control = np.array([1.0, 2.0, 3.0, 4.0])
    change = np.array([0.0, 1.0, -1.0, 2.0])
    assert pearson_of_change(control + 0.1 * change, control + change, control) == pytest.approx(1.0)
    assert pearson_of_change(control - change, control + change, control) == pytest.approx(-1.0)
    assert np.isnan(pearson_of_change(control, control + change, control))
    assert np.isnan(pearson_of_change(control + change, control, control))


@pytest.mark.parametrize("sizes", [(1, 1), (7, 13), (40, 3)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_energy_distance_is_the_double_sum(sizes, offset):
    x, y = (rng(n).normal(size=(n, 30)) + offset for n in sizes)
    y += 0.3
    expected = double_sum(x, y)
    assert energy_between(x, y) == pytest.approx(expected, abs=1e-6)
    assert energy_between(x, y, within_y=cdist(y, y).mean()) == pytest.approx(expected, abs=1e-6)
    # Float32 cells are summed in float64.
    single = energy_between(x.astype(np.float32), y.astype(np.float32))
    assert single == pytest.approx(double_sum(x.astype(np.float32), y.astype(np.float32)), abs=1e-5)


def test_energy_distance_of_known_sets():
    origin, far = np.zeros((3, 2)), np.tile([3.0, 4.0], (5, 1))
    assert energy_between(origin, far) == pytest.approx(5.0)
    assert energy_between(origin, origin) == 0.0
    # {0, 2} and {1}: mean 1, within 4 / 4 = 1 and 0.
    assert energy_between(np.array([[0.0], [2.0]]), np.array([[1.0]])) == pytest.approx(1 - 0.5)


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_mean_distance_in_blocks(block):
    x, y = rng(0).normal(size=(11, 40)), rng(1).normal(size=(17, 40))
    assert mean_distance(x, y, block=block) == pytest.approx(cdist(x, y).mean(), rel=1e-12)


# Baselines


def mean_changes(features, obs, **options) -> MeanChanges:
    """Of cells in any order."""
    order, groups = sort_into_groups(obs if "dataset" in obs else obs.assign(dataset="one"))
    return MeanChanges.fit(features[order], groups, "control", **options)


def training() -> tuple[np.ndarray, pd.DataFrame]:
    """Context c0 with few cells and c1 with many: P moves feature 0 by 1 and by 3, Q by 2 in c1 alone."""
    rows = [("c0", "control", 0.0)] * 2 + [("c0", "P", 1.0)] * 2
    rows += [("c1", "control", 10.0)] * 5 + [("c1", "P", 13.0)] * 50 + [("c1", "Q", 12.0)] * 4
    obs = pd.DataFrame(rows, columns=["context", "perturbation", "value"])
    features = np.stack([obs["value"], np.full(len(obs), 5.0)], axis=1)
    return features.astype(np.float32), obs[["context", "perturbation"]]


def test_mean_changes_weigh_contexts_alike():
    changes = mean_changes(*training()).changes
    assert set(changes) == {"P", "Q"}
    np.testing.assert_allclose(changes["P"], [2.0, 0.0])  # (1 + 3) / 2, not the mean over cells
    np.testing.assert_allclose(changes["Q"], [2.0, 0.0])


def test_mean_changes_tell_datasets_apart():
    features, obs = training()
    obs["dataset"] = "one"
    other = obs.iloc[:4].assign(dataset="two")
    moved = features[:4] + np.array([0, 1], dtype=np.float32) * (other["perturbation"] == "P").to_numpy()[:, None]
    changes = mean_changes(np.concatenate([features, moved]), pd.concat([obs, other])).changes
    np.testing.assert_allclose(changes["P"], [(1 + 3 + 1) / 3, 1 / 3], rtol=1e-6)


def test_contexts_without_controls_teach_nothing():
    features, obs = training()
    kept = ~((obs["context"] == "c1") & (obs["perturbation"] == "control")).to_numpy()
    changes = mean_changes(features[kept], obs[kept]).changes
    assert set(changes) == {"P"}
    np.testing.assert_allclose(changes["P"], [1.0, 0.0])


def test_baselines_add_changes_to_control_cells_and_clip_at_zero():
    changes = MeanChanges({"P": np.array([1.0, -2.0]), "Q": np.array([0.5, 0.5])})
    controls = np.array([[0.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(changes.perturbation_mean("P", controls), [[1.0, 0.0], [3.0, 1.0]])
    assert changes.perturbation_mean("unseen", controls) is None
    np.testing.assert_array_equal(changes.additive(["P", "Q"], controls), [[1.5, 0.0], [3.5, 1.5]])
    np.testing.assert_array_equal(changes.additive(["P", "P"], controls), [[2.0, 0.0], [4.0, 0.0]])
    assert changes.additive(["P"], controls) is None
    assert changes.additive(["P", "unseen"], controls) is None
    unclipped = MeanChanges(changes.changes, clip=False)
    np.testing.assert_array_equal(unclipped.perturbation_mean("P", controls), [[1.0, -1.0], [3.0, 1.0]])


# A group's scores


def test_scores_of_a_group():
    real, controls, predicted = rng(0).random((8, 5)) + 1, rng(1).random((6, 5)), rng(2).random((7, 5))
    changes = MeanChanges({"P": np.full(5, 0.4), "Q": np.linspace(0, 1, 5), "P+Q": np.full(5, 0.1)})
    scores = score_group(predicted, real, controls, "P+Q", ["P", "Q"], changes)
    cells = {
        MODEL: predicted,
        NO_CHANGE: controls,
        PERTURBATION_MEAN: controls + 0.1,
        ADDITIVE: controls + 0.4 + np.linspace(0, 1, 5),
    }
    assert list(scores) == list(cells)
    for method, candidate in cells.items():
        figures = scores[method]
        assert tuple(figures) == METRICS
        assert figures["mae"] == pytest.approx(np.abs(candidate.mean(0) - real.mean(0)).mean())
        assert figures["energy"] == pytest.approx(double_sum(candidate, real), abs=1e-6)
        change = candidate.mean(0) - controls.mean(0)
        if method == MODEL or method == ADDITIVE:
            expected = pearsonr(change, real.mean(0) - controls.mean(0)).statistic
            assert figures["pearson"] == pytest.approx(expected)
    assert np.isnan(scores[NO_CHANGE]["pearson"])


def test_baselines_alone_and_singles():
    real, controls = rng(0).random((8, 5)), rng(1).random((6, 5))
    scores = score_group(None, real, controls, "P", ["P"], MeanChanges({"P": np.ones(5)}))
    assert list(scores) == [NO_CHANGE, PERTURBATION_MEAN]


def test_a_perfect_prediction():
    real, controls = rng(0).random((8, 5)), rng(1).random((6, 5))
    scores = score_group(real, real, controls, "P", ["P"], MeanChanges())
    assert scores[MODEL]["pearson"] == pytest.approx(1.0)
    assert scores[MODEL]["mae"] == 0.0
    assert scores[MODEL]["energy"] == pytest.approx(0.0, abs=1e-7)


def test_averages_weigh_groups_alike():
    nan = float("nan")
    groups = [
        {
            "model": {"pearson": 0.5, "mae": 1.0, "energy": 2.0},
            "no change": {"pearson": nan, "mae": 3.0, "energy": 4.0},
        },
        {"model": {"pearson": nan, "mae": 2.0, "energy": 4.0}, "additive": {"pearson": 1.0, "mae": 0.0, "energy": 0.0}},
    ]
    averages = average(groups)
    assert averages["model"] == {"pearson": 0.5, "mae": 1.5, "energy": 3.0}
    assert averages["additive"] == {"pearson": 1.0, "mae": 0.0, "energy": 0.0}
    assert np.isnan(averages["no change"]["pearson"]) and averages["no change"]["energy"] == 4.0


# Real cells


@pytest.mark.shared
def test_baselines_on_real_cells(shared):
    """IFN-beta in PBMC, each cell type held out in turn, 2000 highly variable genes of all cells."""
    adata = ad.read_h5ad(shared / "data" / "kang2018_pbmc_ifnb.h5ad")
    reference = adata.copy()
    sc.pp.highly_variable_genes(reference, n_top_genes=2000)
    processor = StateProcessor.fit(adata, genes=2000)
    assert processor.vocabulary.genes == reference.var_names[reference.var["highly_variable"]].tolist()

    features, labels = processor.features(adata), processor.labels(adata)
    found = {True: [], False: []}
    for context in sorted(labels["context"].unique()):
        here = (labels["context"] == context).to_numpy()
        is_control = (labels["perturbation"] == "control").to_numpy()
        name = next(p for p in labels["perturbation"].unique() if p != "control")
        for clip in found:
            changes = mean_changes(features[~here], labels[~here], clip=clip)
            found[clip].append(
                score_group(None, features[here & ~is_control], features[here & is_control], name, [name], changes)
            )
    assert len(found[True]) == 7
    clipped, unclipped = average(found[True]), average(found[False])
    assert clipped[NO_CHANGE]["energy"] == pytest.approx(1.8663, abs=5e-5)
    assert clipped[NO_CHANGE]["mae"] == pytest.approx(0.0654, abs=5e-5)
    assert clipped[PERTURBATION_MEAN]["mae"] == pytest.approx(0.0619, abs=5e-5)
    assert clipped[PERTURBATION_MEAN]["energy"] == pytest.approx(1.0138, abs=5e-5)
    assert clipped[PERTURBATION_MEAN]["pearson"] == pytest.approx(0.7389, abs=5e-5)
    assert unclipped[PERTURBATION_MEAN]["pearson"] == pytest.approx(0.733, abs=5e-4)
