"""The number of steps of a run that is to choose it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from pertstate.base.bounded_text import load_json
from pertstate.base.printable import get_logger
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.record import RunRecord
from pertstate.data.sentences import SentenceDataset
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.inner_folds import choose_steps
from pertstate.training.run import sentences
from pertstate.training.run_config import RunConfig
from pertstate.training.trainer import StateTrainer


logger = get_logger("pertstate.train")

# The part of `max_steps` that is taken where no training group can be held out.
_UNKNOWN = 1 / 4


def set_steps(
    args: StateTrainingArguments,
    run: RunConfig,
    resume: str | None,
    dataset: SentenceDataset,
    set_size: int,
    make_model: Callable,
) -> ChangeIntervals | None:
    """
    Choose the number of steps on held-out training groups, and put it into the arguments: `max_steps` becomes the chosen number
    and `schedule_steps` what `max_steps` was. A run that is continued has chosen it already.

    Args:
        args ([`StateTrainingArguments`]): with `inner_folds`.
        run ([`RunConfig`]), resume (`str`, *optional*): the run, and the checkpoint that it continues.
        dataset ([`SentenceDataset`]): the training split.
        set_size (`int`): cells of a sentence.
        make_model (`Callable`): makes a new model.

    Returns:
        The intervals of predicted changes that the held-out groups give; None where none could be held out.

    Raises:
        ValueError: the data are a stream, or the length is given in epochs.
    """
    if not isinstance(dataset, SentenceDataset):
        raise ValueError("inner_folds: a stream is read once, so no groups are held out in turn; set max_steps alone")
    if args.max_steps < 1:
        raise ValueError("inner_folds chooses among numbers of steps: set max_steps, and leave num_train_epochs out")
    if resume is not None:
        path = Path(resume, "training_args.json")
        before = load_json(path)
        most, schedule = (
            before.get(name) if isinstance(before, dict) else None for name in ("max_steps", "schedule_steps")
        )
        if not _is_number_of_steps(most) or not _is_number_of_steps(schedule):
            there = f"{most!r:.50} and {schedule!r:.50}"
            raise ValueError(
                f"{path}: expected two numbers, max_steps and schedule_steps, found {there}; train anew, with --overwrite"
            )
        args.max_steps, args.schedule_steps = most, schedule
        record = RunRecord.load(resume)
        return None if record is None else record.intervals
    chosen = choose_steps(
        lambda inner, train, val, **kwargs: StateTrainer(make_model(), inner, train, val, **kwargs),
        lambda cells: sentences(cells, dataset.processor, run, args, set_size),
        dataset,
        args,
        args.inner_folds,
    )
    most = args.schedule_steps or args.max_steps
    if chosen is None:
        args.schedule_steps, args.max_steps = most, max(1, round(args.max_steps * _UNKNOWN))
        logger.info(
            f"inner_folds: no training groups can be held out as the test groups are, so {args.max_steps} of {most} steps are taken"
        )
        return None
    args.schedule_steps, (args.max_steps, found) = most, chosen
    logger.info(f"inner_folds: {args.max_steps} of {most} steps, chosen on held-out training groups")
    return found


def _is_number_of_steps(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**31
