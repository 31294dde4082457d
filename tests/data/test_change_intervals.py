"""Intervals of predicted mean changes from the residuals of held-out groups."""

import numpy as np
import pytest

from pertstate.data.change_intervals import LEVEL, ChangeIntervals
from pertstate.data.record import RunRecord


CELLS, CONTROLS = 60, 40


def drawn(groups: int, seed: int, cells: int = CELLS, controls: int = CONTROLS):
    """
    Predicted and measured changes. The error of the model grows with the change and with the spread of the gene; the measurement has the
    noise of its cells.
    """
    generator = np.random.default_rng(seed)
    spread = np.random.default_rng(0).gamma(2, 0.5, 200)
    predicted = generator.normal(0, 0.3, (groups, 200))
    true = predicted + generator.normal(0, 1, (groups, 200)) * (0.2 * spread + 0.3 * np.abs(predicted))
    measured = true + generator.normal(0, 1, (groups, 200)) * spread * np.sqrt(1 / cells + 1 / controls)
    return predicted, measured, np.full(groups, cells), np.full(groups, controls), spread


def inside(intervals: ChangeIntervals, predicted, measured, cells, controls, _) -> np.ndarray:
    low, high = intervals.around(predicted, cells, controls)
    return (low <= measured) & (measured <= high)


def test_they_cover_their_share_of_the_held_out_changes_and_of_new_ones():
    held_out = drawn(20, 1)
    found = ChangeIntervals.of_held_out(*held_out)
    assert found.groups == 20 and found.level == LEVEL == 0.9
    # The smallest intervals of this kind that cover it, of all changes and of the large ones.
    sizes = np.abs(held_out[0])
    large = sizes >= np.quantile(sizes, 0.9, axis=1, keepdims=True)
    covered = inside(found, *held_out)
    missing = [int(np.ceil((of.size + 1) * LEVEL)) - int(of.sum()) for of in (covered, covered[large])]
    # The last one lies on an end of its interval, but for rounding.
    assert max(missing) in (0, 1)
    assert 0.88 < inside(found, *drawn(20, 2)).mean() < 0.93


def test_large_changes_are_covered_as_well_as_the_others():
    generator = np.random.default_rng(3)
    predicted = np.where(np.arange(200) < 25, 2.0, 0.01) * generator.choice([-1, 1], (40, 200))
    error = np.where(np.arange(200) < 25, 1.0, 0.0) * generator.normal(size=(40, 200))
    many = np.full(40, 10**9)
    found = ChangeIntervals.of_held_out(predicted[:20], (predicted + error)[:20], many[:20], many[:20], np.ones(200))
    covered = inside(found, predicted[20:], (predicted + error)[20:], many[20:], many[20:], None)
    assert covered[:, :25].mean() > 0.85


@pytest.mark.parametrize(("cells", "controls"), [(10, 8), (1000, 1000)])
def test_they_cover_their_share_of_changes_that_are_measured_with_fewer_or_more_cells(cells, controls):
    found = ChangeIntervals.of_held_out(*drawn(40, 1))
    assert 0.88 < inside(found, *drawn(40, 2, cells, controls)).mean() < 0.92
    # The intervals of a measurement with other numbers of cells do not.
    assert abs(inside(found, *drawn(40, 2, cells, controls)[:2], CELLS, CONTROLS, None).mean() - LEVEL) > 0.025


def test_many_cells_leave_the_error_of_the_model():
    found = ChangeIntervals(0.9, 2.0, 0.5, np.array([1.0, 4.0]), groups=1, deviation=0.5)
    low, high = found.around(np.array([0.0, -1.0]), 10**12, 10**12)
    np.testing.assert_allclose(high - low, [2 * 2 * 0.5, 2 * 2 * (1 + 0.5 * 4)])
    exact = ChangeIntervals(0.9, 0.0, 0.5, np.array([1.0, 4.0]), groups=1, deviation=0.5)
    low, high = exact.around(np.zeros(2), 4, 12)
    np.testing.assert_allclose(high, 1.6448536 * np.array([1.0, 4.0]) / np.sqrt(3), rtol=1e-6)


