"""A training folder of the published research code turned into a checkpoint folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from pertstate._version import __version__
from pertstate.base.configuration_perturbation import EncoderConfig
from pertstate.base.constants import TASK, Values
from pertstate.base.markdown import as_text
from pertstate.base.messages import some
from pertstate.base.printable import get_logger
from pertstate.base.public import public_text
from pertstate.base.time_limit import time_limit
from pertstate.base.vocabulary import Vocabulary
from pertstate.configuration_state import StateConfig
from pertstate.families import FAMILIES
from pertstate.hub.card import (
    CARDS,
    TAGS,
    UNKNOWN_LICENSE,
)
from pertstate.hub.publish import claimed_checkpoint, whole_checkpoint_folder
from pertstate.legacy.folder import LegacyFolder, read_legacy_folder
from pertstate.legacy.weights import config_from_legacy, state_dict_from_legacy
from pertstate.processing import StateProcessor


logger = get_logger(__name__)

ATTENTION = ("bidirectional", "causal", "none")
_SEES = {
    "bidirectional": "bidirectional: every cell of a sentence sees all cells, and none sees their order",
    "causal": "causal: a cell sees itself and the cells before it, so predictions depend on the order of the cells",
    "none": "none: each cell sees itself alone",
}


@dataclass
class Converted:
    """
    The result of [`convert`]: the config, the processor, and a text that says which attention the model has and where that
    choice comes from.
    """

    config: EncoderConfig
    processor: StateProcessor
    attention: str


def convert(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    checkpoint: str | None = None,
    attention: str | None = None,
    genes: list[str] | None = None,
    overwrite: bool = False,
    seconds: float | None = None,
) -> Converted:
    r"""
    Write a checkpoint folder that predicts what the research code's own model predicts.

    Args:
        folder: the training folder, see [`~pertstate.legacy.folder.read_legacy_folder`].
        output: the folder to write, whole or not at all.
        checkpoint (`str`, *optional*): name of the file in `checkpoints/` to convert.
        attention (`str`, *optional*): which cells a cell saw in training, for the State transition model.

            - `"bidirectional"`: all cells of its sentence, without positions
            - `"causal"`: itself and those before it, with rotary positions (llama)
            - `"none"`: itself alone

            By default the flags in the folder decide. Without a flag, causal attention is assumed, and a warning says so.
        genes (`list[str]`, *optional*): names of the features in their order. For a model with a gene decoder, names of the
            genes that it predicts. By default the names in the folder.
        overwrite (`bool`): replace a checkpoint that is there.
        seconds (`float`, *optional*): how long it may take, in the main thread; by default a minute, and a second for each
            10 MB of the folder's files.

    Raises:
        FileExistsError, InUseError: see [`claimed_folder`].
        OSError: the disk is full; the output is as it was.
        FileNotFoundError: a file is missing.
        RefusedPickleError: a pickle names something that is not data; none of it was run.
        TimeoutError: it takes longer; the output is as it was.
        ValueError: names, sizes and weights do not fit together, or the model cannot be converted.
    """
    seconds = _SECONDS + _bytes_of(Path(folder)) / _BYTES_PER_SECOND if seconds is None else seconds
    late = (
        f"{folder}: its conversion took more than {seconds:g} s, and none that is known takes half of that; nothing is written. "
        "Give it more with --seconds (seconds=) if you trust the folder"
    )
    with claimed_checkpoint(output, overwrite), time_limit(seconds, late):
        return _convert(folder, Path(output), checkpoint, attention, genes)


# How long a conversion may take: published folders take some seconds, and disks read faster than this.
_SECONDS, _BYTES_PER_SECOND = 60, 10_000_000


def _bytes_of(folder: Path) -> int:
    """The size of the files that may be read."""
    files = [*folder.glob("*"), *folder.glob("checkpoints/*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _convert(
    folder: str | os.PathLike, output: Path, checkpoint: str | None, attention: str | None, genes: list[str] | None
) -> Converted:
    legacy = read_legacy_folder(folder, checkpoint)
    source = _choose_attention(legacy, attention)
    config = _config(legacy)
    processor = _processor(legacy, config, genes)
    model = _model(legacy, config)
    about = _about_attention(config, source)
    card = _card(legacy, config, processor, about, output.name)
    with whole_checkpoint_folder(output) as partial:
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(partial)
    return Converted(config, processor, about)


def _choose_attention(legacy: LegacyFolder, asked: str | None) -> str:
    """Set the flags of the research code to what was asked for. Returns, in words, where the choice comes from."""
    options = legacy.options
    if options["model_name"] != "state":
        if asked is not None:
            raise ValueError(
                f"{legacy.path}: attention={asked!r} is a choice of the State transition model, found a model "
                f"{options['model_name']!r}, which has no such modes; leave it out"
            )
        return ""
    if asked not in (None, *ATTENTION):
        raise ValueError(f"attention={asked!r}; expected one of {list(ATTENTION)}")
    inner = options.get("transformer_backbone_kwargs") or {}
    recorded = "bidirectional_attention" in inner or bool(options.get("mask_attn"))
    if asked is None and recorded:
        return "as the training recorded"
    if asked is None:
        logger.warning(
            f"{legacy.path}: no flag says how cells attended (bidirectional_attention is absent), so causal attention is "
            "assumed, with rotary positions for llama, as in the library versions of that time; predictions then depend on "
            "the order of cells. If the model was trained otherwise, say so with --attention bidirectional"
        )
        return "assumed, because no flag was recorded and the library versions of that time attended so"
    options["mask_attn"] = asked == "none"
    options["transformer_backbone_kwargs"] = {**inner, "bidirectional_attention": asked == "bidirectional"}
    return "chosen at the conversion" + ("" if recorded else "; no flag was recorded")


def _about_attention(config: EncoderConfig, source: str) -> str:
    if not isinstance(config, StateConfig):
        return ""
    positions = ", with rotary positions" if config.positions == "rope" else ""
    return f"{_SEES[config.attention]}{positions} ({source})"


def _config(legacy: LegacyFolder) -> EncoderConfig:
    options = dict(legacy.options)
    adapters = options.get("lora")
    if isinstance(adapters, dict) and adapters.get("enable"):
        raise ValueError(f"{legacy.path}: the model was trained with LoRA adapters; merge them into its weights first")
    try:
        config = config_from_legacy(options)
    except ValueError as error:
        raise ValueError(f"{legacy.path}: its options cannot be converted: {error}") from error
    if legacy.contexts:
        config.num_contexts = len(legacy.contexts)
    if not config.embeds_batches:
        config.num_batches = len(legacy.batches) or None
    elif not legacy.batches:
        raise FileNotFoundError(
            f"{legacy.path}: the model embeds batches; expected batch_onehot_map (.torch or .pkl), found none: copy it from "
            "where the model was trained"
        )
    return config


def _processor(legacy: LegacyFolder, config: EncoderConfig, genes: list[str] | None) -> StateProcessor:
    embed_key = legacy.options.get("embed_key")
    decodes = config.gene_dim is not None
    on_expression = embed_key in (None, "X_hvg") and not decodes
    expected = config.gene_dim if decodes else config.input_dim if on_expression else None
    names = _genes(legacy, expected, genes)
    settings: dict[str, Any] = {"input": "X" if embed_key is None else f"obsm/{embed_key}", "values": Values.EMBEDDING}
    if decodes:
        if names is None:
            raise ValueError(
                f"{legacy.path}: the model decodes {expected} genes, whose names the folder does not hold; give them with "
                "--genes FILE, one on a line in the order of the training"
            )
        settings["gene_input"] = "X"
    elif names is not None:
        settings = {"input": "X", "values": Values.COUNTS if legacy.data.get("int_counts") else Values.LOG1P}
    elif on_expression:
        logger.warning(
            f"{legacy.path}: the folder does not hold the names of the model's {expected} genes; cells are read from "
            f"{settings['input']} in the order of the training. With --genes FILE they are read by name"
        )
    if not decodes and config.output_dim != config.input_dim:
        raise ValueError(
            f"{legacy.path}: the model reads {config.input_dim} features and predicts {config.output_dim} others, whose "
            "names and units the folder does not hold; only models that predict what they read, or with a gene decoder, "
            "can be converted"
        )
    batch_key = None
    if config.embeds_batches:
        batch_key = legacy.data.get("batch_col")
        if not isinstance(batch_key, str):
            raise ValueError(
                f"{legacy.path}: the model embeds batches; expected the obs column as batch_col in data.kwargs, found none"
            )
    return StateProcessor(
        Vocabulary(names or [], legacy.perturbations, legacy.contexts, legacy.batches),
        perturbation_key=legacy.data["pert_col"],
        control=legacy.data["control_pert"],
        context_key=legacy.data["cell_type_key"],
        batch_key=batch_key,
        # The research code did not split labels.
        combination_separator=None,
        feature_dim=config.input_dim,
        set_size=config.set_size,
        **settings,
    )


def _genes(legacy: LegacyFolder, expected: int | None, given: list[str] | None) -> list[str] | None:
    """The names of `expected` genes. None if the model has no genes, or their names are not known."""
    if expected is None:
        if given is not None:
            raise ValueError(
                f"{legacy.path}: the model reads and predicts an embedding and has no genes; leave them out"
            )
        return None
    if given is not None:
        if len(given) != expected:
            raise ValueError(f"genes: expected the names of the model's {expected} genes, found {len(given)}")
        return given
    found = legacy.genes
    if found is None or len(found) == expected:
        return found
    others = {legacy.options.get(name) for name in ("gene_dim", "hvg_dim")}
    if len(found) not in others:
        raise ValueError(
            f"{legacy.path}: expected the names of {expected} genes, found {len(found)} gene_names; give them with --genes "
            "FILE, one on a line in the order of the training"
        )
    logger.warning(f"{legacy.path}: its {len(found)} gene_names are not those of the model's {expected} features")
    return None


def _model(legacy: LegacyFolder, config: EncoderConfig):
    """The model with its weights. ValueError if a weight is missing, has another shape, or is not finite."""
    family = FAMILIES[config.model_type].model
    weights = {name: tensor.load() for name, tensor in legacy.weights.items()}
    try:
        weights = state_dict_from_legacy(weights, config)
    except ValueError as error:
        raise ValueError(f"{legacy.checkpoint}: {error}") from error
    # Only shapes are made here: no memory is allocated until the sizes in the options are known to be those of the weights.
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in family(config).state_dict().items()}
    except (RuntimeError, TypeError) as error:
        # torch raises one or the other for sizes that overflow.
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{legacy.path}: no model can have the sizes of the options: {why}") from error
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [
        f"{name} {found[name]} for {expected[name]}"
        for name in expected
        if found.get(name, expected[name]) != expected[name]
    ]
    if missing or unexpected or other:
        said = {"missing": missing, "unexpected": unexpected, "of another shape": other}
        raise ValueError(
            f"{legacy.checkpoint}: the weights are not those of the options: "
            + "; ".join(f"{what} {some(names)}" for what, names in said.items() if names)
        )
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{legacy.checkpoint}: expected finite weights, found NaN or infinity in {some(broken)}")
    model = family(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _names(names: list[str], none: str) -> str:
    if not names:
        return none
    return f"{len(names)}: " + as_text(", ".join(names[:20])) + (", ..." if len(names) > 20 else "")


def _card(legacy: LegacyFolder, config: EncoderConfig, processor: StateProcessor, attention: str, name: str) -> str:
    vocabulary = processor.vocabulary
    training = {key: value for key, value in legacy.training.items() if isinstance(value, str | int | float)}
    values = {Values.LOG1P: "log1p expression", Values.COUNTS: "raw counts", Values.EMBEDDING: "an embedding"}[
        processor.values
    ]
    card = ModelCard.from_template(
        ModelCardData(
            license=UNKNOWN_LICENSE, library_name="transformers", pipeline_tag=TASK, tags=TAGS, model_name=name
        ),
        template_path=str(CARDS / "converted.md"),
        model_name=as_text(name),
        model_type=config.model_type,
        about=FAMILIES[config.model_type].card,
        folder=as_text(os.path.basename(os.path.realpath(legacy.path))),
        checkpoint=as_text(legacy.checkpoint.name),
        sha256=legacy.sha256(),
        progress=legacy.progress or "epoch and step not recorded",
        attention=attention,
        permutes=config.attention != "causal" if attention else True,
        columns={
            key: as_text(getattr(processor, key))
            for key in ("perturbation_key", "control", "context_key", "batch_key", "input")
            if getattr(processor, key) is not None
        },
        values=values,
        genes=_names(vocabulary.genes, "not named"),
        contexts=_names(vocabulary.contexts, "not recorded"),
        batches=_names(vocabulary.batches, "not recorded"),
        perturbations=_names(vocabulary.perturbations, "none"),
        control_row=processor.control in vocabulary.perturbations,
        training=[(as_text(key), as_text(str(value)[:200])) for key, value in training.items()],
        version=__version__,
        feature_dim=processor.feature_dim,
        set_size=config.set_size,
    )
    return public_text(card.content)
