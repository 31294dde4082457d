"""Files that appear whole or not at all: each is written beside its place and then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# What the name of anything that is still being written ends with.
PARTIAL = ".partial"


def partial_of(path: str | os.PathLike) -> Path:
    """Where a file or folder is written before it is renamed to `path`."""
    path = Path(path)
    return path.with_name(path.name + PARTIAL)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    The path of a file to write, which is renamed to `path` when the block ends without error. After an error, a full
    disk for instance, `path` is as it was and the other file is gone.

    Example:
    ```python
    with whole_file("table.csv") as partial:
        table.to_csv(partial)
    ```
    """
    partial = partial_of(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["PARTIAL", "partial_of", "whole_file"]
