"""Passes of a model that several processes share out, as `accelerate launch` starts them."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from pertstate.evaluation.experiment import Unit


# Of each pass whose cells it has, and what was found.
Results = Iterator[tuple[Any, ...]]


class SharedPasses:
    """
    The processes of a prediction. Each computes some passes; the first one gets all results and writes them.

    Args:
        device (`str`, *optional*): what was asked for; by default each process takes the accelerator of its number.

    Attributes:
        writes (`bool`): whether this process is the first one.
        device (`str`, *optional*): that of this process.
    """

    def __init__(self, device: str | None = None):
        self.rank, self.processes = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.device, self._group = device, None
        if self.processes > 1:
            on_cpu = device == "cpu" or not torch.accelerator.is_available()
            state = PartialState(cpu=on_cpu)
            self.rank, self.device = state.process_index, device or str(state.device)
            # Results are in the memory of the host.
            self._group = dist.new_group(backend="gloo")
        self.writes = self.rank == 0

    def results(self, passes: Iterator[list[Unit]], compute: Callable[[Iterator[list[Unit]]], Results]) -> Results:
        """
        What `compute` gives for each pass, in their order, in the first process; nothing in the others. Of each process at most one
        result is held. All processes call it together, with the same passes.
        """
        if self.processes == 1:
            yield from compute(passes)
            return
        planned = list(passes)
        own = compute(iter(planned[self.rank :: self.processes]))
        for start in range(0, len(planned), self.processes):
            result = next(own, None)
            # Without the units, which each process has.
            sent = None if result is None else result[1:]
            gathered: list[Any] | None = [None] * self.processes if self.writes else None
            dist.gather_object(sent, gathered, dst=0, group=self._group)
            for packed, found in zip(planned[start : start + self.processes], gathered or []):
                yield packed, *found

    def merged(self, own: list) -> list:
        """The items of all processes, in the order of these, in each of them."""
        if self.processes == 1:
            return own
        gathered: list[Any] = [None] * self.processes
        dist.all_gather_object(gathered, own, group=self._group)
        return [item for items in gathered for item in items]
