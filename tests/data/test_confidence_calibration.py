"""The energy distance to expect at a confidence."""

import numpy as np
import pytest

from pertstate.data.confidence_calibration import ConfidenceCalibration


def test_it_is_the_least_squares_line_within_what_was_found():
    losses = np.array([1.0, 2, 3, 4, 5, 6])
    distances = 0.1 + 0.2 * losses + np.array([0.02, -0.01, 0, 0.03, -0.02, 0.01])
    found = ConfidenceCalibration.of_groups(losses, distances)
    slope, intercept = np.polyfit(losses, distances, 1)
    assert (found.slope, found.intercept, found.groups) == (pytest.approx(slope), pytest.approx(intercept), 6)
    np.testing.assert_allclose(found.expected([2.5, 4]), intercept + slope * np.array([2.5, 4]))
    np.testing.assert_allclose(found.expected([-50, 50]), [distances.min(), distances.max()])
    assert ConfidenceCalibration.from_dict(found.to_dict()) == found


def test_it_never_turns_the_order_round_and_needs_five_groups():
    falling = ConfidenceCalibration.of_groups([1.0, 2, 3, 4, 5], [5.0, 4, 3, 2, 1])
    assert falling.slope == 0 and falling.expected([0.0, 9.0]).tolist() == [3.0, 3.0]
    same = ConfidenceCalibration.of_groups([2.0] * 5, [5.0, 4, 3, 2, 1])
    assert same.slope == 0 and float(same.expected(2.0)) == 3
    assert ConfidenceCalibration.of_groups([1.0, 2, 3, 4], [1.0, 2, 3, 4]) is None


def test_a_damaged_one_is_an_error():
    content = ConfidenceCalibration.of_groups([1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 6]).to_dict()
    for name, value in (("slope", -1), ("intercept", float("nan")), ("low", 99)):
        with pytest.raises(ValueError, match="expected a calibration of finite numbers"):
            ConfidenceCalibration.from_dict({**content, name: value})
