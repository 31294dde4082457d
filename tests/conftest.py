import os
from pathlib import Path

import pytest
import torch


SHARED = Path(os.environ.get("CELLSTATE_SHARED", Path(__file__).parents[1] / "../shared")).resolve()

# Tiny tensors on several threads spend their time waiting for one another.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """A clone without the reference data leaves out the tests that read it, and says so in one line."""
    if SHARED.is_dir():
        return
    left_out = [item for item in items if item.get_closest_marker("shared")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("shared")]
        config.hook.pytest_deselected(items=left_out)
        config._cellstate_left_out = len(left_out)


def pytest_terminal_summary(terminalreporter, config):
    count = getattr(config, "_cellstate_left_out", 0)
    if count:
        terminalreporter.write_line(f"{count} tests that read reference data were left out: no folder {SHARED}")


@pytest.fixture
def shared() -> Path:
    """The folder of reference outputs and real data."""
    return SHARED
