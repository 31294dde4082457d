"""A bound, in seconds, on a piece of work that reads what others made."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


# Where an error is caught on its way, the next comes after so many seconds more.
_AGAIN = 10.0


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """
    In this block, work that takes longer than `seconds` ends with an error. Outside the main thread this does nothing: Python
    handles signals there alone.

    Raises:
        TimeoutError: with the message, once the call that runs just then gives back control to Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number, frame):
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


__all__ = ["time_limit"]
