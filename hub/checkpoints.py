"""Checkpoints by name: a folder or a repository on the Hub, with a whole model or with an adapter."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor
from transformers.utils import find_adapter_config_file, is_peft_available

from pertstate.base.checkpoint_files import (
    check_adapter,
    hub_arguments,
    read_json,
)
from pertstate.base.hub_names import is_repository
from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.hub.publish import ADAPTER_KEY
from pertstate.processing import StateProcessor


def check_name(name: str, asked_by: str):
    """
    Raises:
        FileNotFoundError: the name is neither a folder nor that of a repository on the Hub, see [`is_repository`].
    """
    if not Path(name).is_dir() and not is_repository(name):
        raise FileNotFoundError(f"{asked_by} {name}: no such checkpoint folder (looked from {Path.cwd()})")


def adapter_config(name: str, revision: str | None = None) -> dict | None:
    """The settings of an adapter, its base model among them; None if the checkpoint is a whole model."""
    path = find_adapter_config_file(name, revision=revision)
    return None if path is None else read_json(path)


def load_whole(name: str, revision: str | None = None) -> tuple[PerturbationPreTrainedModel, StateProcessor]:
    """
    The model and the processor of a checkpoint. An adapter is merged into its base model.

    Raises:
        ValueError: see [`CheckedPreTrainedModel`] and [`load_adapter`].
    """
    if adapter_config(name, revision) is not None:
        model, processor = load_adapter(name, revision)
        return model.merge_and_unload(), processor
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    return AutoModel.from_pretrained(name, revision=revision), processor


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
        ValueError: the checkpoint is no adapter, has no weights as safetensors, or does not fit the base model.
    """
    if not is_peft_available():
        raise ImportError("an adapter needs peft: pip install 'pertstate[lora]'")
    from peft import PeftModel

    own = find_adapter_config_file(name, revision=revision)
    if own is None:
        raise ValueError(
            f"{name} is no adapter: expected {ADAPTER_KEY}, found none; name the folder that a LoRA run wrote"
        )
    if base is None:
        found = read_json(own)
        base, base_revision = found["base_model_name_or_path"], found["revision"]
        check_name(base, f"the base model of {name}, (say where it is with --base)")
    check_adapter(name, hub_arguments({"revision": revision}))
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    model, of_base = load_whole(base, base_revision)
    if of_base.vocabulary != processor.vocabulary:
        model.resize_vocabulary(of_base.vocabulary, processor.vocabulary)
    model.config.set_size = processor.set_size
    try:
        return PeftModel.from_pretrained(model, Path(own).parent).eval(), processor
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name} does not fit the base model {base}: {error}") from error
