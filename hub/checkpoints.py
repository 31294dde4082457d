"""Checkpoints by name: a folder or a repository on the Hub, with a whole model or with an adapter."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModel
from transformers.utils import PROCESSOR_NAME, extract_commit_hash, find_adapter_config_file, is_peft_available

from pertstate.base.checkpoint_files import check_adapter, find_file, hub_arguments, read_header, read_json
from pertstate.base.hub_names import is_repository
from pertstate.base.messages import closest, some
from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.families import FAMILIES
from pertstate.hub.publish import ADAPTER_KEY, MODEL_KEY
from pertstate.hub.unchanged import read_unchanged
from pertstate.processing import StateProcessor


def check_name(name: str, asked_by: str):
    """
    Check that a name is a folder or has the form of a repository's name.

    Args:
        name (`str`): a folder, or the name of a repository on the Hub.
        asked_by (`str`): the start of the error, which says what the name is for.

    Raises:
        FileNotFoundError: the name is neither a folder nor that of a repository on the Hub, see [`is_repository`].
    """
    if not Path(name).is_dir() and not is_repository(name):
        raise FileNotFoundError(f"{asked_by} {name}: no such checkpoint folder (looked from {Path.cwd()})")


def adapter_config(name: str, revision: str | None = None) -> dict | None:
    """The settings of an adapter, with the name of its base model. None if the checkpoint is a whole model."""
    path = find_adapter_config_file(name, revision=revision)
    return None if path is None else read_json(path)


def load_whole(name: str, revision: str | None = None) -> tuple[PerturbationPreTrainedModel, StateProcessor]:
    """
    The model and the processor of a checkpoint. An adapter is merged into its base model. A folder that is replaced meanwhile
    is read again.

    Raises:
        ValueError: see [`CheckedPreTrainedModel`] and [`load_adapter`].
    """
    return read_unchanged(name, lambda: _load_whole(name, revision))


def _load_whole(name: str, revision: str | None) -> tuple[PerturbationPreTrainedModel, StateProcessor]:
    if adapter_config(name, revision) is not None:
        model, processor = load_adapter(name, revision)
        return model.merge_and_unload(), processor
    check_family(name, revision)
    processor = StateProcessor.from_pretrained(name, revision=revision)
    # Cells are float32. Weights that were saved in half of that are converted.
    return AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32), processor


def check_family(name: str, revision: str | None = None) -> str:
    """
    The family of a checkpoint, read from its `config.json` alone. Call it before an Auto class sees the checkpoint, because
    an Auto class also loads models of other packages, and their pickles.

    Returns:
        `str`: the `model_type` of the family.

    Raises:
        ValueError: there is no config, its family is not one of this package, or it or `processor_config.json` is not a JSON
            object or names code in a way that the Auto classes do not know.
    """
    if (of_processor := find_file(name, PROCESSOR_NAME, hub_arguments({"revision": revision}))) is not None:
        _check_code(read_json(of_processor), of_processor)
    path = find_file(name, MODEL_KEY, hub_arguments({"revision": revision}))
    if path is None:
        raise ValueError(f"{name}: expected a checkpoint, found no {MODEL_KEY}")
    content = read_json(path)
    _check_code(content, path)
    family = content.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{name} is a checkpoint of model_type={str(family)[:60]!r}, which is no family of pertstate; {closest(str(family), FAMILIES)}"
        )
    return family


def _check_code(content: dict, path: str):
    named = content.get("auto_map", {})
    if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
        raise ValueError(
            f"{path}: auto_map: expected classes by name, found {str(named)[:60]!r}; copy the checkpoint again"
        )


def load_adapter(
    name: str, revision: str | None = None, base: str | None = None, base_revision: str | None = None
) -> tuple:
    """
    An adapter on its base model, and the adapter's processor. The base model is first resized to the adapter's vocabulary.

    Args:
        name (`str`), revision (`str`, *optional*): folder or repository of the adapter.
        base (`str`), base_revision (`str`, *optional*): folder or repository of the base model; by default the one that
            the adapter names.

    Returns:
        `peft.PeftModel` in evaluation mode and [`StateProcessor`].

    Raises:
        ImportError: peft is not installed.
        ValueError: the checkpoint is no adapter, has no weights as safetensors, or does not fit the base model; or it is from
            the Hub and its base model is said to be a folder of this machine; or the base model is an adapter.
    """
    if not is_peft_available():
        raise ImportError("an adapter needs peft: pip install 'pertstate[lora]'")
    return read_unchanged(name, lambda: _load_adapter(name, revision, base, base_revision))


def _load_adapter(name: str, revision: str | None, base: str | None, base_revision: str | None) -> tuple:
    from peft import PeftModel, get_peft_model_state_dict

    own = find_adapter_config_file(name, revision=revision)
    if own is None:
        raise ValueError(
            f"{name} is no adapter: expected {ADAPTER_KEY}, found none; name the folder that a LoRA run wrote"
        )
    check_adapter(name, hub_arguments({"revision": revision}))
    if base is None:
        found = read_json(own)
        base, base_revision = found.get("base_model_name_or_path"), found.get("revision")
        if base is None:
            raise ValueError(f"{name} does not say what its base model is; name it with --base")
        if Path(base).is_dir() and extract_commit_hash(own, None) is not None:
            raise ValueError(
                f"{name} is an adapter from the Hub, and names a folder of this machine as its base model, {base}; if that is what "
                f"you want, merge them: pertstate merge {name} OUT --base {base}"
            )
        check_name(base, f"base model of {name} (--base names another one):")
    if adapter_config(base, base_revision) is not None:
        raise ValueError(
            f"the base model of {name}, {base}, is an adapter itself; merge it first: pertstate merge {base} OUT"
        )
    processor = StateProcessor.from_pretrained(name, revision=revision)
    model, of_base = load_whole(base, base_revision)
    if of_base.vocabulary != processor.vocabulary:
        model.resize_vocabulary(of_base.vocabulary, processor.vocabulary)
    model.config.set_size = processor.set_size
    try:
        adapted = PeftModel.from_pretrained(model, Path(own).parent).eval()
    except (KeyError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{name} does not fit the base model {base}: {error}") from error
    # peft only warns of missing tensors, and skips tensors that have no place in the model.
    asked = set(get_peft_model_state_dict(adapted))
    held = set(read_header(str(Path(own).parent / "adapter_model.safetensors")))
    if asked != held:
        raise ValueError(
            f"{name} does not fit the base model {base}: {some(asked ^ held, 3)} are only in one of the two"
        )
    return adapted, processor
