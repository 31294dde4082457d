"""What a checkpoint or an adapter holds, in words."""

import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from pertstate.base.cell_values import describe_reading
from pertstate.base.checkpoint_files import StoredTensor, adapter_settings, check_adapter, read_header, stored_tensors
from pertstate.base.messages import some
from pertstate.base.printable import joined_lines
from pertstate.base.vocabulary import VOCABULARY_FILE, Vocabulary
from pertstate.data.info import verdict
from pertstate.hub.checkpoints import check_family, check_name
from pertstate.hub.publish import ADAPTER_KEY, MODEL_KEY
from pertstate.processing import StateProcessor


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any(Path(path, key).is_file() for key in (MODEL_KEY, ADAPTER_KEY))


def describe_checkpoint(path: str | os.PathLike) -> str:
    """
    What a checkpoint folder or an adapter folder holds, and what is missing before it can be used.

    Raises:
        ValueError: its JSON files, its processor or its vocabulary are damaged.
    """
    path = Path(path)
    lines, problems = _adapter(path) if (path / ADAPTER_KEY).is_file() else _model(path)
    if (path / VOCABULARY_FILE).is_file():
        lines += _names(path)
    else:
        problems.append(f"{VOCABULARY_FILE} is missing: nobody knows which gene is which")
    ready = f"pertstate predict --model {path} --adata CELLS.h5ad --output PREDICTED.h5ad"
    return joined_lines([*lines, *verdict(problems, ready, "it can be used")])


def _model(path: Path) -> tuple[list[str], list[str]]:
    check_family(str(path))
    config = AutoConfig.from_pretrained(path)
    title = f"{path}: checkpoint of {config.model_type}"
    try:
        tensors = stored_tensors(path, {})
    except ValueError as error:
        return [title], [str(error)]
    files = {tensor.file for tensor in tensors.values()}
    with torch.device("meta"):
        buffers = {name for name, _ in AutoModel.from_config(config).named_buffers()}
    learned = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    return [f"{title}, {_parameters(learned)}" + (f" in {len(files)} files" if len(files) > 1 else "")], []


def _adapter(path: Path) -> tuple[list[str], list[str]]:
    config = adapter_settings(path, {})
    title, problems = f"{path}: adapter of rank {config['r']}, alpha {config['lora_alpha']}", []
    try:
        check_adapter(path, {})
        title += f", {_parameters(read_header(path / 'adapter_model.safetensors'))}"
    except ValueError as error:
        problems.append(str(error))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    try:
        check_name(str(base), "base model")
    except FileNotFoundError as error:
        problems.append(str(error))
    layers = config["target_modules"]
    lines = [
        title,
        f"base model: {base}" + (f" at {revision}" if revision else ""),
        f"adapted: {len(layers)} layers, {some(sorted(layers), 3)}",
    ]
    if config.get("modules_to_save"):
        lines.append(f"trained whole: {some(sorted(config['modules_to_save']), 5)}")
    return lines, problems


def _parameters(tensors: dict[str, StoredTensor]) -> str:
    return f"{sum(int(np.prod(tensor.shape)) for tensor in tensors.values()):,} parameters"


def _names(path: Path) -> list[str]:
    """How cells are read, and the names that the model knows."""
    vocabulary, settings = Vocabulary.from_file(path / VOCABULARY_FILE), StateProcessor.from_pretrained(path)
    reads = describe_reading(settings.normalize, settings.values, settings.target_sum)
    return [
        f"reads: {reads} from {settings.input}, {settings.feature_dim:,} features; sentences of {settings.set_size} cells",
        f"columns: perturbation {settings.perturbation_key!r} (control {settings.control!r}), context "
        f"{settings.context_key!r}"
        + "".join(
            f", {name} {key!r}" for name, key in (("batch", settings.batch_key), ("dose", settings.dose_key)) if key
        ),
        f"genes ({len(vocabulary.genes):,}): {some(vocabulary.genes, 5)}",
        f"perturbations ({len(vocabulary.perturbations):,}): {some(vocabulary.perturbations, 5)}",
        f"contexts ({len(vocabulary.contexts):,}): {some(vocabulary.contexts, 5)}",
    ]
