"""Finding the files of a checkpoint, and checking them before a model is made. Each fault has an error of its own."""

import copy
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
)

from .bounded_text import LARGEST_JSON, load_json
from .configuration_perturbation import PIPELINES, PerturbationConfig
from .constants import TASK
from .messages import some
from .travelling import Travelling


HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Endings of the pickles that torch itself and research code write.
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".torch")
# The name of a file, never a path: no separator of any system, no drive, no dot at the start.
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")
# Pieces of a distributed checkpoint, which transformers would read instead of the checked files.
_DISTRIBUTED_PIECE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Sizes up to this one can be multiplied with one another in 64 bits.
LARGEST_SIZE = 2**30


def hub_arguments(options: dict) -> dict:
    """The options of a `from_pretrained` that say where files are found."""
    return {name: options[name] for name in HUB_ARGUMENTS if options.get(name) is not None}


def find_file(name: str | os.PathLike, file: str, hub: dict) -> str | None:
    """The path of a checkpoint's file, in its folder or in the cache of the Hub; None where the checkpoint has none."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)


def read_json(path: str | os.PathLike, largest: int = LARGEST_JSON) -> dict:
    """
    Args:
        largest (`int`): bytes. A file with more is not read.

    Raises:
        ValueError: the file is not one JSON object, is larger, or says something twice.
    """
    content = load_json(path, largest, "copy the checkpoint again")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}; copy the checkpoint again")
    return content


# Weights


@dataclass
class StoredTensor:
    """
    A tensor as the header of its file describes it; its values have not been read. `kind` is `"float"`, `"int"` or `"bool"`.
    Loading converts between types of one kind.
    """

    shape: tuple[int, ...]
    kind: str
    file: str


def stored_tensors(name: str | os.PathLike, hub: dict, variant: str | None = None) -> dict[str, StoredTensor]:
    """
    The tensors of a checkpoint by name, from the headers of its safetensors file or files.

    Args:
        name: folder, or repository on the Hub.
        hub (`dict`): [`hub_arguments`].
        variant (`str`, *optional*): as in transformers, `model.VARIANT.safetensors`.

    Raises:
        ValueError: there is no safetensors file, it is not whole, or its index is damaged or points elsewhere.
    """
    single, index = (
        file if variant is None else re.sub(r"\.safetensors", rf".{variant}.safetensors", file, count=1)
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    folder = Path(name, hub.get("subfolder", ""))
    there = sorted(os.listdir(folder)) if folder.is_dir() else []
    pieces = [file for file in there if _DISTRIBUTED_PIECE.fullmatch(file)]
    if pieces:
        raise ValueError(
            f"{folder}: expected {single} or {index}, found pieces of a distributed checkpoint {some(pieces, 3)}; save the "
            "model with save_pretrained"
        )
    if (path := find_file(name, single, hub)) is not None:
        return read_header(path)
    if (path := find_file(name, index, hub)) is None:
        pickles = [file for file in there if file.endswith(_PICKLES)]
        found = f"found {some(pickles, 3)}" if pickles else "found neither"
        raise ValueError(
            f"{name}: expected weights in {single} or {index}, {found}; pickles (pytorch_model.bin, .pt, .ckpt ..) can run "
            "code and are never read: save the weights as safetensors where you trust them"
        )
    tensors: dict[str, StoredTensor] = {}
    for file, listed in _read_index(path).items():
        if (shard := find_file(name, file, hub)) is None:
            raise ValueError(f"{path} names {file!r}, which is not there; copy the checkpoint again")
        held = read_header(shard)
        if set(held) != listed:
            raise ValueError(
                f"{shard}: expected the tensors that {os.path.basename(path)} lists, found {some(set(held) ^ listed, 3)} in "
                "one of them alone; copy the checkpoint again"
            )
        tensors |= held
    return tensors


def _read_index(path: str) -> dict[str, set[str]]:
    """File to the names of its tensors."""
    content = read_json(path)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not isinstance(content.get("metadata"), dict):
        raise ValueError(
            f"{path}: expected the objects 'weight_map' and 'metadata', found {some(content)}; copy the checkpoint again"
        )
    files: dict[str, set[str]] = {}
    for tensor, file in places.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise ValueError(
                f"{path}: expected the name of a safetensors file beside it for tensor {tensor!r}, found {file!r}; do not "
                "use this checkpoint, it points outside of its folder"
            )
        files.setdefault(file, set()).add(tensor)
    return files


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """
    The tensors of one safetensors file by name.

    Raises:
        ValueError: the file is not as long as its header says, or has none.
        OSError: it is not there, or may not be read.
    """
    with open(path, "rb"):  # safetensors says of a file without rights that there is none
        pass
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: StoredTensor(tuple(s.get_shape()), _kind(s.get_dtype()), str(path)) for name, s in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path}: its weights are not a whole safetensors file ({error}); copy the checkpoint again"
        ) from error


def _kind(dtype: str) -> str:
    return "bool" if dtype == "BOOL" else "float" if dtype.startswith(("F", "BF")) else "int"


def described(state_dict: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Tensors in memory as [`stored_tensors`] describes those of files."""

    def kind(tensor: torch.Tensor) -> str:
        return "bool" if tensor.dtype == torch.bool else "float" if tensor.is_floating_point() else "int"

    return {name: StoredTensor(tuple(t.shape), kind(t), "the given state_dict") for name, t in state_dict.items()}


