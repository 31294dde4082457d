"""Ending at a signal: what is being written is cleared away, and the exit code names the signal."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal, a scheduler or `timeout` sends a signal to all processes of a group, and what started a process passes it on to it.
# A second signal within these seconds is the first one.
SAME_SIGNAL = 1.0


class StoppedError(KeyboardInterrupt):
    """
    A signal stopped the work.

    Args:
        number (`int`): of the signal.
        left (`str`): what is left of the work, and how to go on.

    Attributes:
        exit_code (`int`): as a shell gives it: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, left: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {left}")
        self.exit_code = 128 + number


@contextmanager
def stopped_by_signals(left: str) -> Iterator[None]:
    """
    In this block SIGINT and SIGTERM raise [`StoppedError`], which says what is `left`; a second one, not the first that was sent
    twice, ends the process at once.
    Outside the main thread this does nothing: Python handles signals there alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    heard: list[float] = []

    def hear(number: int, frame):
        if os.getpid() != process:
            os._exit(128 + number)
        if heard:
            if time.monotonic() - heard[0] < SAME_SIGNAL:
                return
            os._exit(128 + number)
        heard.append(time.monotonic())
        raise StoppedError(number, left)

    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["SAME_SIGNAL", "SIGNALS", "StoppedError", "stopped_by_signals"]
