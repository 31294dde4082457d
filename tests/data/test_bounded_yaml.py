"""YAML with merges of merges is refused at once."""

import time

import pytest

from pertstate.legacy.folder import _read_config
from pertstate.training.run_config import _read


BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n  y{i}: 1\n" for i in range(1, 12)
)


@pytest.mark.parametrize("read", [_read, _read_config])
def test_merges_of_merges_are_refused(tmp_path, read):
    path = tmp_path / "config.yaml"
    path.write_text(BOMB)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="more than 10,000 entries"):
        read(path)
    assert time.perf_counter() - start < 5


def test_merges_of_everyday_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {x: 1, y: 2}\ndata:\n  <<: *base\n  y: 3\n")
    assert _read_config(path)["data"] == {"x": 1, "y": 3}
