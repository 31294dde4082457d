"""Texts of others: what is no file, too large, no text, or says something twice is one error in no time."""

import os
import time

import pytest

from pertstate.base.bounded_text import load_json, parse_json, read_text


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate(10**9)
    for read in (read_text, load_json):
        start = time.perf_counter()
        with pytest.raises(ValueError, match="big.json has 1,000,000,000 bytes, expected at most 67,108,864; copy"):
            read(tmp_path / "big.json")
        assert time.perf_counter() - start < 0.5


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for read in (read_text, load_json):
        with pytest.raises(ValueError, match="expected a file, found a pipe"):
            read(tmp_path / "pipe.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("9" * 10_000, "Exceeds the limit"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands in it twice"),
        ("{" + ",".join(f'"{i}": 0' for i in range(300_000)) + ', "299999": 1}', "'299999' stands in it twice"),
        ('{"' + "a" * 10**6 + '": 1, "' + "a" * 10**6 + '": 2}', "stands in it twice"),
        ("", "Expecting value"),
        ("\ud800", "Expecting value"),
    ],
)
def test_json_that_is_not_whole_is_one_error_in_no_time(text, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert time.perf_counter() - start < 2 and len(str(caught.value)) < 300


def test_what_is_whole_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert load_json(tmp_path / "a.json") == {"ä": [1, None]} and read_text(tmp_path / "a.json").startswith('{"ä"')
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"a.json is not a whole JSON file \('utf-8' codec .*; make it again"):
        load_json(tmp_path / "a.json", advice="make it again")
    with pytest.raises(ValueError, match="a.json is no text in UTF-8"):
        read_text(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "gone")
