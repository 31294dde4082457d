"""What stands beside the loss in the log: the objective's terms, and the speed."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from pertstate.base.constants import CELL_MASK, CONTROL_CELLS


class LossTerms(TrainerCallback):
    """
    Adds to each loss that is logged the means of the objective's other terms since the last one, over all processes, and
    the cells that were trained on per second.

    It must be the first callback, so that those that print or report a log find the terms in it.

    Args:
        accelerator (`Accelerator`): of the Trainer.

    Raises:
        FloatingPointError: in `on_log`, the loss, one of its terms, or any other figure but the norm of the gradient is NaN
            or infinite.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self._terms: dict[str, torch.Tensor | float] = {}
        self._cells: torch.Tensor | int = 0
        self._batches, self._since = 0, time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]):
        """The terms of a training batch, and the cells in it."""
        for name, value in terms.items():
            if name != "loss":
                self._terms[name] = self._terms.get(name, 0.0) + value.detach()
        self._cells += batch[CELL_MASK].sum() if CELL_MASK in batch else batch[CONTROL_CELLS].shape[:2].numel()
        self._batches += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the block takes is not that of training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._check(logs, state)
        if "loss" not in logs or not self._batches:
            return
        found = self._since_the_last()
        bad = [name for name, value in {"loss": logs["loss"], **found}.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} became NaN or infinite in the {self._batches} batches up to step {state.global_step}; "
                "lower learning_rate or max_grad_norm, and resume from the last checkpoint"
            )
        logs.update(found)
        state.log_history[-1].update(found)
        self._reset()

    @staticmethod
    def _check(logs: dict, state):
        """Raise for a figure that is not finite. Where float16 overflows, a step is left out and its gradient has no norm."""
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            for entry in (logs, state.log_history[-1]):
                entry.pop("grad_norm", None)
        bad = [name for name, value in logs.items() if name != "loss" and not _is_finite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} became NaN or infinite by step {state.global_step}; lower learning_rate or max_grad_norm, "
                "and resume from the last checkpoint"
            )

    def _since_the_last(self) -> dict[str, float]:
        sums = [torch.as_tensor(v, dtype=torch.float64) for v in (*self._terms.values(), self._cells)]
        device = self.accelerator.device if self.accelerator.device.type != "mps" else "cpu"
        local = torch.stack([v.to(device) for v in sums])
        total = self.accelerator.gather(local[None]).double()
        terms = total[:, :-1].mean(dim=0).tolist()
        found = {name: value / self._batches for name, value in zip(self._terms, terms)}
        found["cells_per_second"] = round(total[:, -1].sum().item() / (time.perf_counter() - self._since), 1)
        return found


def _is_finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