def test_genes_that_vary_more_have_wider_intervals():
    found = ChangeIntervals.of_held_out(*drawn(20, 1))
    spread = drawn(20, 1)[-1]
    np.testing.assert_allclose(found.spread, spread, rtol=1e-6)
    low, high = found.around(np.zeros(200), CELLS, CONTROLS)
    np.testing.assert_array_equal(low, -high)
    ratio = high / spread
    assert ratio.min() == pytest.approx(ratio.max(), rel=1e-5)
    apart = inside(found, *drawn(40, 3))
    narrow, wide = np.argsort(spread)[:50], np.argsort(spread)[-50:]
    assert abs(apart[:, narrow].mean() - apart[:, wide].mean()) < 0.1


def test_few_changes_have_the_widest_one():
    many = np.array([10**12])
    found = ChangeIntervals.of_held_out(np.zeros((1, 3)), np.array([[1.0, -2.0, 0.5]]), many, many, np.ones(3))
    low, high = found.around(np.zeros(3), 10**12, 10**12)
    np.testing.assert_allclose(high, 2, rtol=1e-6)


def test_errors_that_the_noise_explains_need_no_width_of_their_own():
    predicted, _, cells, controls, spread = drawn(20, 1)
    noise = np.random.default_rng(2).normal(0, 1, predicted.shape) * spread * np.sqrt(1 / CELLS + 1 / CONTROLS)
    found = ChangeIntervals.of_held_out(predicted, predicted + noise, cells, controls, spread)
    assert found.factor * found.share < 0.02


def test_the_error_to_expect_is_that_of_the_held_out_groups_and_of_new_ones():
    held_out = drawn(20, 1)
    found = ChangeIntervals.of_held_out(*held_out)
    mae = np.abs(held_out[0] - held_out[1]).mean()
    assert found.expected_mae(held_out[0], *held_out[2:4]).mean() == pytest.approx(mae, rel=1e-6)
    predicted, measured, cells, controls, _ = drawn(200, 2, 20, 10)
    expected = found.expected_mae(predicted, cells, controls)
    assert expected.shape == (200,)
    assert expected.mean() == pytest.approx(np.abs(predicted - measured).mean(), rel=0.05)
    # With many cells it is that of the model, with an exact model that of the noise.
    large = ChangeIntervals(0.9, 9.0, 0.5, np.array([1.0, 3.0]), groups=1, deviation=2.0)
    assert large.expected_mae(np.array([0.0, -1.0]), 10**12, 10**12) == pytest.approx(np.sqrt(2 / np.pi) * 3)
    exact = ChangeIntervals(0.9, 9.0, 0.5, np.array([1.0, 3.0]), groups=1, deviation=0.0)
    assert exact.expected_mae(np.array([0.0, -1.0]), 4, 12) == pytest.approx(np.sqrt(2 / np.pi) * 2 / np.sqrt(3))
    # Of some features.
    some = np.array([3, 100, 7])
    part = found.of_features(some)
    whole = found.around(predicted, cells, controls)[1]
    np.testing.assert_allclose(part.around(predicted[:, some], cells, controls)[1], whole[:, some])


def test_a_record_keeps_them_and_a_damaged_one_is_refused(tmp_path):
    found = ChangeIntervals.of_held_out(*drawn(4, 5))
    RunRecord(control="control", groups=[], intervals=found).save(tmp_path)
    again = RunRecord.load(tmp_path).intervals
    assert (again.level, again.factor, again.share, again.groups) == (found.level, found.factor, found.share, 4)
    np.testing.assert_array_equal(again.spread, found.spread)
    with pytest.raises(ValueError, match="a finite factor, share and deviation"):
        ChangeIntervals.from_dict({**found.to_dict(), "factor": float("nan")}, found.spread)
    path = tmp_path / "record.json"
    path.write_text(path.read_text().replace('"level": 0.9', '"level": 9'))
    with pytest.raises(ValueError, match="the record of the checkpoint is damaged"):
        RunRecord.load(tmp_path)
