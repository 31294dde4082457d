"""
Outputs of commands: a file or a folder that is replaced whole or not at all, only where that is asked for, and by one
process at a time.

A folder is written beside its place. Where nothing is there, it is renamed. A folder that holds an older output is swapped with
it in one step of the system. Where there is no such step (other systems, some network disks, a folder that is a mount
point), the new files lie in the folder under one name, and move into their places from there; the next start finishes a
move that was cut short.
"""

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pertstate.base.files import PARTIAL, partial_of, place_of_file, saying_disk_errors
from pertstate.base.locks import locked
from pertstate.base.messages import some


# A whole new output inside the folder that it is for, and in it the list of its entries.
JOURNAL, _ENTRIES = ".new", ".entries"
_LOCK = ".lock"
# What is still being written, see [`partial_of`].
_LEFT = re.compile(rf"\.(?P<name>.+)\.\d+-[0-9a-f]{{8}}{re.escape(PARTIAL)}", re.DOTALL)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Errors where two folders cannot be swapped, or files cannot be linked: the system lacks it, the output is not at fault.
_NO_SWAP = (
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK),
    *(errno.EROFS, errno.ENOENT),
)


@contextmanager
def claimed_file(path: str | os.PathLike, overwrite: bool) -> Iterator[Path]:
    """
    In this block nobody else writes the file `path`; what killed processes left of it is removed. Yields its place, with
    symbolic links followed, for [`whole_file`].

    Raises:
        FileExistsError: the file exists, and is not to be overwritten.
        FileNotFoundError: there is no folder to write it to.
        ValueError: there is something that is no regular file.
        InUseError: another process writes it.
    """
    place = place_of_file(path)
    _check_parent(path, place)
    _check_overwrite(path, place.exists(), overwrite)
    with locked(place.with_name(f".{place.name}{_LOCK}"), path):
        _check_overwrite(path, place.exists(), overwrite)
        _remove_left(place.parent, place.name)
        yield place


def check_apart(**outputs: str | os.PathLike | None):
    """
    Check that the outputs of one command have different places; None is no output.

    Raises:
        ValueError: two would be written to one place; their names are said.
    """
    owners: dict[str, str] = {}
    for name, path in outputs.items():
        other = name if path is None else owners.setdefault(os.path.realpath(path), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} are both {path}: expected two outputs, found one; name another for one of them"
            )


@dataclass(frozen=True)
class Kind:
    """
    What a folder holds.

    Args:
        name (`str`): in words, with its article.
        keys (`tuple[str, ...]`): the folder holds one only if one of these files is there. It is the last that is written.
        is_own (`Callable[[str], bool]`): whether an entry of this name is a part of it. All others stay in the folder when
            it is replaced.
    """

    name: str
    keys: tuple[str, ...]
    is_own: Callable[[str], bool]

    def is_in(self, folder: Path) -> bool:
        return any((folder / key).exists() for key in self.keys)


@contextmanager
def claimed_folder(path: str | os.PathLike, kind: Kind, overwrite: bool) -> Iterator[Path]:
    """
    In this block nobody else writes the folder `path`; what killed processes left of it is removed, and a move that was cut
    short is finished. Yields its place, with symbolic links followed, for [`whole_folder`].

    Raises:
        FileExistsError: the folder is not empty, and is not to be overwritten; or what is there is not of this kind.
        FileNotFoundError: there is no folder to write it to.
        ValueError: there is something that is no folder.
        InUseError: another process writes it.
    """
    with _folder_in_use(path, kind) as place:
        there = [] if not place.is_dir() else [entry.name for entry in place.iterdir() if not _is_ours(entry.name)]
        if there and overwrite and not kind.is_in(place):
            raise FileExistsError(
                f"{path} is not empty and holds no {kind.name}, so overwrite does not replace it: expected {kind.keys[0]}, "
                f"found {some(sorted(there), 3)}; name another folder"
            )
        if there and not overwrite:
            raise FileExistsError(
                f"{path} exists and is not an empty folder; name a new one, or replace it with --overwrite (overwrite=True)"
            )
        yield place


@contextmanager
def _folder_in_use(path: str | os.PathLike, kind: Kind) -> Iterator[Path]:
    place = Path(os.path.realpath(path))
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ValueError(f"{path} is a file; name a folder to write")
    _check_parent(path, place)
    beside = _beside(place)
    with locked(beside / (_LOCK if beside == place else f".{place.name}{_LOCK}"), path):
        _remove_left(beside, place.name)
        if place.is_dir():
            _remove_left(place, kind.is_own)
        _finish(place, kind)
        yield place


@contextmanager
def claimed_run(path: str | os.PathLike, kind: Kind) -> Iterator[Path]:
    """As [`claimed_folder`], of a folder that may hold anything, and whose parents are made where they are missing."""
    place = Path(os.path.realpath(path))
    # If `path` is a link that leads nowhere yet, the folder that it names is made: making `path` itself would fail.
    (place if Path(path).is_symlink() and not place.exists() else place.parent).mkdir(parents=True, exist_ok=True)
    with _folder_in_use(path, kind) as place:
        yield place


