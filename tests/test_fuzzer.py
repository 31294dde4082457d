"""The program that damages files: it reads whole ones, damages the others, and sees what goes wrong."""

import fuzz
import numpy as np
import pytest


def test_damage_changes_files_and_is_the_same_for_a_seed():
    whole = bytes(range(256)) * 4
    made = [fuzz.damaged(whole, np.random.default_rng(seed)) for seed in range(50)]
    assert sum(one != whole for one in made) > 45 and len(set(made)) > 45
    assert made == [fuzz.damaged(whole, np.random.default_rng(seed)) for seed in range(50)]


@pytest.mark.parametrize(
    "read, wrong",
    [
        ("pass", None),
        ("raise ValueError('no')", None),
        ("raise AttributeError('oh')", "AttributeError: oh"),
        ("import os; os.kill(os.getpid(), 9)", "died of SIGKILL"),
        ("bytearray(1 << 40)", "MemoryError"),
        ("import time; time.sleep(60)", "took more than 1 s"),
    ],
)
def test_wrong_behaviour_of_a_reader_is_found(tmp_path, monkeypatch, read, wrong):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    found = fuzz.attempt(lambda path: exec(read), tmp_path, tmp_path / "output")
    assert found is None if wrong is None else wrong in found


@pytest.mark.slow
def test_ten_seconds_of_it_find_nothing(tmp_path):
    tried, findings = fuzz.fuzz(10, 0, tmp_path / "found")
    assert tried > 50 and findings == 0, [path.read_text() for path in (tmp_path / "found").glob("*.txt")]
