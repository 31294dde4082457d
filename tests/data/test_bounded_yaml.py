"""YAML that would grow far beyond its size, or take long, is refused in no time; that of people is read."""

import time

import pytest

from pertstate.legacy.folder import _read_config
from pertstate.training.run_config import load_run_config, read_sections


def merges(number: int) -> str:
    """Each mapping merges nine times the one before."""
    lines = (f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n  y{i}: 1\n" for i in range(1, number))
    return "a0: &a0 {x: 1}\n" + "".join(lines)


def laughs(number: int) -> str:
    """Each list holds nine times the one before."""
    lines = (f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, number))
    return "a0: &a0 [x, x]\n" + "".join(lines)


READERS = {"run": read_sections, "legacy": _read_config}
BOMBS = {
    "merges of merges": (merges(12), "more than 10,000 entries"),
    "lists of lists": ("data:\n  " + laughs(12).replace("\n", "\n  "), "more than 1,000,000 values"),
    "a list in itself": ("data: &a [*a]", "holds itself|unknown section|recursive"),
    "brackets": ("data: " + "[" * 100_000, "more than 50 deep"),
    "braces": ("data: " + "{a: " * 100_000, "more than 50 deep"),
    "dashes": ("data:\n" + "- " * 100_000, "more than 50 deep"),
    "question marks": ("? " * 100_000, "more than 50 deep"),
    "a list as a key": ("data: {[a]: 1}", "unhashable key"),
    "a file of a gigabyte": (None, "has 1,000,000,000 bytes, expected at most 1,000,000"),
    "a text of another encoding": (b"\xff\xfed\0", "no text in UTF-8"),
    "a character that is none": ("data: \0", "not valid YAML"),
}
# What the loader of a run does not know as words of any other kind.
TAGS = {
    "base 60": ("!!int", ":".join(["59"] * 100_000)),
    "a number": ("!!int", "9" * 100_000),
    "no number": ("!!int", "''"),
    "no truth": ("!!bool", "perhaps"),
    "no date": ("!!timestamp", "2020-13-45"),
    "no float": ("!!float", "x"),
    "code": ("!!python/object/apply:os.system", "[ls]"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_one_error_in_no_time(tmp_path, name, reader):
    path, (bomb, message) = tmp_path / "config.yaml", BOMBS[name]
    if bomb is None:
        with open(path, "wb") as file:
            file.truncate(10**9)
    else:
        path.write_bytes(bomb if isinstance(bomb, bytes) else bomb.encode())
    refused(path, READERS[reader], message)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", TAGS)
def test_words_that_say_of_what_kind_they_are(tmp_path, name, reader):
    (tmp_path / "config.yaml").write_text(f"data: {{x: {' '.join(TAGS[name])}}}\nmodel: {{}}")
    refused(tmp_path / "config.yaml", READERS[reader], "not valid YAML")


def test_a_time_of_the_day_with_many_parts_is_no_endless_number(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {x: " + "59:" * 100_000 + "59}\nmodel: {}")
    refused(tmp_path / "config.yaml", _read_config, "a number has 300,002 characters")
    assert len(read_sections(tmp_path / "config.yaml")["data"]["x"]) == 300_002  # a word, for its field to refuse


def refused(path, read, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert time.perf_counter() - start < 5
    assert str(caught.value).startswith(f"{path}") and len(str(caught.value)) < 600


def test_the_time_grows_with_the_size_alone(tmp_path):
    """Of the many ways to fill a file, those with the most words: a megabyte takes less than a minute."""
    for line in ("- a\n", "- {}\n", "- !!str a\n", "- &a b\n", "- *a\n", "? a\n", "- 'a'\n", "- [a,b,c,d,e]\n"):
        text = "data:\n- &a b\n" + line * (30_000 // len(line))
        (tmp_path / "config.yaml").write_text(text)
        start = time.perf_counter()
        try:
            read_sections(tmp_path / "config.yaml")
        except ValueError:
            pass
        assert time.perf_counter() - start < 5, line


def test_yaml_of_people_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {x: 1, y: 2.5}\ndata:\n  <<: *base\n  y: 1e-4\n  z: [*base, yes]\n")
    assert _read_config(path)["data"] == {"x": 1, "y": "1e-4", "z": [{"x": 1, "y": 2.5}, True]}
    path.write_text(
        "data:\n  datasets: &a {a: x.h5ad}\n  test_contexts: ['k', 1]\ntraining: {max_steps: 3, lr: 1e-4}\n"
    )
    run = load_run_config(str(path), [])
    assert run.data.datasets == {"a": "x.h5ad"} and run.data.test_contexts == ["k", "1"]
    assert run.training == {"max_steps": 3, "lr": 1e-4}