@contextmanager
def whole_folder(path: str | os.PathLike, kind: Kind) -> Iterator[Path]:
    """
    An empty folder to write, which becomes `path` when the block ends without error. Entries of `path` that are not of its kind
    stay. A full disk, an error or a kill at any moment leaves what was there, or the new folder, and no mixture.

    Raises:
        OSError: the disk is full, or cannot be written; see [`saying_disk_errors`].
    """
    place = Path(os.path.realpath(path))
    beside = _beside(place)
    scratch = partial_of(beside / place.name)
    scratch.mkdir()
    try:
        with saying_disk_errors(path):
            yield scratch
            _put(scratch, place, kind)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Where this block makes a folder and puts nothing into it, the folder is removed."""
    existed = folder.exists()
    try:
        yield
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _put(scratch: Path, place: Path, kind: Kind):
    """Move a whole new folder to its place."""
    if not place.exists():
        os.rename(scratch, place)
        return
    if kind.is_in(place) and _swap(scratch, place, kind):
        return
    names = sorted(entry.name for entry in scratch.iterdir())
    (scratch / _ENTRIES).write_text(json.dumps(names), encoding="utf-8")
    key = next(name for name in kind.keys if name in names)
    os.replace(scratch / key, scratch / (key + PARTIAL))
    os.rename(scratch, place / JOURNAL)
    _finish(place, kind)


def _finish(place: Path, kind: Kind):
    """Move the entries of a new output in `JOURNAL` to their places in the folder; a move that was cut short goes on."""
    new = place / JOURNAL
    if not (new / _ENTRIES).exists():
        shutil.rmtree(new, ignore_errors=True)
        return
    names = json.loads((new / _ENTRIES).read_text(encoding="utf-8"))
    key = next(name for name in kind.keys if name in names)
    # The key has another name until all else is moved, so that nobody takes `JOURNAL` for an output.
    hidden = new / (key + PARTIAL)
    if hidden.exists():
        # Without its key the folder counts as empty: it holds neither the old output nor the new one.
        for old in kind.keys:
            (place / old).unlink(missing_ok=True)
        for entry in [*place.iterdir()]:
            if kind.is_own(entry.name) and entry.name not in names:
                _remove(entry)
        for name in names:
            if name != key and (new / name).exists():
                if (place / name).is_dir():
                    _remove(place / name)
                os.replace(new / name, place / name)
        os.replace(hidden, place / key)
    # Only the list of entries is left.
    shutil.rmtree(new)


def _swap(scratch: Path, place: Path, kind: Kind) -> bool:
    """
    Swap two folders in one step; `scratch` then holds the old output. Entries that are not of the kind are first linked into
    `scratch`, so both folders have them. False where the system cannot swap; `place` is then as it was.
    """
    if scratch.parent == place or Path.cwd().is_relative_to(place):
        return False  # the shell that is in the old folder would be left in a folder that is gone
    carried = []
    try:
        for entry in place.iterdir():
            if not kind.is_own(entry.name) and not (scratch / entry.name).exists():
                carried.append(scratch / entry.name)
                _link(entry, scratch / entry.name)
        shutil.copystat(place, scratch)
        _exchange(scratch, place)
    except OSError as error:
        if error.errno not in _NO_SWAP:
            raise
        for entry in carried:
            if entry.is_symlink() or entry.exists():
                _remove(entry)
        return False
    # What came into the old folder meanwhile.
    for entry in [*scratch.iterdir()]:
        if not kind.is_own(entry.name) and not (place / entry.name).exists():
            os.rename(entry, place / entry.name)
    return True


def replace_folder(new: Path, place: Path):
    """
    Rename a folder to `place`. If a folder is there, the two are swapped in one step, where the system can do so: the old one
    is then at `new`. Otherwise the old one is renamed first, so that a kill in between leaves both, under other names.
    """
    if place.exists():
        try:
            _exchange(new, place)
            return
        except OSError as error:
            if error.errno not in _NO_SWAP:
                raise
        os.rename(place, new.with_name(f"{new.name}-replaced"))
    os.rename(new, place)


def _link(old: Path, new: Path):
    """A second name for a file, or for each file of a folder."""
    if old.is_symlink() or not old.is_dir():
        os.link(old, new, follow_symlinks=False)
        return
    new.mkdir()
    for entry in old.iterdir():
        _link(entry, new / entry.name)
    shutil.copystat(old, new)


@cache
def _renameat2():
    """The system's call that swaps two names; None where there is none (other systems than Linux, old libraries)."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _exchange(one: Path, other: Path):
    call = _renameat2()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


def _beside(place: Path) -> Path:
    """Where what belongs to a folder is written: beside it, or in it where that cannot be."""
    within = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    return place if within else place.parent


def _remove(entry: Path):
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _is_ours(name: str) -> bool:
    """Whether a name in an output folder is one that only this module gives."""
    return name in (JOURNAL, _LOCK) or name.endswith(PARTIAL)


def discard(path: Path, output: Path):
    """
    Remove a file or folder that belongs to the output `output`, whose lock is held. First its name goes: a kill leaves all of it or
    nothing under this name, and the next process that claims the output removes the rest.
    """
    if path.exists():
        doomed = partial_of(_beside(output) / output.name)
        os.rename(path, doomed)
        _remove(doomed)


def _remove_left(folder: Path, of: str | Callable[[str], bool]):
    """
    Remove what processes that were killed were writing in a folder: to the output of the name `of`, or to files for whose names `of`
    is true. Nobody else may be writing these.
    """
    for entry in [*folder.iterdir()]:
        found = _LEFT.fullmatch(entry.name)
        if found is not None and (found["name"] == of if isinstance(of, str) else of(found["name"])):
            _remove(entry)


def _check_parent(path: str | os.PathLike, place: Path):
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"{path}: there is no folder {Path(path).parent}; make it first, or name another output"
        )


def _check_overwrite(path: str | os.PathLike, exists: bool, overwrite: bool):
    if exists and not overwrite:
        raise FileExistsError(f"{path} exists; name another output, or replace it with --overwrite (overwrite=True)")


__all__ = [
    "JOURNAL",
    "Kind",
    "check_apart",
    "claimed_file",
    "claimed_folder",
    "claimed_run",
    "discard",
    "replace_folder",
    "whole_folder",
]
