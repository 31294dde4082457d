"""Stopping a training by a signal, with a whole checkpoint of the step that was running."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pertstate.base.stopped import SAME_SIGNAL, SIGNALS, StoppedError


# Who listens in this process.
_listening: list["Stop"] = []


def _outlive_signals_to_all():
    """
    Let a forked process, which loads data for the running step, end at a SIGTERM of the training alone. (By torch's default it ends at
    any SIGTERM, and the training with it.)
    """
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_outlive_signals_to_all)


class Stop(TrainerCallback):
    """
    While [`Stop.listening`], SIGINT and SIGTERM let the training take its step to the end, save a checkpoint, and raise
    [`StoppedError`]. A second signal ends the process at once. Of several processes all stop at the same step, whichever
    got the signal. The last callback, so that a checkpoint has been pushed before.
    """

    def __init__(self):
        self._number: int | None = None
        self._when = 0.0
        self._group: dist.ProcessGroup | None = None
        # Whether this step is the last, as all processes agreed.
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals in this block are for the training. Elsewhere than in the main thread, Python lets nobody hear them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._number, self.asked, process = None, False, os.getpid()

        def hear(number: int, frame):
            if os.getpid() != process:
                return  # forked from the training, which ends it
            if self._number is not None and time.monotonic() - self._when > SAME_SIGNAL:
                os._exit(128 + number)
            if self._number is None:
                self._number, self._when = number, time.monotonic()

        before = {number: signal.signal(number, hear) for number in SIGNALS}
        _listening.append(self)
        try:
            yield
        finally:
            _listening.remove(self)
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args, state, control, **kwargs):
        # On CPUs, so that no step waits for an accelerator to hear of it.
        self._group = dist.new_group(backend="gloo") if args.world_size > 1 and self._group is None else self._group

    def on_step_end(self, args, state, control, **kwargs):
        if self._agreed():
            self.asked = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.asked:
            self._raise(args, state)

    def after_the_last_step(self, args, state):
        """
        To be called when all steps are done.

        Raises:
            StoppedError: a signal came meanwhile, and there is a checkpoint of the last step to go on from.
        """
        if self._agreed() and _checkpoint(args, state).is_dir():
            self._raise(args, state)

    def _agreed(self) -> int:
        """The number of the signal that any process got, 0 where none got one."""
        number = torch.tensor(self._number or 0)
        if self._group is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        self._number = int(number) or None
        return int(number)

    def _raise(self, args, state):
        raise StoppedError(
            int(self._number or 0),
            f"step {state.global_step} of {state.max_steps} is saved in {_checkpoint(args, state)}: go on with the same "
            f"command and --resume_from_checkpoint last{' instead of overwrite' if args.overwrite else ''}",
        )


def _checkpoint(args, state) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
