"""Merging an adapter into its base model, which makes a plain checkpoint."""

import os
from pathlib import Path

from transformers.utils import cached_file

from pertstate.base.checkpoint_files import check_finite_weights
from pertstate.data.record import RECORD_ARRAYS, RECORD_FILE
from pertstate.hub.checkpoints import load_adapter
from pertstate.hub.public_files import public_bytes
from pertstate.hub.publish import claimed_checkpoint, whole_checkpoint_folder


# The files in which an adapter's folder describes its training. They hold for the merged checkpoint, too.
_RECORDS = ("README.md", "training_args.json", RECORD_FILE, RECORD_ARRAYS)


def merge_adapter(
    name: str,
    output: str | os.PathLike,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    overwrite: bool = False,
):
    """
    Write the checkpoint that an adapter and its base model make together: `W + alpha / rank * B A` in place of each `W`,
    and the parts that were trained whole. It predicts what the adapter on its base model predicts, up to rounding.

    Args:
        output: the folder to write, whole or not at all.
        name, revision, base, base_revision: see [`load_adapter`].
        overwrite (`bool`): replace a checkpoint that is there.

    Raises:
        ValueError: see [`load_adapter`]; or merged weights are NaN or infinite; or the output is the adapter's own folder.
        FileExistsError, InUseError: see [`claimed_folder`].
        OSError: the disk is full; the output is as it was.
    """
    if Path(name).is_dir() and Path(output).resolve() == Path(name).resolve():
        raise ValueError(f"{output} is the adapter's own folder; write the merged checkpoint elsewhere")
    with claimed_checkpoint(output, overwrite):
        adapted, processor = load_adapter(name, revision, base, base_revision)
        # An adapter that other code made may lack these files.
        found = {
            record: cached_file(name, record, revision=revision, _raise_exceptions_for_missing_entries=False)
            for record in _RECORDS
        }
        merged = adapted.merge_and_unload()
        check_finite_weights(merged, f"{name}, merged")
        with whole_checkpoint_folder(output) as folder:
            merged.save_pretrained(folder)
            processor.save_pretrained(folder)
            for record, path in found.items():
                if path is not None:
                    own = record in (RECORD_FILE, RECORD_ARRAYS)  # written without paths
                    (folder / record).write_bytes(Path(path).read_bytes() if own else public_bytes(path))
