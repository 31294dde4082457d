"""Writing a checkpoint folder so that it holds a whole checkpoint or none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pertstate.base.files import PARTIAL, partial_of


# A folder loads as a model, or as an adapter, only with one of these files in it. So it is the first that is taken away
# and the last that is put there.
MODEL_KEY, ADAPTER_KEY = "config.json", "adapter_config.json"


def _key_of(folder: str | os.PathLike, ending: str = "") -> str:
    return ADAPTER_KEY if Path(folder, ADAPTER_KEY + ending).exists() else MODEL_KEY


def hide(folder: str | os.PathLike):
    """Make a folder not loadable as a checkpoint while it is still being written."""
    key = _key_of(folder)
    os.replace(Path(folder, key), partial_of(Path(folder, key)))


def reveal(folder: str | os.PathLike):
    """Undo [`hide`]: the folder is whole."""
    key = _key_of(folder, PARTIAL)
    os.replace(partial_of(Path(folder, key)), Path(folder, key))


@contextmanager
def whole_or_nothing(target: str | os.PathLike) -> Iterator[Path]:
    """
    A scratch folder inside `target`. What is written to it moves into `target` when the block ends without error.

    A full disk or a kill at any moment leaves in `target` the old checkpoint, or the new one, or a folder that does
    not load. It never leaves a part, or a mixture of old and new.
    """
    target = Path(target)
    scratch = target / PARTIAL
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        key = _key_of(scratch)
        hide(scratch)
        for old in (MODEL_KEY, ADAPTER_KEY):
            Path(target, old).unlink(missing_ok=True)
        hidden = partial_of(scratch / key)
        for entry in sorted(scratch.iterdir()):
            if entry != hidden:
                os.replace(entry, target / entry.name)
        os.replace(hidden, target / key)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
