"""Checkpoints of a training that are whole or do not exist."""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pertstate.base.bounded_text import LARGEST_TABLES, load_json
from pertstate.base.files import PARTIAL, saying_disk_errors
from pertstate.base.messages import given
from pertstate.base.outputs import replace_folder
from pertstate.base.printable import get_logger
from pertstate.hub.publish import reveal
from pertstate.hub.unfinished import FILES, checkpoints_of, read_list, step_of, wrong_files


logger = get_logger(__name__)

STAGING = PARTIAL
# What a run leaves of its history, beside the state of the Trainer.
HISTORY_FILES = HISTORY, CURVES = "history.csv", "curves.png"


def is_staged(folder: Path) -> bool:
    """Whether a checkpoint is still being written."""
    return folder.parent.name == STAGING


@contextmanager
def whole_checkpoint(trainer: Trainer, limit: int | None, resumable: bool = False) -> Iterator[Path]:
    """
    Makes the Trainer save the checkpoint of its step to a staging folder, which is yielded, and not push it. When the
    block ends without error, the folder takes its place in the output folder; older checkpoints make room. Every process
    enters it.

    Args:
        limit (`int`, *optional*): how many checkpoints to keep; all by default.
        resumable (`bool`): keep what a training continues from, even where `save_only_model` leaves it out.

    Raises:
        OSError: the disk is full; the checkpoints that were there are as they were.
    """
    args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
    run, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    staged, final = run / STAGING / name, run / name
    if args.should_save:
        shutil.rmtree(run / STAGING, ignore_errors=True)
    wait()
    trainer.args = copy.copy(args)
    trainer.args.output_dir, trainer.args.push_to_hub = str(run / STAGING), False
    trainer.args.save_only_model = args.save_only_model and not resumable
    try:
        with saying_disk_errors(final):
            yield staged
        wait()
        if args.should_save:
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and (best == final or best.exists()):
                state.best_model_checkpoint = str(best)
            with saying_disk_errors(final):
                state.save_to_json(str(staged / TRAINER_STATE_NAME))
                reveal(staged)
                _list_files(staged, not trainer.args.save_only_model)
            replace_folder(staged, final)
    finally:
        trainer.args = args
        if args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
    wait()
    if args.should_save:
        _make_room(run, final, state.best_model_checkpoint, limit)


class Continued(TrainerCallback):
    """
    The checkpoint that a training continues.

    Attributes:
        step (`int`, *optional*): its step; None where the training starts anew.
        state (`TrainerState`, *optional*): what it says of its training.
    """

    def __init__(self):
        self.step: int | None = None
        self.state: TrainerState | None = None
        self._best: Path | None = None

    def start(self, folder: str | None, loads_best: bool):
        """
        To be called before each training.

        Args:
            folder (`str`, *optional*): the checkpoint.
            loads_best (`bool`): the best checkpoint so far may be loaded at the end.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is not whole, or the best one is not.
        """
        self.step = self.state = self._best = None
        if folder is None:
            return
        check_resumable(folder)
        self.state = state = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
        self.step = state.global_step
        if state.best_global_step:
            # Beside it, even where the run's folder was moved.
            best = Path(folder).with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            self._best = best if best.is_dir() else None
        if loads_best and self._best is not None:
            wrong = wrong_files(self._best)
            if wrong is not None:
                raise ValueError(f"resume_from_checkpoint: the best checkpoint {self._best} is not whole: {wrong}")

    def on_train_begin(self, args, state, control, **kwargs):
        if self._best is not None and state.best_model_checkpoint is None:
            state.best_model_checkpoint = str(self._best)


def _list_files(folder: Path, resumable: bool):
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / FILES).write_text(json.dumps({"resumable": resumable, "files": sizes}, indent=1), encoding="utf-8")


def _discard(checkpoint: Path):
    """Remove a checkpoint: first its name goes, so that a kill leaves no part of it under this name."""
    if checkpoint.exists():
        doomed = checkpoint.parent / STAGING / f"{checkpoint.name}-removed"
        doomed.parent.mkdir(exist_ok=True)
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _make_room(run: Path, newest: Path, best: str | None, limit: int | None):
    """
    Keep `limit` checkpoints, always the newest and the best. Those that are not whole go first, then those of a later step,
    which an earlier course of the run left, then the oldest.
    """
    if limit is None:
        return
    kept = {newest, *([] if best is None else [Path(best)])}
    others = [path for path in checkpoints_of(run) if path not in kept]
    others.sort(key=lambda path: (missing_of(path) is None, step_of(path) < step_of(newest)))
    for path in others[: max(0, len(others) + len(kept) - limit)]:
        _discard(path)
    shutil.rmtree(run / STAGING, ignore_errors=True)


