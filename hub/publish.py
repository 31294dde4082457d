"""Writing a checkpoint folder so that it is whole or is no checkpoint at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Without this file a folder does not load, so it goes last and is taken away first.
_KEY = "config.json"
_HIDDEN_KEY = "config.json.partial"


def hide(folder: str | os.PathLike):
    """Make a folder that is still being written not loadable as a checkpoint."""
    os.replace(Path(folder, _KEY), Path(folder, _HIDDEN_KEY))


def reveal(folder: str | os.PathLike):
    """Undo [`hide`]: the folder is whole."""
    os.replace(Path(folder, _HIDDEN_KEY), Path(folder, _KEY))


@contextmanager
def whole_or_nothing(target: str | os.PathLike) -> Iterator[Path]:
    """
    A scratch folder inside `target`; what is written to it moves into `target` when the block ends without error.

    A full disk or a kill at any moment leaves in `target` the old checkpoint, or the new one, or a folder that does
    not load; never a mixture of old and new, or a part.
    """
    target = Path(target)
    scratch = target / ".partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        hide(scratch)
        Path(target, _KEY).unlink(missing_ok=True)
        for entry in sorted(scratch.iterdir()):
            if entry.name != _HIDDEN_KEY:
                os.replace(entry, target / entry.name)
        os.replace(scratch / _HIDDEN_KEY, target / _KEY)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
