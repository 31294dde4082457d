"""What a training says while it runs: a line every few seconds, and the time that it will take."""

import sys
import time
from datetime import datetime, timedelta

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pertstate.base.console import say
from pertstate.base.printable import get_logger


logger = get_logger(__name__)

# Seconds from one log entry to the next, where `logging_steps` is not set.
SECONDS = 5.0
# The time of all steps is estimated from so many, after the first, which is slower.
_MEASURED = 5
# From one entry to the next, the number of steps grows at most by this factor.
_LONGER = 50
# Terms and figures of an entry that lines leave out.
_UNSAID = {"loss", "grad_norm", "learning_rate", "epoch", "total_flos", "cells_per_second"}


class TimedLog(TrainerCallback):
    """
    Logs the first step, then every few seconds, and the last step, where the run does not set `logging_steps`. At each entry the first
    process says in how many steps the next one comes, so that all processes log the same steps.
    """

    def __init__(self):
        self._next = self._steps = 1
        self._since = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._steps, self._next = 1, state.global_step + 1
        self._since = (state.global_step, time.monotonic())

    def on_step_end(self, args, state, control, **kwargs):
        if _is_timed(args) and (state.global_step >= self._next or state.global_step >= state.max_steps):
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not _is_timed(args) or "loss" not in (logs or {}):
            return
        step, since = self._since
        now = time.monotonic()
        of_step = max(now - since, 1e-6) / max(1, state.global_step - step)
        steps = [max(1, min(round(SECONDS / of_step), _LONGER * self._steps))]
        self._steps = broadcast_object_list(steps)[0]
        self._next, self._since = state.global_step + self._steps, (state.global_step, now)


class Progress(ProgressCallback):
    """
    A bar, where standard error is a terminal, and a line for each log entry: of the log, or where it is not shown, of
    standard output. `disable_tqdm` leaves the bar out, and the lines where no log is shown.
    """

    def __init__(self):
        super().__init__()
        self._begun: tuple[int, float] | None = None
        self._estimated = False
        self._best: tuple[float, int] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun, self._estimated, self._best, self.current_step = None, False, None, 0
        if _has_bar(args, state):
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, unit="steps")

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        if self._begun is None:
            self._begun = self._now(args, state)
        elif not self._estimated and state.global_step - self._begun[0] == _MEASURED:
            self._estimated = True
            if state.is_world_process_zero:
                self._say(args, self._estimate(args, state))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if _has_bar(args, state):
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        line = self._line(args, state, logs)
        if line is not None:
            self._say(args, line)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _now(self, args, state) -> tuple[int, float]:
        """The step, and the time at which the device has taken it."""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return state.global_step, time.monotonic()

    def _of_step(self, args, state) -> float | None:
        """Seconds of a step, with its share of evaluations and checkpoints."""
        if self._begun is None or state.global_step == self._begun[0]:
            return None
        step, now = self._now(args, state)
        return (now - self._begun[1]) / (step - self._begun[0])

    def _estimate(self, args, state) -> str:
        of_step = self._of_step(args, state) or 0.0
        left = of_step * (state.max_steps - state.global_step)
        end = datetime.now() + timedelta(seconds=left)
        until = f"{end:%H:%M}" if left < 12 * 3600 else f"{end:%Y-%m-%d %H:%M}"
        evaluated = ", and evaluations" if args.eval_strategy != "no" else ""
        early = "; early stopping may end it sooner" if args.early_stopping_patience is not None else ""
        return f"{of_step:.2g} s a step: {state.max_steps} steps{evaluated} take about {duration(left)} more, until {until}{early}"

    def _line(self, args, state, logs: dict) -> str | None:
        at = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            of_step = self._of_step(args, state)
            others = [f"{name} {of:.4g}" for name, of in logs.items() if name not in _UNSAID and of != logs["loss"]]
            speed = [f"{logs['cells_per_second']:,.0f} cells/s"] if "cells_per_second" in logs else []
            left = [] if of_step is None else [f"{duration(of_step * (state.max_steps - state.global_step))} left"]
            return "  ".join([at, f"loss {logs['loss']:.4g}", *others, *speed, *left])
        if "eval_loss" in logs:
            return f"{at}  validation: {_figures(logs, 'eval_')}{self._compared(state, logs['eval_loss'])}"
        if "train_runtime" in logs:
            return f"{state.global_step} steps in {duration(logs['train_runtime'])}"
        if "fit_runtime" in logs:
            return f"fitted to {logs['fit_cells']:,} cells in {duration(logs['fit_runtime'])}"
        return None

    def _compared(self, state, loss: float) -> str:
        if self._best is None or loss < self._best[0]:
            self._best = (loss, state.global_step)
            return "  (the best so far)"
        return f"  (best: {self._best[0]:.4g} at step {self._best[1]})"

    def _say(self, args, line: str):
        if self.training_bar is not None:
            self.training_bar.clear()
        if logger.isEnabledFor(20):
            logger.info(line)
        elif not args.disable_tqdm:
            say(line)
        if self.training_bar is not None:
            self.training_bar.refresh()


def _is_timed(args) -> bool:
    return args.logging_steps is None and args.logging_strategy == "steps"


def duration(seconds: float) -> str:
    """A time in words: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _figures(logs: dict, prefix: str) -> str:
    """The loss, and the model's figures beside those of the perturbation mean."""
    said = [f"loss {logs[f'{prefix}loss']:.4g}"]
    for metric, name in (("pearson", "Pearson"), ("mae", "MAE"), ("energy", "energy")):
        if f"{prefix}{metric}" in logs:
            mean = logs.get(f"{prefix}perturbation_mean_{metric}")
            said.append(f"{name} {logs[prefix + metric]:.3g}" + ("" if mean is None else f" (mean {mean:.3g})"))
    return ", ".join(said)


def _has_bar(args, state) -> bool:
    return state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty()
