"""Checkpoints of a training that are whole or do not exist."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from pertstate.base.files import PARTIAL
from pertstate.hub.publish import reveal


STAGING = PARTIAL


def is_staged(folder: Path) -> bool:
    """Whether a checkpoint is still being written."""
    return folder.parent.name == STAGING


@contextmanager
def whole_checkpoint(trainer: Trainer) -> Iterator[Path]:
    """
    Makes the Trainer save the checkpoint of its step to a staging folder, which is yielded, and not push it. When the
    block ends without error, the folder takes its place in the output folder; older checkpoints make room. Every process
    enters it.
    """
    args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
    run, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    staged, final = run / STAGING / name, run / name
    if args.should_save:
        shutil.rmtree(run / STAGING, ignore_errors=True)
    wait()
    trainer.args = copy.copy(args)
    trainer.args.output_dir, trainer.args.push_to_hub = str(run / STAGING), False
    try:
        yield staged
        wait()
        if args.should_save:
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and (best == final or best.exists()):
                state.best_model_checkpoint = str(best)
                state.save_to_json(str(staged / "trainer_state.json"))
            shutil.rmtree(final, ignore_errors=True)
            reveal(staged)
            os.replace(staged, final)
    finally:
        trainer.args = args
        if args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
    wait()
    if args.should_save:
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
