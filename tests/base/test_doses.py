"""Doses and their weights."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pertstate.base.doses import DoseScale, check_doses, check_weights, dose_text


def test_weights_of_the_two_encodings():
    trained = {"A": [0.1, 10.0], "B": [1.0]}
    log, linear = DoseScale("log", trained), DoseScale("linear", trained)
    assert log.span == [0.1, 10.0]
    assert [log.weight("A", dose) for dose in (0.1, 1, 10)] == pytest.approx(np.log([2, 11, 101]) / np.log(101))
    assert [linear.weight("B", dose) for dose in (0.1, 1, 10, 20)] == pytest.approx([0.01, 0.1, 1, 2])
    assert DoseScale("linear", trained, [1.0, 5.0]).weight("A", 10) == 2.0
    assert log.is_new("B", 0.1) and not log.is_new("A", 0.1) and log.is_new("C", 1)


@pytest.mark.parametrize("dose", [0, -1, np.nan, np.inf, "1", None])
def test_doses_are_numbers_above_0(dose):
    with pytest.raises(ValueError, match="doses: expected numbers above 0, found"):
        check_doses([1.0, dose])
    with pytest.raises(ValueError, match="expected"):
        DoseScale("log", {"A": [1.0]}).weight("A", dose)


def test_weights_may_be_0():
    check_weights([0, 2.5])
    for weight in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected finite numbers from 0"):
            check_weights([weight])


def test_doses_as_texts_are_read_back():
    for dose in (0.1, 10.0, 1e-5, 2.5e16, 3.0):
        assert float(dose_text(dose)) == dose
    assert dose_text(10.0) == "10"


@pytest.mark.slow
def test_a_dose_left_out_is_predicted_better_than_by_its_neighbours(tmp_path):
    """The run is that of the benchmark, with a seed that no setting was chosen on."""
    path = Path(__file__).parents[2] / "benchmarks" / "dose_interpolation.py"
    spec = importlib.util.spec_from_file_location("dose_interpolation", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.errors(benchmark.simulate_series(7), tmp_path, "log", steps=400)
    assert found["model"] < 0.9 * min(found["next lower dose"], found["next higher dose"]), found
