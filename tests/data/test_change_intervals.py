"""Intervals of predicted mean changes from the residuals of held-out groups."""

import numpy as np
import pytest

from pertstate.data.change_intervals import LEVEL, ChangeIntervals
from pertstate.data.record import RunRecord


def drawn(groups: int, seed: int):
    """Predicted and measured changes whose error grows with the change and with the spread of the gene."""
    generator = np.random.default_rng(seed)
    spread = np.random.default_rng(0).gamma(2, 0.5, 200)
    predicted = generator.normal(0, 0.3, (groups, 200))
    measured = predicted + generator.normal(0, 1, (groups, 200)) * (0.2 * spread + 0.3 * np.abs(predicted))
    return predicted, measured, spread


def inside(intervals: ChangeIntervals, predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    low, high = intervals.around(predicted)
    return (low <= measured) & (measured <= high)


def test_they_cover_their_share_of_the_held_out_changes_and_of_new_ones():
    predicted, measured, spread = drawn(20, 1)
    found = ChangeIntervals.of_held_out(predicted, measured, spread)
    assert found.groups == 20 and found.level == LEVEL == 0.9
    # The smallest intervals of this kind that cover it: one change less, and they would not.
    count = int(inside(found, predicted, measured).sum())
    assert count == int(np.ceil((measured.size + 1) * LEVEL))
    assert 0.88 < inside(found, *drawn(20, 2)[:2]).mean() < 0.92


def test_genes_that_vary_more_have_wider_intervals():
    predicted, measured, spread = drawn(20, 1)
    found = ChangeIntervals.of_held_out(predicted, measured, spread)
    ratio = found.floor / spread
    assert ratio.min() == pytest.approx(ratio.max(), rel=1e-5) and ratio.max() > 0.05
    low, high = found.around(np.zeros(200))
    np.testing.assert_allclose(high, found.factor * found.floor, rtol=1e-6)
    np.testing.assert_array_equal(low, -high)
    apart = inside(found, *drawn(40, 3)[:2])
    narrow, wide = np.argsort(spread)[:50], np.argsort(spread)[-50:]
    assert abs(apart[:, narrow].mean() - apart[:, wide].mean()) < 0.1


def test_few_changes_have_the_widest_one():
    found = ChangeIntervals.of_held_out(np.zeros((1, 3)), np.array([[1.0, -2.0, 0.5]]), np.ones(3))
    low, high = found.around(np.zeros(3))
    np.testing.assert_allclose(high, 2, rtol=1e-6)


def test_a_record_keeps_them_and_a_damaged_one_is_refused(tmp_path):
    found = ChangeIntervals.of_held_out(*drawn(4, 5))
    RunRecord(control="control", groups=[], intervals=found).save(tmp_path)
    again = RunRecord.load(tmp_path).intervals
    assert (again.level, again.factor, again.groups) == (found.level, found.factor, 4)
    np.testing.assert_array_equal(again.floor, found.floor)
    with pytest.raises(ValueError, match="a finite factor and a finite floor"):
        ChangeIntervals.from_dict({**found.to_dict(), "factor": float("nan")}, found.floor)
    path = tmp_path / "record.json"
    path.write_text(path.read_text().replace('"level": 0.9', '"level": 9'))
    with pytest.raises(ValueError, match="the record of the checkpoint is damaged"):
        RunRecord.load(tmp_path)
