"""A bound in seconds: work that takes longer ends with the error, whatever it catches."""

import signal
import threading
import time

import pytest

from pertstate.base import time_limit as module
from pertstate.base.time_limit import time_limit


def test_work_that_takes_longer_ends():
    before = signal.getsignal(signal.SIGALRM)
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match="too long"), time_limit(0.1, "too long"):
        while True:
            pass
    assert 0.1 <= time.perf_counter() - start < 2
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_work_that_waits_ends():
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match="too long"), time_limit(0.1, "too long"):
        time.sleep(20)
    assert time.perf_counter() - start < 2


def test_an_error_that_is_caught_comes_again(monkeypatch):
    monkeypatch.setattr(module, "_AGAIN", 0.1)
    caught = 0
    with pytest.raises(TimeoutError), time_limit(0.1, "too long"):
        while True:
            try:
                time.sleep(20)
            except TimeoutError:
                caught += 1
                if caught == 3:
                    raise
    assert caught == 3


def test_work_in_time_is_left_alone():
    with time_limit(0.2, "too long"):
        pass
    time.sleep(0.3)
    with pytest.raises(KeyError), time_limit(0.2, "too long"):
        raise KeyError
    time.sleep(0.3)


def test_elsewhere_than_in_the_main_thread_there_is_no_bound():
    done = []

    def work():
        with time_limit(0.01, "too long"):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