def check_weights(
    build: Callable[[PerturbationConfig], nn.Module],
    config: PerturbationConfig,
    stored: dict[str, StoredTensor],
    ignore_mismatched_sizes: bool = False,
):
    """
    Check that the stored tensors are those of the model that the config asks for. No memory is allocated.

    Args:
        build (`Callable`): makes the model, called on the meta device.
        ignore_mismatched_sizes (`bool`): let tensors of other shapes pass.

    Raises:
        ValueError: tensors are missing, too many, or of another shape or kind; the config asks for absurd sizes.
    """
    where = some(sorted({tensor.file for tensor in stored.values()}), 3) if stored else "the weights"
    _check_sizes(config, len(stored), where)
    try:
        with torch.device("meta"):
            wanted = described(build(copy.deepcopy(config)).state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"the config asks for tensors that do not fit in any memory ({error}), found {len(stored)} tensors in {where}; "
            f"correct {CONFIG_NAME}, or copy the checkpoint again"
        ) from error
    for what, names in (
        ("are missing from", [name for name in wanted if name not in stored]),
        ("are unknown to this model, but stand in", [name for name in stored if name not in wanted]),
    ):
        if names:
            raise ValueError(
                f"{len(names)} tensors {what} {where}: {some(names, 3)}; expected the {len(wanted)} tensors that "
                f"{CONFIG_NAME} asks for, found {len(stored)}: the files belong to different models, or one is damaged; "
                "copy the checkpoint again"
            )
    for name, tensor in wanted.items():
        found = stored[name]
        if tensor.shape != found.shape and not ignore_mismatched_sizes:
            others = sum(value.shape != stored[key].shape for key, value in wanted.items())
            raise ValueError(
                f"{found.file}: tensor {name!r} has another shape than {CONFIG_NAME} asks for: expected {tensor.shape}, found "
                f"{found.shape} ({others} such tensors of {len(wanted)}); the files belong to different models: copy the "
                "checkpoint again"
            )
        if tensor.kind != found.kind:
            raise ValueError(
                f"{found.file}: tensor {name!r}: expected values of kind {tensor.kind}, found {found.kind}; the file is not "
                "of this model: copy the checkpoint again"
            )


def _check_sizes(config: PerturbationConfig, count: int, where: str):
    """ValueError for sizes that the files cannot hold: modules of such sizes would fill the memory before any comparison."""
    for field in fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, list) else [value]
        largest = max((number for number in numbers if isinstance(number, int)), default=0)
        if largest > LARGEST_SIZE:
            raise ValueError(
                f"{field.name}: expected at most {LARGEST_SIZE}, found {largest}, which is absurd; correct {CONFIG_NAME}, or "
                "copy the checkpoint again"
            )
        # A list of widths has a layer for each.
        layers = largest if field.name.endswith("_layers") else len(numbers) if field.name.endswith("_sizes") else 0
        if layers > max(1, count):
            raise ValueError(
                f"{field.name} asks for {layers} layers: expected at most {count}, the number of tensors in {where}; correct "
                f"{CONFIG_NAME}, or copy the checkpoint again"
            )


