"""The checkpoints that a run writes while it trains, and the folder of a run that was stopped before its model was written."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pertstate.base.bounded_text import load_json
from pertstate.base.printable import get_logger
from pertstate.data.record import RunRecord
from pertstate.hub.publish import CHECKPOINT
from pertstate.hub.unchanged import read_unchanged


logger = get_logger(__name__)

# The list of a checkpoint's files with their sizes. It is the last that is written.
FILES = "files.json"
_Read = TypeVar("_Read")
# Checkpoints that may go away while they are read.
_TRIES = 20
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, by their steps."""
    found = (
        [path for path in run.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()] if run.is_dir() else []
    )
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(checkpoint.name.rpartition("-")[2])


def wrong_files(folder: Path) -> str | None:
    """Which files of a checkpoint are missing or cut short, in words; None where it is whole."""
    listed = read_list(folder / FILES)
    if listed is None:
        return f"it has no list of its files, {FILES}: it is cut short, or an older version wrote it"
    wrong = []
    for name, size in listed["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} of {size} bytes")
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "") if wrong else None


def read_list(path: Path) -> dict[str, Any] | None:
    """The list of a checkpoint's files; None where there is none."""
    try:
        content = load_json(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    fits = isinstance(content, dict) and content.keys() == {"resumable", "files"} and isinstance(content["files"], dict)
    return content if fits else None


def model_folder(run: str | os.PathLike) -> Path:
    """
    The folder that a run's model is loaded from: the run's own, or, if the run was stopped before its end, that of its last whole
    checkpoint, which the log names. For a folder that holds no run, the folder itself.

    Raises:
        ValueError: the run has checkpoints alone, and none is whole.
    """
    run = Path(run)
    checkpoints = checkpoints_of(run)
    whole = next((folder for folder in reversed(checkpoints) if wrong_files(folder) is None), None)
    if CHECKPOINT.is_in(run):
        if whole is not None and _of_another_run(run, whole):
            logger.warning(
                f"{run} holds the model of an earlier run, which is used, and {whole.name} of a later one that did not end; name "
                f"{whole} to use that"
            )
        return run
    if not checkpoints:
        return run
    if whole is None:
        wrong = "; ".join(f"{folder.name}: {wrong_files(folder)}" for folder in checkpoints[-3:])
        raise ValueError(f"{run} holds a run that did not end, without a whole checkpoint: {wrong}; train anew")
    logger.warning(f"{run} holds a run that did not end: its last whole checkpoint is used, {whole.name}")
    return whole


def read_model_folder(run: str | os.PathLike, read: Callable[[Path], _Read]) -> tuple[_Read, Path]:
    """
    What `read` gives of [`model_folder`], and that folder. A run that goes on removes its checkpoints: of one that has gone
    meanwhile, the next is read.

    Raises:
        ValueError: the checkpoints are removed again and again; or see [`model_folder`] and [`read_unchanged`].
        Any error of `read`.
    """
    for _ in range(_TRIES):
        there, folder = checkpoints_of(Path(run)), None
        try:
            folder = model_folder(run)
            found = read_unchanged(folder, partial(read, folder))
            if folder == Path(run) or folder.is_dir():
                return found, folder
        except Exception:
            # An error of files that are still there is theirs.
            if checkpoints_of(Path(run)) == there if folder is None else folder.is_dir():
                raise
    raise ValueError(
        f"{run} is being trained, and each checkpoint has gone before it was read; wait until it has ended"
    )


def _of_another_run(run: Path, checkpoint: Path) -> bool:
    of_run, of_checkpoint = RunRecord.load(run), RunRecord.load(checkpoint)
    return of_run is not None and of_checkpoint is not None and of_run.difference(of_checkpoint) is not None
