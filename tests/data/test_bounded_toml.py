"""TOML that would take a machine minutes is refused in no time; that of people is read."""

import time

import pytest

from pertstate.data.bounded_toml import load_toml
from pertstate.data.splits import Splits


BOMBS = {
    "a dotted key": ".".join(["a"] * 100_000) + " = 1",
    "a dotted key in quotes": " . ".join(['"a b"', "'c'"] * 50_000) + " = 1",
    "a dotted header": "x = 1\n[" + ".".join(["a"] * 100_000) + "]",
    "arrays in arrays": "a = " + "[" * 100_000,
    "tables in tables": "a = " + "{a=" * 100_000,
    "a number": "a = " + "9" * 100_000,
    "a file of a gigabyte": None,
    "a text of another encoding": b"\xff\xfea = 1",
}


@pytest.mark.parametrize("read", [load_toml, Splits.from_toml])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_one_error_in_no_time(tmp_path, name, read):
    path, bomb = tmp_path / "splits.toml", BOMBS[name]
    if bomb is None:
        with open(path, "wb") as file:
            file.truncate(10**9)
    else:
        path.write_bytes(bomb if isinstance(bomb, bytes) else bomb.encode())
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        read(path)
    assert time.perf_counter() - start < 2
    assert str(caught.value).startswith(f"{path} ") and len(str(caught.value)) < 400, str(caught.value)[:1000]


def test_long_lines_without_long_names_are_searched_in_no_time(tmp_path):
    for text in ("a" * 900_000, '"' * 900_000, "'a" * 450_000, "a " * 450_000, "-." * 450_000, "a.b " * 200_000):
        (tmp_path / "splits.toml").write_text(f"# {text}")
        start = time.perf_counter()
        try:
            load_toml(tmp_path / "splits.toml")
        except ValueError as error:
            assert "more than 50 parts" in str(error)
        assert time.perf_counter() - start < 2, text[:4]


def test_toml_of_people_is_read(tmp_path):
    (tmp_path / "splits.toml").write_text('a.b."c.d" = "x.y.z/1.2.3"\n[e]\nf = [1.5, "g"]\n')
    assert load_toml(tmp_path / "splits.toml") == {"a": {"b": {"c.d": "x.y.z/1.2.3"}}, "e": {"f": [1.5, "g"]}}
