"""Merging an adapter into its base model, which makes a plain checkpoint."""

import os
from pathlib import Path

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from pertstate.base.checkpoint_files import check_finite_weights, read_json
from pertstate.base.messages import given
from pertstate.data.record import RECORD_ARRAYS, RECORD_FILE, RunRecord
from pertstate.evaluation.report_data import SCORES_FOLDER
from pertstate.evaluation.scores import SUMMARY, Scores
from pertstate.hub.card import Merged, render_card
from pertstate.hub.checkpoints import load_adapter
from pertstate.hub.public_files import public_bytes
from pertstate.hub.publish import ADAPTER_KEY, claimed_checkpoint, whole_checkpoint_folder


_ARGUMENTS = "training_args.json"
# The files in which an adapter's folder describes its training. They hold for the merged checkpoint, too.
_RECORDS = (_ARGUMENTS, RECORD_FILE, RECORD_ARRAYS)


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
    if Path(name).is_dir() and os.path.realpath(output) == os.path.realpath(name):
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
            made_of = _made_of(name, revision, base, base_revision, Path(output), folder)
            card = render_card(
                None,
                merged.config,
                processor,
                record=RunRecord.load(folder) if (folder / RECORD_FILE).is_file() else None,
                scores=_scores_of(name),
                merged=made_of,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")


def _made_of(
    name: str, revision: str | None, base: str | None, base_revision: str | None, output: Path, folder: Path
) -> Merged:
    """What the card of the merged checkpoint says of its adapter and its base model."""
    config = given("the config of the adapter", cached_file(name, ADAPTER_KEY, revision=revision))
    if base is None:
        said = read_json(config)
        base, base_revision = said["base_model_name_or_path"], said.get("revision")
    arguments = read_json(folder / _ARGUMENTS) if (folder / _ARGUMENTS).is_file() else {}
    return Merged(
        adapter=name,
        base=base,
        adapter_revision=extract_commit_hash(config, None),
        base_revision=base_revision,
        output=output.name,
        license=arguments.get("license"),
        data_license=arguments.get("data_license"),
        has_arguments=bool(arguments),
    )


def _scores_of(name: str) -> Scores | None:
    """The scores of an adapter's run, if its folder is here and holds them."""
    folder = Path(name) / SCORES_FOLDER
    return Scores.load(folder) if (folder / SUMMARY).is_file() else None
