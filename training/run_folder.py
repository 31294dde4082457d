"""The folder of a run: who may write it, and what a run in it continues from."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pertstate.base.outputs import claimed_run, no_empty_folder
from pertstate.families import FAMILIES
from pertstate.hub.publish import CHECKPOINT
from pertstate.hub.unfinished import checkpoints_of
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.automatic import AUTO
from pertstate.training.run import config_class
from pertstate.training.run_config import RunConfig
from pertstate.training.staging import (
    check_resumable,
    last_whole_checkpoint,
    recover_run,
)


# What depends on the data, and on whether some are held out; all else of the arguments is checked before these are read.
_OF_DATA = ("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience")
_LAST = (True, "True", "true", "last")


@contextmanager
def run_folder(run: RunConfig) -> Iterator[str | None]:
    """
    Check the arguments of a run, and hold its folder: in this block no other run writes it. Of several processes the first
    holds it; a dry run looks at it alone. Yields the checkpoint that the run continues, if it asks for one and there is one.

    Raises:
        ValueError: an argument is out of its range; the checkpoint is not whole; there is a model, but no checkpoint to
            continue.
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: the folder holds a run, and neither is it continued nor is it to be replaced.
        InUseError: another run writes the folder.
    """
    fields = {name: value for name, value in run.training.items() if name not in _OF_DATA and value != AUTO}
    args = StateTrainingArguments(**{"eval_strategy": "steps", **fields})
    folder, resume = Path(str(args.output_dir)), run.training.get("resume_from_checkpoint") or None
    if args.overwrite and resume is not None:
        raise ValueError(
            f"overwrite replaces the run that resume_from_checkpoint={resume!r} continues; leave one of them out"
        )
    with ExitStack() as stack:
        if args.dry_run:
            if not args.overwrite:
                _check_free(folder, resume, _is_fitted(run))
        elif args.should_save:
            stack.enter_context(claimed_run(folder, CHECKPOINT))
            stack.enter_context(no_empty_folder(folder))  # the Trainer makes it before there is anything to write
            recover_run(folder)
            if not args.overwrite:
                _check_free(folder, resume, _is_fitted(run))
        args.distributed_state.wait_for_everyone()
        if resume in _LAST:
            yield last_whole_checkpoint(folder)
        else:
            if resume is not None and not _is_fitted(run):
                check_resumable(resume)
            yield resume


def _is_fitted(run: RunConfig) -> bool:
    return FAMILIES[config_class(run.model).model_type].model.fitted


def _check_free(folder: Path, resume: str | bool | None, is_fitted: bool):
    """Whether a run may write its folder."""
    checkpoints, finished = checkpoints_of(folder), CHECKPOINT.is_in(folder)
    if resume in _LAST:
        # A model that is fitted in one pass has no checkpoints: it is fitted again, to the same weights.
        if finished and not checkpoints and not is_fitted:
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds a model, but no checkpoint to continue from; leave it out and train "
                "anew with --overwrite"
            )
        return
    continued = resume is not None and Path(os.path.realpath(str(resume))).is_relative_to(os.path.realpath(folder))
    if (checkpoints or finished) and not continued:
        raise FileExistsError(
            f"{folder} holds a run; continue it with --resume_from_checkpoint last, replace it with --overwrite, or name another "
            "output_dir"
        )
