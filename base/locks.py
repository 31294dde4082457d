"""Locks of outputs: two processes do not write one file or one folder, and the second is told who the first is."""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pertstate.base.files import saying_disk_errors
from pertstate.base.printable import get_logger


logger = get_logger(__name__)

# So many bytes are read of a lock's file, which says what process holds the lock.
_LONGEST = 4096


class InUseError(OSError):
    """Another process is writing an output; the message names it."""


# A child that was being forked when the process died holds the lock until it runs; so many seconds are given to it.
_PATIENCE = 5.0

# The errors of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

# The locks of this process, by their files: the descriptor, the thread, and how often the thread has entered.
_held: dict[Path, list] = {}
_guard = threading.Lock()


@contextmanager
def locked(lock: Path, output: str | os.PathLike) -> Iterator[None]:
    """
    Hold the lock whose file is `lock`, which is beside or in `output`. The system releases it when the process ends, however
    it ends. A thread may enter again what it holds.

    Raises:
        InUseError: another process holds it, or another thread of this one; it is named.
        OSError: the file cannot be made, as the disk is full for instance; nothing is left of it.
    """
    with _guard:
        mine = _held.get(lock)
        if mine is None:
            try:
                with saying_disk_errors(output):
                    descriptor = _acquire(lock, output)
            except PermissionError as error:
                # The folder is what the user knows of.
                raise PermissionError(error.errno, error.strerror, str(lock.parent)) from error
            _held[lock] = mine = [descriptor, threading.get_ident(), 0]
        elif mine[1] != threading.get_ident():
            raise InUseError(_in_use(output, _about_me()))
        mine[2] += 1
    try:
        yield
    finally:
        with _guard:
            mine[2] -= 1
            if mine[2] == 0:
                del _held[lock]
                # The file goes before the lock is released: a process that opened it meanwhile notices, see `_acquire`.
                lock.unlink(missing_ok=True)
                os.close(mine[0])


def _acquire(lock: Path, output: str | os.PathLike) -> int:
    until = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        mine = False
        try:
            _lock(descriptor, output)
            with suppress(FileNotFoundError):
                # The file may have been removed, and made anew by another process, since it was opened.
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    _say_who(descriptor, lock)
                    mine = True
                    return descriptor
        except BlockingIOError:
            about = _read(descriptor)
            if not _has_died(about) or time.monotonic() > until:
                raise InUseError(_in_use(output, about)) from None
            time.sleep(0.01)
        finally:
            if not mine:
                os.close(descriptor)


def _has_died(about: dict[str, Any]) -> bool:
    """Whether a process that said that it holds a lock is no longer on this machine."""
    if about.get("host") != socket.gethostname() or not isinstance(about.get("pid"), int) or about["pid"] <= 0:
        return False
    try:
        os.kill(about["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # somebody else's
    return False


def _lock(descriptor: int, output: str | os.PathLike):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            f"{output}: its disk has no locks ({error.strerror}); see to it that one process alone writes it"
        )


def _say_who(descriptor: int, lock: Path):
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_about_me()).encode())
    except BaseException:
        lock.unlink(missing_ok=True)
        raise


def _close_in_child():
    """A forked child must not hold the locks of a parent that dies."""
    for descriptor, *_ in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _about_me() -> dict[str, Any]:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": now}


def _command() -> str:
    """The words that started this process, without tokens."""
    words, secret = [Path(sys.argv[0]).name or "python"], False
    for word in sys.argv[1:]:
        name, has_value, _ = word.partition("=")
        flag = word.startswith("-") and "token" in name
        words.append("***" if secret and not word.startswith("-") else f"{name}=***" if flag and has_value else word)
        secret = flag and not has_value
    return shlex.join(words)[:300]


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, _LONGEST, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _in_use(output: str | os.PathLike, about: dict[str, Any]) -> str:
    said = {name: "".join(c for c in str(value) if c.isprintable()) for name, value in about.items()}
    who = "another process"
    if {"pid", "host", "command", "since"} <= said.keys():
        who = f"process {said['pid']} on {said['host']} ({said['command']}), since {said['since']}"
    return f"{output} is being written by {who}; wait for it, stop it, or name another output"


__all__ = ["InUseError", "locked"]