def check_finite_weights(model: nn.Module, name: str | os.PathLike):
    """ValueError that names the first parameter or buffer with a value that is NaN or infinite."""
    for key, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # Minimum and maximum are NaN where any value is, and need no memory beside the tensor.
        if not math.isfinite(sum(map(float, torch.aminmax(tensor.detach())))):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{name}: expected finite weights, found {bad} of {tensor.numel()} values of tensor {key!r} NaN or infinite; "
                "its training diverged or the file is damaged: use another checkpoint"
            )


# The settings that an adapter may have. Any other must be empty: other methods of peft load further files, or lay out
# other tensors.
_LARGEST_RANK = 4096
_ADAPTER_SETTINGS: dict[str, tuple[Callable, str]] = {
    "peft_type": (lambda value: value == "LORA", "'LORA', a low-rank adapter"),
    "r": (lambda value: type(value) is int and 1 <= value <= _LARGEST_RANK, f"a rank from 1 to {_LARGEST_RANK}"),
    "lora_alpha": (lambda value: _is_number(value) and 0 < value <= 1e6, "a number above 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a share below 1"),
    "target_modules": (lambda value: _are_modules(value) and value != [], "a list of names of layers"),
    "modules_to_save": (lambda value: value is None or _are_modules(value), "a list of names of modules, or null"),
    "bias": (lambda value: value == "none", "'none'"),
    "init_lora_weights": (lambda value: type(value) is bool, "true or false"),
    "inference_mode": (lambda value: type(value) is bool, "true or false"),
    "use_rslora": (lambda value: type(value) is bool, "true or false"),
    "base_model_name_or_path": (lambda value: value is None or _is_written(value), "a name, or null"),
    "revision": (lambda value: value is None or _is_written(value), "a revision, or null"),
    # These have no effect here.
    "auto_mapping": (lambda value: value is None or isinstance(value, dict), "a mapping, or null"),
    "megatron_core": (lambda value: isinstance(value, str), "a name"),
    "peft_version": (lambda value: isinstance(value, str), "a version"),
    "qalora_group_size": (lambda value: type(value) is int, "a number"),
    "task_type": (lambda value: value is None or isinstance(value, str), "a name, or null"),
}
_NEEDED_OF_ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules")
_LONGEST_PLACE = 2000
_MODULE_NAME = re.compile(r"\w+(\.\w+)*")


def _is_written(value) -> bool:
    return isinstance(value, str) and 0 < len(value) < 4096 and value.isprintable()


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_modules(value) -> bool:
    names = isinstance(value, list) and len(value) <= 10_000 and all(isinstance(name, str) for name in value)
    return names and all(len(name) <= 1000 and _MODULE_NAME.fullmatch(name) for name in value)


def adapter_settings(name: str | os.PathLike, hub: dict) -> dict:
    """
    The settings of an adapter.

    Raises:
        ValueError: it is no low-rank adapter, or a setting is unknown or out of bounds.
    """
    if (path := find_file(name, "adapter_config.json", hub)) is None:
        raise ValueError(f"{name} is no adapter: expected adapter_config.json, found none")
    settings = read_json(path)
    missing = [key for key in _NEEDED_OF_ADAPTER if key not in settings]
    if missing:
        raise ValueError(f"{path} lacks {missing}; copy the adapter again")
    for key, value in settings.items():
        fits, expected = _ADAPTER_SETTINGS.get(key, (lambda value: value in (None, False, {}, []), "nothing"))
        if not fits(value):
            raise ValueError(f"{path}: {key} is {_shortened(value)}, expected {expected}; copy the adapter again")
    return settings


