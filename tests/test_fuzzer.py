"""The program that damages files: it reads whole ones, damages the others, and sees what goes wrong."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fuzz
import numpy as np
import pytest
from marked import write_between_marks


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
    assert tried.total() > 50 and findings.total() == 0, [
        path.read_text() for path in (tmp_path / "found").glob("*.txt")
    ]


def test_the_table_of_a_run_is_put_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- files: start -->\nold\n<!-- files: end -->\nafter\n")
    write_between_marks(page, "files", fuzz.table(Counter(h5ad=1200, csv=3), Counter(h5ad=7), Counter(h5ad=1)))
    assert page.read_text().splitlines()[2:-2] == [
        "| reader | damaged blindly | guided by coverage | findings |",
        "|---|---:|---:|---:|",
        "| csv | 3 | 0 | 0 |",
        "| h5ad | 1,200 | 7 | 1 |",
        "| together | 1,203 | 7 | 1 |",
    ]
    with pytest.raises(ValueError, match="kills: start"):
        write_between_marks(page, "kills", "a table")


# A reader that goes wrong where four bytes stand one after another: chance finds these once in 4 billion files.
PLANTED = """
def read(path):
    data = path.read_bytes()
    if data[:1] == b"f":
        if data[1:2] == b"a":
            if data[2:3] == b"u":
                if data[3:4] == b"l":
                    raise AttributeError("found")
    raise ValueError("refused")
"""
GUIDED = """
import sys
from pathlib import Path
import atheris
with atheris.instrument_imports(include=["planted"]):
    import planted
import fuzz_guided
from fuzz_readers import Seed
folder = Path(sys.argv[1])
(folder / "seed").write_bytes(b"....")
fuzz_guided.run([Seed(folder / "seed", planted.read, "planted")], 240, folder / "found", 1, folder)
"""


@pytest.mark.guided
def test_the_guided_fuzzer_comes_where_chance_does_not(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "guided.py").write_text(GUIDED)
    paths = [str(tmp_path), str(Path(__file__).parent), *sys.path]
    said = tmp_path / "log"
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "guided.py"), str(tmp_path)],
            env={"PYTHONPATH": ":".join(paths), "PATH": "/usr/bin:/bin"},
            stdout=log,
            stderr=log,
        )
        # A busy machine takes several times as long.
        while process.poll() is None and "finding planted" not in said.read_text(errors="replace"):
            time.sleep(0.2)
        process.kill()
        process.wait()
    found = [path for path in (tmp_path / "found").glob("planted-*") if path.suffix != ".txt"]
    assert [path.read_bytes()[:4] for path in found] == [b"faul"], (tmp_path / "log").read_text(errors="replace")[
        -2000:
    ]
    assert "AttributeError: found" in found[0].with_suffix(".txt").read_text()
