"""Commands end at SIGINT and SIGTERM with nothing left behind, and the exit code of the signal."""

import os
import signal
import time

import launches
import pytest

from pertstate.base.stopped import SAME_SIGNAL, StoppedError, stopped_by_signals


COMMAND = """
import sys, time
import pertstate.cli
import pertstate.cli.configs
from pertstate.base.files import whole_file
from pertstate.base.outputs import claimed_file

def wait():
    # A signal that comes just before a long sleep begins is heard when it ends.
    while True:
        time.sleep(0.05)

def run(args):
    with claimed_file(args.output, False) as place, whole_file(place) as partial:
        partial.write_text("part")
        try:
            print("writing", flush=True)
            wait()
        finally:
            if args.name == "slowly":
                print("clearing", flush=True)
                wait()

pertstate.cli.configs.run = run
raise SystemExit(pertstate.cli.main(["configs", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_command_clears_away_what_it_was_writing(tmp_path, number, code):
    process = launches.start(["-c", COMMAND, "demo", "--output", tmp_path / "out"])
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, number)
    done = process.communicate()
    name = signal.Signals(number).name
    assert done.returncode == code and os.listdir(tmp_path) == []
    assert done.stderr == f"pertstate configs: stopped by {name}; nothing is left of what was being written\n"


def test_a_second_signal_does_not_wait(tmp_path):
    process = launches.start(["-c", COMMAND, "slowly", "--output", tmp_path / "out"])
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "clearing\n"
    time.sleep(SAME_SIGNAL)
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate().returncode == 143


def test_handlers_are_those_of_before_when_the_block_ends():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(StoppedError, match="stopped by SIGTERM; all is well"), stopped_by_signals("all is well"):
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
