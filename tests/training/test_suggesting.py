"""Values that optuna suggests from lists and ranges."""

import pytest

from pertstate.training.suggesting import Range, range_of, search


def test_ranges_are_read_as_written():
    assert range_of("1e-5..1e-3:log") == Range(1e-5, 1e-3, True)
    assert range_of("-2..0.5") == Range(-2, 0.5, False)
    assert range_of("8..64:log") == Range(8, 64, True) and isinstance(range_of("8..64:log").low, int)
    assert range_of("0.1") is None and range_of("a,b") is None and range_of("1e-4,1e-3") is None


@pytest.mark.parametrize(
    "text", ["1..1", "3..2", "0..1:log", "a..b", "1..", "..1", "1..inf", "1..nan", "1..2:lin", "1..2..3"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="expected LOW..HIGH or LOW..HIGH:log"):
        range_of(text)


@pytest.mark.optuna
@pytest.mark.parametrize("maximize", [False, True])
def test_it_comes_near_the_best_and_suggests_the_same_again(maximize):
    space = {"x": Range(1e-4, 1.0, True), "n": Range(1, 5, False), "kind": ["bad", "good"]}

    def value_of(setting):
        off = abs(float(setting["x"]) - 0.01) + abs(int(setting["n"]) - 3) + (setting["kind"] == "bad")
        return -off if maximize else off

    tried = search(space, 40, value_of, maximize)
    best = min(tried, key=value_of) if not maximize else max(tried, key=value_of)
    assert (best["n"], best["kind"]) == ("3", "good") and 0 < float(best["x"]) < 0.1
    assert all(1e-4 <= float(of["x"]) <= 1 and of["x"] == f"{float(of['x']):.4g}" for of in tried)
    assert search(space, 40, value_of, maximize) == tried
    begun = search(space, 10, value_of, maximize)
    assert 1 < len(begun) <= 10 and begun == tried[: len(begun)]
    # A setting without a figure does not end the search.
    assert len(search(space, 5, lambda setting: float("nan"), maximize)) == 5
