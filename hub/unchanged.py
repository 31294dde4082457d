"""Reading a folder while a training, a merge or another command may replace what it holds."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pertstate.hub.publish import is_own


_Read = TypeVar("_Read")
# A folder that is replaced while it is read is read again, so often.
_TRIES = 5


def state_of(folder: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """
    Which files of a checkpoint a folder holds, and which files these are: one that is replaced is another, whatever it says.
    Empty where there is no such folder.
    """
    folder = Path(folder)
    found: dict[str, tuple[int, ...]] = {}
    if not folder.is_dir():
        return found
    for entry in os.scandir(folder):
        if is_own(entry.name):
            about = os.stat(entry.path)
            found[entry.name] = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def read_unchanged(folder: str | os.PathLike, read: Callable[[], _Read]) -> _Read:
    """
    What `read` gives, of one state of a folder: files of an older checkpoint and of a newer one together would make a model
    that nobody trained.

    Raises:
        ValueError: the folder is replaced again and again.
        Any error of `read`.
    """
    for _ in range(_TRIES):
        before, error, found = _state(folder), None, None
        try:
            found = read()
        except Exception as wrong:  # noqa: BLE001 - of any library; raised again where the folder is as it was
            error = wrong
        if before is not None and _state(folder) == before:
            if error is not None:
                raise error
            return found  # type: ignore[return-value]
    raise ValueError(
        f"{folder} is being replaced again and again while it is read; wait until what writes it has ended"
    )


def _state(folder: str | os.PathLike) -> dict[str, tuple[int, ...]] | None:
    """[`state_of`]; None where a file went away meanwhile."""
    try:
        return state_of(folder)
    except FileNotFoundError:
        return None


def check_unchanged(folder: str | os.PathLike, before: dict[str, tuple[int, ...]]):
    """ValueError if a folder no longer holds the files that it held."""
    if state_of(folder) != before:
        raise ValueError(f"{folder} was replaced while it was read; run the command again")
