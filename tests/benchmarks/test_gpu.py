"""The benchmark of a GPU runs on a CPU, in small."""

from pathlib import Path

import pytest
from launches import run


@pytest.mark.slow
def test_the_tables_are_printed():
    program = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    words = [program, "--device", "cpu", "--small", "--parts", "precision", "losses", "steps", "runs", "batches"]
    printed = run(words).stdout
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[:1] == ["tiny"] for row in rows) == 4
    assert [row[0] for row in rows if row[2:3] == ["x"]] == ["memory", "store"] * 3
    assert len([row for row in rows if row[-1:] and row[0].startswith("(2,")]) == 3  # precision twice, losses once
