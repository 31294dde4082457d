"""Reading other people's cells: files whose columns and controls have other names than in the training data."""

from typing import Any

from pertstate.base.labels import LabelSettings, control_settings
from pertstate.base.messages import instead
from pertstate.data.reading import AnnDataFile
from pertstate.processing import StateProcessor


def read_as(
    processor: StateProcessor,
    data: AnnDataFile,
    reading: dict[str, Any],
    contexts: list[str] | None = None,
    all_are_controls: bool = False,
    needs_batches: bool = True,
) -> StateProcessor:
    """
    A model's processor that reads somebody else's file.

    Args:
        processor ([`StateProcessor`]): the model's own processor.
        data ([`AnnDataFile`]): the file.
        reading (`dict`): `perturbation_key`, `context_key`, `batch_key` and `control`, if they differ from those of the
            training data, and `dataset`, if the training data had several. None means "as in the training data".
        contexts (`list[str]`, *optional*): the contexts asked for. If the file has no column of contexts, the one name here is
            the context of all cells.
        all_are_controls (`bool`): every cell is a control; no column of perturbations is read.
        needs_batches (`bool`): whether the model uses batches. If not, the column of batches may be absent.

    Raises:
        KeyError: the file has no column of perturbations.
        ValueError: the file has no column of contexts, and `contexts` does not name exactly one.
    """
    settings = {name: value for name, value in reading.items() if value is not None}
    if "control" in settings:
        settings |= control_settings(settings["control"])
    changed = {field: settings[field] for field in LabelSettings.__dataclass_fields__ if field in settings}
    if all_are_controls:
        changed |= {"perturbation_key": None, "dose_key": None}
    columns = data.obs_columns
    perturbation_key = changed.get("perturbation_key", processor.perturbation_key)
    if perturbation_key is not None and perturbation_key not in columns:
        raise KeyError(
            f"obs has no column {perturbation_key!r} (perturbation), {instead(perturbation_key, columns)}; "
            "name it with --perturbation-key, or say with --all-are-controls that every cell is a control"
        )
    batch_keys = changed.get("batch_key", processor.batch_key)
    if not needs_batches and "batch_key" not in settings and not _in(batch_keys, columns):
        changed["batch_key"] = None
    context_key = changed.get("context_key", processor.context_key)
    if processor.context is None and "context_key" not in settings and not _in(context_key, columns):
        if contexts is None or len(contexts) != 1:
            raise ValueError(
                f"obs has no column {context_key!r} (context), {instead(str(context_key), columns)}; name "
                "the column with --context-key, or the one context of all cells with --context"
            )
        changed |= {"context_key": None, "context": contexts[0]}
    reader = processor.with_vocabulary(processor.vocabulary, **changed)
    reader.origin = processor.origin
    return reader


def _in(keys: str | list[str] | None, columns: list[str]) -> bool:
    return set([] if keys is None else [keys] if isinstance(keys, str) else keys) <= set(columns)
