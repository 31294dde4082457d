"""Cells in memory that the processes of a machine fill together and hold once."""

import mmap
import os
import socket
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from pertstate.base.cell_source import Room


class SharedRoom(Room):
    """
    Memory that the processes of a run on one machine share. Each fills a part of it.

    A process that cannot open the memory of any other one (on another machine, in another container, or on a system that is not Linux)
    fills all, and has it for itself. All processes of a run make it, and call its methods, in the same order.
    """

    def __init__(self):
        self._state, self._own = PartialState(), (_place(), os.getpid())
        mates = [number for place, number in gather_object([self._own]) if place == self._own[0]]
        self.part, self.parts, self._first = mates.index(os.getpid()), len(mates), mates[0]

    def empty(self, shape: tuple[int, int]) -> np.ndarray:
        size, made = 4 * int(np.prod(shape)), None
        if self.parts > 1 and self.part == 0:
            made = os.memfd_create("pertstate-cells")
            os.ftruncate(made, size)
        opened = dict(gather_object([(self._own, made)]))
        if self.parts == 1:
            values = super().empty(shape)
        else:
            with open(f"/proc/{self._first}/fd/{opened[self._own[0], self._first]}", "r+b", buffering=0) as file:
                values = np.frombuffer(mmap.mmap(file.fileno(), size), dtype=np.float32).reshape(shape)
        self.wait()
        if made is not None:
            os.close(made)  # the memory lives as long as one of them has it mapped
        return values

    def wait(self):
        self._state.wait_for_everyone()


def _place() -> tuple[str, str]:
    """What is the same for processes that can open one another's memory, and for no others."""
    if sys.platform != "linux":
        return socket.gethostname(), str(os.getpid())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return boot, os.readlink("/proc/self/ns/pid")
