"""Figures of merit: exact values."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr

from pertstate.evaluation import energy_between, pearson_of_change
from pertstate.evaluation.metrics import mean_distance


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
    # It correlates changes and not expression, which differs between genes by far more.
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
    # For {0, 2} and {1}, the mean distance between them is 1, within the first 4 / 4 = 1, and within the second 0.
    assert energy_between(np.array([[0.0], [2.0]]), np.array([[1.0]])) == pytest.approx(1 - 0.5)


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_mean_distance_in_blocks(block):
    x, y = rng(0).normal(size=(11, 40)), rng(1).normal(size=(17, 40))
    assert mean_distance(x, y, block=block) == pytest.approx(cdist(x, y).mean(), rel=1e-12)
