"""The benchmark of short sentences runs, in small."""

from pathlib import Path

import pytest
from launches import run


@pytest.mark.slow
def test_the_table_is_printed():
    program = Path(__file__).parents[2] / "benchmarks" / "short_sentences.py"
    small = ["--preset", "tiny", "--sentences", "5", "--cells", "12", "--genes", "20", "--steps", "2", "--repeat", "1"]
    rows = [line.split() for line in run([program, *small]).stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == ["whole", "packed", "by"]
    assert rows[2][-1] == "1.00"
