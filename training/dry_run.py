"""What a run needs: time, memory and disk, measured on a few of its steps."""

import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from pertstate.base.constants import Split
from pertstate.base.messages import given
from pertstate.data.sentences import SentenceDataset
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.inner_folds import UnsavedStop, folds_of, inner_arguments
from pertstate.training.progress import Progress, duration
from pertstate.training.trainer import StateTrainer


# Steps that are measured, after a first one, which is slower.
_MEASURED = 4


def dry_run(args: StateTrainingArguments, datasets: dict, make_model: Callable, processor) -> Iterator[str]:
    """
    Take a few steps of a run in memory, and say what the whole run needs. Nothing is written.

    Args:
        args ([`StateTrainingArguments`]): of the run, decided.
        datasets (`dict[str, SentenceDataset]`): by split.
        make_model (`Callable`): makes the model.
        processor ([`StateProcessor`]): of the model.

    Returns:
        an iterator over sentences. Time is that of the training steps and of one evaluation, each measured; memory is the peak of
        this process so far.
    """
    training, validation = datasets[Split.TRAIN], datasets.get(Split.VAL)
    yield f"output_dir: {args.output_dir}"
    set_seed(args.seed)
    model = make_model()
    if model.fitted:
        yield "the model is fitted in one pass over the training cells: it takes no steps"
        yield _memory(args)
        return
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        inner = inner_arguments(args, folder)
        inner.max_steps, inner.eval_on_start, inner.inner_folds = 1 + _MEASURED, False, 0
        stop = UnsavedStop("stopped in a dry run; nothing was written")
        trainer = StateTrainer(
            model, inner, training, validation, processing_class=processor, callbacks=[clock], stop=stop
        )
        trainer.remove_callback(Progress)
        trainer.train()
        of_evaluation = None
        if validation is not None and args.eval_strategy != "no":
            begun = time.monotonic()
            trainer.evaluate()
            of_evaluation = time.monotonic() - begun
    steps = _steps(args, training)
    trainings = 1 + _folds(args, training)
    of_step = clock.of_step()
    total = steps * of_step * trainings
    words = f"{of_step:.2g} s a step; {steps} steps"
    if trainings > 1:
        words += f", {trainings} times (the first {trainings - 1} choose how many of them are best)"
    if of_evaluation is not None:
        evaluations = _evaluations(args, steps)
        total += evaluations * of_evaluation
        words += f", and {evaluations} evaluations of {of_evaluation:.2g} s"
    early = "; early stopping may end it sooner" if args.early_stopping_patience is not None else ""
    yield f"time: {words}: at most about {duration(total)}, without the scores of the test split{early}"
    yield _memory(args)
    # The weights, and the two moments of the optimiser for those that are trained.
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    size = 4 * (model.num_parameters() + 2 * trained) / 2**20
    yield f"disk: about {size:,.0f} MiB for each checkpoint with its optimiser, besides the model at the end"


class _Clock(TrainerCallback):
    """When each step ended, once the device has taken it."""

    def __init__(self):
        self._ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self._ends.append(time.monotonic())

    def of_step(self) -> float:
        """Seconds of the median step but the first."""
        return float(np.median(np.diff(self._ends)))


def _steps(args: StateTrainingArguments, training) -> int:
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * training.steps_per_epoch(args))


def _folds(args: StateTrainingArguments, training) -> int:
    if not args.inner_folds or not isinstance(training, SentenceDataset):
        return 0
    return len(folds_of(training, args.inner_folds))


def _evaluations(args: StateTrainingArguments, steps: int) -> int:
    if args.eval_strategy == "epoch":
        return math.ceil(args.num_train_epochs)
    asked = given("eval_steps", args.eval_steps)
    between = asked * steps if asked < 1 else asked
    return int(steps // max(1, math.ceil(between)))


def _memory(args: StateTrainingArguments) -> str:
    # Linux gives KiB, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    words = f"memory: {peak:.1f} GiB at the peak"
    if args.device.type == "cuda":
        used, most = torch.cuda.max_memory_allocated(args.device), torch.cuda.mem_get_info(args.device)[1]
        words += f", and {used / 2**30:.1f} of {most / 2**30:.0f} GiB of the device"
    return words
