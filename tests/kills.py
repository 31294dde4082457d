"""Kills at chosen moments of a piece of work: before lines of modules, or before changes of files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def killed_at_each_line(work: Callable, check: Callable, *modules) -> int:
    """
    Do `work` in forks, again and again. The first is killed before the first line that it reaches in `modules`, the second
    before the second line, and so on, until one ends by itself. `check` looks at what each left. Returns the number of kills.
    """
    files = {module.__file__ for module in modules}
    return _killed(work, check, lambda moments: sys.settrace(_tracer(files, moments)), 1)


def killed_at_each_change(work: Callable, check: Callable, folder: Path, stride: int = 1) -> int:
    """The same before every `stride`-th change below `folder`: a file opened for writing, or anything made, renamed, removed."""
    return _killed(work, check, lambda moments: sys.addaudithook(_auditor(str(folder), moments)), stride)


def _killed(work: Callable, check: Callable, arm: Callable[[int], None], stride: int) -> int:
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                arm(kills * stride)
                work()
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), "the work failed"
        check()
        if code == 0:
            return kills
        kills += 1


def _tracer(files: set[str], moments: int) -> Callable:
    left = moments

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            if left == 0:
                os._exit(9)
            left -= 1
        return trace

    return trace


def _auditor(folder: str, moments: int) -> Callable:
    left = moments

    def audit(event: str, args: tuple):
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")
        changes = changes or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR)))
        if changes and str(args[0]).startswith(folder):
            if left == 0:
                os._exit(9)
            left -= 1

    return audit
