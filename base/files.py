"""Files that appear whole or not at all: each is written beside its place and then renamed."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# The ending of the name of a file or folder that is still being written.
PARTIAL = ".partial"

# A disk that is full or fails, or a limit on the size of files. Libraries that raise errors without a number put the text of
# one of these into the message.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_UNNAMED, _NOTHING_LEFT = -1, "nothing is left of it"
# torch says of a failed write that it failed, and not why.
_TORCH_FAILED = ("PytorchStreamWriter failed", "inline_container", "unexpected pos")


def partial_of(path: str | os.PathLike) -> Path:
    """Where a file or folder is written before it is renamed to `path`: beside it, with a name that nobody else has."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def place_of_file(path: str | os.PathLike) -> Path:
    """
    Where a file named `path` is written: symbolic links are followed, so that they stay links.

    Raises:
        ValueError: something is there that is no regular file: a folder, a device, a pipe, a socket.
        OSError: the links lead in a circle.
    """
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if place.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write")
    # The links of /dev/stdout lead to a pipe that has no name.
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is no regular file but a device, a pipe or a socket; name a file to write")
    return place


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    The path of a file to write, which is renamed to `path` when the block ends without error. After an error, a full
    disk for instance, `path` is as it was and the other file is gone.

    Raises:
        ValueError: see [`place_of_file`].
        OSError: the disk is full, or cannot be written; see [`saying_disk_errors`].

    Example:
    ```python
    with whole_file("table.csv") as partial:
        table.to_csv(partial)
    ```
    """
    place = place_of_file(path)
    partial = partial_of(place)
    try:
        with saying_disk_errors(path):
            yield partial
            share(partial)
            os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def share(path: str | os.PathLike):
    """
    Give a file, or the weights in a folder, the rights that new files have here. safetensors writes files that only their owner
    may read.
    """
    path = Path(path)
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        if file.stat().st_mode & 0o077:
            continue
        new = partial_of(file)
        with open(new, "x") as opened:
            rights = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
        new.unlink()
        os.chmod(file, rights)


@contextmanager
def saying_disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """
    Errors of the disk in this block, which libraries raise in forms of their own (safetensors, torch), become an `OSError`
    that names `path` and says that nothing is left of it. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        if isinstance(error, OSError) and _NOTHING_LEFT in str(error.strerror):
            message = error.strerror  # about one file of a folder; the new error names the folder instead
        else:
            why = (
                "the disk is full, or a limit on the size of files is met"
                if number == _UNNAMED
                else os.strerror(number)
            )
            message = f"cannot be written, {_NOTHING_LEFT}: {why}"
        raise OSError(errno.ENOSPC if number == _UNNAMED else number, message, str(path)) from error


def _disk_error(error: BaseException) -> int | None:
    """The number of an error of the disk; None where it is another error."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return error.errno
    if isinstance(error, OSError) and error.errno is not None:
        return None
    text = str(error)
    for number in _FULL:
        if os.strerror(number) in text:
            return number
    if isinstance(error, RuntimeError) and any(said in text for said in _TORCH_FAILED):
        return _UNNAMED
    return None


__all__ = ["PARTIAL", "partial_of", "place_of_file", "saying_disk_errors", "share", "whole_file"]
