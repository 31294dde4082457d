"""Locks: the second process is told who the first is, and a process that died holds none."""

import json
import os
import re
import resource
import signal
import socket
import threading
import time
from contextlib import suppress

import launches
import pytest

from pertstate.base import locks
from pertstate.base.locks import InUseError, locked


HOLD = """
import sys
from pathlib import Path
from pertstate.base.locks import locked
with locked(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(lock, *words):
    process = launches.start(["-c", HOLD, lock, *words])
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_the_first_is(tmp_path):
    lock = tmp_path / ".out.lock"
    process = hold(lock, "--hub_token", "hf_secret", "--token=hf_other", "screen.yaml")
    with pytest.raises(InUseError) as caught, locked(lock, "out"):
        pass
    said = str(caught.value)
    assert re.fullmatch(
        rf"out is being written by process {process.pid} on {re.escape(socket.gethostname())} \(-c {re.escape(str(lock))} "
        r"--hub_token '\*\*\*' '--token=\*\*\*' screen.yaml\), since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for it, stop it, or "
        "name another output",
        said,
    ), said
    assert process.communicate().returncode == 0
    with locked(lock, "out"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    lock = tmp_path / ".out.lock"
    assert hold(lock).kill().returncode == -signal.SIGKILL
    assert lock.exists()
    with locked(lock, "out"):
        pass
    assert not lock.exists()


@pytest.mark.parametrize("fork", ["os.fork()", "ctypes.PyDLL(None).fork()"])
def test_a_child_does_not_hold_the_lock_of_a_parent_that_died(tmp_path, fork):
    """
    A process that loads data lives some seconds longer than a training that was killed. The second fork is one that the
    parent does not outlive: what its child does first, it does a second later.
    """
    child = "time.sleep(60 if 'os' in fork else 1); os._exit(0)"
    code = HOLD.replace(
        "    print(", f"    import ctypes, os, time\n    fork = {fork!r}\n    if {fork} == 0: {child}\n    print("
    )
    lock = tmp_path / ".out.lock"
    process = launches.start(["-c", code, lock])
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{process.pid}"):
        time.sleep(0.01)
    with locked(lock, "out"):
        pass
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_that_another_holds_after_its_process_died_is_waited_for_and_told(tmp_path, monkeypatch):
    lock = tmp_path / ".out.lock"
    process = hold(lock)
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "command": "train", "since": "then"}))
    monkeypatch.setattr(locks, "_PATIENCE", 0.2)
    before, start = os.listdir("/proc/self/fd"), time.monotonic()
    with pytest.raises(InUseError, match="process 4194305 on"), locked(lock, "out"):
        pass
    assert time.monotonic() - start > 0.2 and len(os.listdir("/proc/self/fd")) == len(before)
    process.communicate()


def test_a_thread_may_enter_again_and_another_may_not(tmp_path):
    lock, said = tmp_path / ".out.lock", []

    def other():
        try:
            with locked(lock, "out"):
                pass
        except InUseError as error:
            said.append(str(error))

    with locked(lock, "out"):
        with locked(lock, "out"):
            pass
        assert lock.exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and f"process {os.getpid()} on" in said[0]
    assert not lock.exists()


def test_many_processes_enter_one_at_a_time(tmp_path):
    """Each process adds one to a number in a file. If two are in at once, one addition is lost. The lock file comes and goes."""
    code = """
import sys, time
from pathlib import Path
from pertstate.base.locks import InUseError, locked
done, path = 0, Path(sys.argv[1]) / "number"
while done < 200:
    try:
        with locked(path.with_name(".lock"), "out"):
            path.write_text(str(int(path.read_text()) + 1))
            done += 1
    except InUseError:
        time.sleep(0)
"""
    (tmp_path / "number").write_text("0")
    processes = [launches.start(["-c", code, tmp_path]) for _ in range(4)]
    for process in processes:
        done = process.communicate()
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "number").read_text() == "800" and os.listdir(tmp_path) == ["number"]


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="Too many levels"), locked(tmp_path / ".out.lock", "out"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_disk_too_full_for_a_lock_is_told_and_keeps_none(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written, nothing is left of it: File too large: 'out'"):
            with locked(tmp_path / ".out.lock", "out"):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / ".out.lock", "out"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}'])
def test_a_lock_that_says_nothing_is_one_of_another_process(tmp_path, content):
    lock = tmp_path / ".out.lock"
    process = hold(lock)
    lock.write_bytes(content)
    with pytest.raises(InUseError, match="out is being written by another process; wait for it"), locked(lock, "out"):
        pass
    process.communicate()