def clear_run(run: Path):
    """Remove the checkpoints of an older run, and its history."""
    for path in checkpoints_of(run):
        _discard(path)
    for name in (*HISTORY_FILES, TRAINER_STATE_NAME):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / STAGING, ignore_errors=True)


def recover_run(run: Path):
    """Tidy up after a run that was killed: a checkpoint that is whole but for its name gets it, the rest goes."""
    for staged in checkpoints_of(run / STAGING):
        if missing_of(staged) is None and not (run / staged.name).exists():
            os.rename(staged, run / staged.name)
    shutil.rmtree(run / STAGING, ignore_errors=True)


def missing_of(checkpoint: str | os.PathLike) -> str | None:
    """Which of its files a checkpoint lacks for a training to continue, in words; None where it is whole. What they hold is not read."""
    wrong = wrong_files(Path(checkpoint))
    if wrong is None and not given("the list of files", read_list(Path(checkpoint, FILES)))["resumable"]:
        return "it holds the model alone (save_only_model), not the state of its training"
    return wrong


def unfit_of(checkpoint: str | os.PathLike) -> str | None:
    """What a training cannot continue from a checkpoint for, in words: files that it lacks, or what its state says; None if it can."""
    missing = missing_of(checkpoint)
    return _wrong_state(Path(checkpoint, TRAINER_STATE_NAME)) if missing is None else missing


# Entries of the Trainer's state that it computes with, all of which are numbers of at least 0.
_NUMBERS = (
    "epoch",
    "global_step",
    "max_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "num_train_epochs",
    "total_flos",
)
_ENTRIES = {field.name for field in dataclasses.fields(TrainerState)}


def _wrong_state(path: Path) -> str | None:
    """Which entry of the state of a Trainer is none that a Trainer writes, in words; None where all are."""
    try:
        state = load_json(path, LARGEST_TABLES)
    except (FileNotFoundError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    if not isinstance(state, dict):
        return f"{path.name}: expected an object, found {type(state).__name__}"
    if unknown := state.keys() - _ENTRIES:
        return f"{path.name}: found an unknown entry {min(unknown)[:100]!r}"
    callbacks, log = state.get("stateful_callbacks"), state.get("log_history")
    fits = {name: _is_number(state.get(name)) for name in _NUMBERS}
    fits["global_step"] = fits["global_step"] and isinstance(state["global_step"], int)
    fits["train_batch_size"] = state.get("train_batch_size") is None or _is_number(state["train_batch_size"])
    fits["best_metric"] = isinstance(state.get("best_metric"), int | float | None)
    fits["log_history"] = isinstance(log, list) and all(
        isinstance(row, dict) and _is_number(row.get("step")) for row in log
    )
    fits["stateful_callbacks"] = (
        isinstance(callbacks, dict)
        and "TrainerControl" in callbacks
        and all(isinstance(of, dict | list) for of in callbacks.values())
    )
    wrong = next((name for name, fit in fits.items() if not fit), None)
    return (
        None if wrong is None else f"{path.name}: {wrong} is {str(state.get(wrong))[:100]!r}, which no Trainer writes"
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0 that fits into 64 bits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 63


def check_resumable(checkpoint: str | os.PathLike):
    """
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not whole; what is wrong with it is said.
    """
    if not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: {checkpoint}: no such checkpoint folder")
    wrong = unfit_of(checkpoint)
    if wrong is not None:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is not whole: {wrong}; name another checkpoint, or last for the last that "
            "is whole"
        )


def last_whole_checkpoint(run: str | os.PathLike) -> str | None:
    """
    The last checkpoint of a run that is whole; later ones that are not are named in a warning. None where the run has no
    checkpoint at all.

    Raises:
        ValueError: it has checkpoints, and none is whole.
    """
    wrong: dict[str, str] = {}
    for folder in reversed(checkpoints_of(Path(run))):
        missing = unfit_of(folder)
        if missing is None:
            for name, why in wrong.items():
                logger.warning(f"{name} is not whole: {why}; resuming from {folder.name}")
            return str(folder)
        wrong[folder.name] = missing
    if wrong:
        said = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:3])
        raise ValueError(
            f"{run} has no whole checkpoint to resume from: {said}; leave resume_from_checkpoint out and train anew with "
            "--overwrite"
        )
    return None