def check_adapter(name: str | os.PathLike, hub: dict):
    """
    Check an adapter before anything is made of it: its settings, and that its safetensors file holds the finite tensors that
    they ask for.

    Raises:
        ValueError: it is no low-rank adapter, a setting is unknown or out of bounds, or tensors are missing, of another shape,
            or not finite. A pickle is never read.
    """
    settings = adapter_settings(name, hub)
    if (weights := find_file(name, "adapter_model.safetensors", hub)) is None:
        raise ValueError(
            f"{name}: expected the adapter's weights in adapter_model.safetensors, found none; adapter_model.bin is a "
            "pickle, which can run code and is never read: save the adapter as safetensors where you trust it"
        )
    tensors = read_header(weights)
    wanted = {(layer, half) for layer in settings["target_modules"] for half in "AB"}
    found = set()
    for key, tensor in tensors.items():
        for half in "AB":
            meant = _layers_of(key, half) & wanted
            if meant and (len(tensor.shape) != 2 or tensor.shape[0 if half == "A" else 1] != settings["r"]):
                raise ValueError(f"{weights}: {key} has shape {tensor.shape}, expected one of rank {settings['r']}")
            found |= meant
    for layer, half in sorted(wanted - found):
        raise ValueError(f"{weights} lacks the tensor lora_{half} of {layer}; copy the adapter again")
    with safe_open(weights, framework="pt") as file:
        for key in tensors:
            if not file.get_tensor(key).isfinite().all():
                raise ValueError(f"{weights}: {key} holds NaN or infinite values; copy the adapter again")


def _layers_of(key: str, half: str) -> set[tuple[str, str]]:
    """The names by which an adapter may call the layer of a tensor: its place in the model, and every end of it."""
    place = key.removesuffix(f".lora_{half}.weight")
    if place == key or len(key) > _LONGEST_PLACE:
        return set()
    parts = place.split(".")
    return {(".".join(parts[i:]), half) for i in range(len(parts))}


def _shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}.."


class CheckedPreTrainedModel(Travelling, PreTrainedModel):
    """A [`PreTrainedModel`] that loads safetensors files alone, and checks first that they are what its config asks for."""

    loaded_by = "AutoModel"

    def _settings(self):
        return self.config

    def _save_code(self, folder: Path):
        # The import makes the module travel with every model: a pipeline is made of a model's folder.
        from .pipeline_perturbation import PerturbationPredictionPipeline

        name = (
            f"{PerturbationPredictionPipeline.__module__.rpartition('.')[2]}.{PerturbationPredictionPipeline.__name__}"
        )
        self.config.custom_pipelines = {TASK: {**PIPELINES[TASK], "impl": name}}
        super()._save_code(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As in [`PreTrainedModel`], from safetensors alone. A loaded model predicts what the saved one did, bit for bit on
        the same machine.

        Raises:
            ValueError: there are no safetensors files, they are damaged, or they are not exactly the finite tensors that
                the config asks for (`ignore_mismatched_sizes=True` draws those of another shape anew).
        """
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False: pickles can run code and are never read; leave it out")
        hub, config, state_dict = hub_arguments(kwargs), kwargs.get("config"), kwargs.get("state_dict")
        if not isinstance(config, PreTrainedConfig):
            own = {name: kwargs[name] for name in cls.config_class.__dataclass_fields__ if name in kwargs}
            source = pretrained_model_name_or_path if config is None else config
            config = cls.config_class.from_pretrained(source, **hub, **own)
        if state_dict is None:
            stored = stored_tensors(pretrained_model_name_or_path, hub, kwargs.get("variant"))
            commit = extract_commit_hash(next(iter(stored.values())).file, None) if stored else None
            if commit is not None:
                # A branch may move meanwhile: load the very commit that was checked.
                kwargs["revision"] = commit
        else:
            stored = described(state_dict)
        check_weights(cls, config, stored, kwargs.get("ignore_mismatched_sizes", False))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # Weights mapped from a file lie at its offsets, and on a CPU the rounding of a matrix product depends on how
        # its operands are aligned. A copy in memory of its own is aligned as in training.
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        check_finite_weights(model, pretrained_model_name_or_path)
        return loaded

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As in [`PreTrainedModel`], from safetensors alone, once [`check_adapter`] has seen it."""
        if peft_model_id is not None:
            load_config = kwargs.get("load_config")
            # While a model is loaded, the options of its own repository apply, unless the adapter sets its own.
            options = {
                **(kwargs if load_config is None else load_config.download_kwargs),
                **(kwargs.get("adapter_kwargs") or {}),
            }
            check_adapter(peft_model_id, hub_arguments(options))
        return super().load_adapter(peft_model_id, *args, **kwargs)
