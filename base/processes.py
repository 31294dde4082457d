"""Processes that work for this one: forked from one that has made its imports, and ended with this one."""

import inspect
import os
import signal
import sys
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from threading import Thread

from pertstate.base.messages import given


def with_imports(*modules: str) -> BaseContext:
    """
    How processes are started. This process is not forked, as the threads of Arrow and of torch do not survive a fork. A process that
    has imported `modules` and computes nothing is forked instead; where a system has no such thing, each process starts by itself.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def _outlive_signals_to_all():
    """
    Let the process that forks others outlive a SIGTERM that a scheduler or `timeout` sends to all processes of a group (it ignores
    SIGINT by itself): with it this one would lose those that it forked, which end in their own way. They hear the signal.
    """
    server = os.getpid()

    def hear():
        if os.getppid() == server:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.register_at_fork(after_in_child=hear)


def _forks_others() -> bool:
    """Whether this process is the one that multiprocessing starts to fork others, and not one that it forked, which has its arguments."""
    if not any("multiprocessing.forkserver import main" in word for word in sys.orig_argv):
        return False
    from multiprocessing.forkserver import get_inherited_fds

    return get_inherited_fds() is None


if _forks_others():
    _outlive_signals_to_all()


def end_with_parent():
    """Let this process end when the one that it works for has ended, however that ended."""

    def wait():
        given("a parent", parent_process()).join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def how_it_ended(code: int, said: str) -> str:
    """
    Why a process failed, in a line.

    Args:
        code (`int`): its exit code, a signal's number with a minus where a signal ended it.
        said (`str`): what it said; the last line is that of its error.
    """
    if code < 0:
        memory = "; systems do so where memory runs out" if code == -signal.SIGKILL else ""
        return f"its process was ended by signal {-code} ({signal.strsignal(-code)}){memory}"
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"its process ended with code {code} before it began. {_UNGUARDED}"


def check_guarded():
    """
    Call before processes are started. A script of Python is run again by each process that works for it, up to what stands under
    `if __name__ == "__main__":`; that run must not start processes in turn.

    Raises:
        ChildProcessError: this process is such a one, and runs the script again.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "__mp_main__":  # as multiprocessing names the script there
            raise ChildProcessError(_UNGUARDED)
        frame = frame.f_back


class LostProcessError(ChildProcessError):
    """A process that worked for this one ended without a result."""

    def __init__(self):
        super().__init__(
            "a process that worked for this one ended without a result. Was it killed, as happens where memory runs out? Then use "
            f"fewer processes. {_UNGUARDED}"
        )


_UNGUARDED = "A script that starts processes must keep its calls under `if __name__ == '__main__':`"
