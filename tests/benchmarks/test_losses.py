"""The benchmark of the losses runs, in small."""

from pathlib import Path

import pytest
from launches import run


@pytest.mark.slow
def test_the_table_is_printed():
    program = Path(__file__).parents[2] / "benchmarks" / "losses.py"
    rows = [line.split() for line in run([program, "--small", "--repeat", "1"]).stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == ["energy", "energy", "sinkhorn", "sinkhorn"]
    # Geomloss rounds small distances up.
    assert all(float(row[-1]) < 1e-2 for row in rows[2:])
