"""Reading the folder that the published research code leaves after a training: options, names, weights."""

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pertstate.base.messages import some
from pertstate.base.printable import get_logger
from pertstate.data.bounded_yaml import BoundedLoader, load_yaml
from pertstate.data.restricted_pickle import StoredArray, StoredTensor, check_stored_apart, read_pickled


logger = get_logger(__name__)

_ENDINGS = (".pt", ".torch", ".pkl")
# If a folder has several checkpoints, the first of these that is there is taken.
_PREFERRED = ("final.ckpt", "last.ckpt")
_SIZES = (
    "input_dim",
    "output_dim",
    "pert_dim",
    "batch_dim",
    "gene_dim",
    "hvg_dim",
    "hidden_dim",
    "cell_set_len",
    "n_encoder_layers",
    "n_decoder_layers",
)
# Options that change what the weights compute. If two files have the same option, they must agree.
_COMPARED = (
    *_SIZES,
    "predict_residual",
    "use_basal_projection",
    "batch_encoder",
    "mask_attn",
    "embed_key",
    "output_space",
    "transformer_backbone_key",
)


@dataclass
class LegacyFolder:
    """
    What a training folder of the published research code says.

    Args:
        path (`Path`): the folder.
        options (`dict`): options of the model under the research code's names, for
            [`~pertstate.legacy.config_from_legacy`].
        weights (`dict[str, StoredTensor]`): the weights by name, not yet read from the file.
        perturbations, contexts, batches (`list[str]`): names in the order of the one-hot vectors. The perturbations include
            the control if the research code gave it a place. Contexts and batches are empty if they were not saved.
        genes (`list[str]`, *optional*): the recorded names of genes, which may be others than the model's.
        data (`dict`): `data.kwargs` of the configuration.
        training (`dict`): the section `training` of the configuration.
        checkpoint (`Path`): the file of the weights.
        progress (`str`): epoch and step of the checkpoint, in words.
    """

    path: Path
    options: dict
    weights: dict[str, StoredTensor]
    perturbations: list[str]
    contexts: list[str]
    batches: list[str]
    genes: list[str] | None
    data: dict
    training: dict
    checkpoint: Path
    progress: str

    def sha256(self) -> str:
        """The SHA-256 of the checkpoint's file, as hexadecimal digits."""
        with open(self.checkpoint, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_legacy_folder(path: str | os.PathLike, checkpoint: str | None = None) -> LegacyFolder:
    """
    Read a training folder: `config.yaml`, `var_dims.pkl`, `pert_onehot_map`, `batch_onehot_map` and
    `cell_type_onehot_map` (each as `.pt`, `.torch` or `.pkl`), `checkpoints/*.ckpt`. No code that a pickle names is run.

    Args:
        path: the folder.
        checkpoint (`str`, *optional*): which file of `checkpoints/`; by default `final.ckpt`, else `last.ckpt`, else the
            only one.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        RefusedPickleError: a pickle names something that is not data.
        ValueError: a file is not whole, a value is of the wrong kind, or two files disagree.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder (looked from {Path.cwd()})")
    config = _read_config(path / "config.yaml")
    data, model = _section(config, path, "data", "kwargs"), _section(config, path, "model")
    var_dims = _mapping(read_pickled(path / "var_dims.pkl"), path / "var_dims.pkl", "sizes of the model by name")
    weights_path = _choose_checkpoint(path / "checkpoints", checkpoint)
    content = _mapping(read_pickled(weights_path), weights_path, "a Lightning checkpoint")
    hyper = _mapping(content.get("hyper_parameters", {}), weights_path, "hyper_parameters by name")
    from_data = {name: data[name] for name in ("embed_key", "output_space") if name in data}
    from_dims = {name: value for name, value in var_dims.items() if name in _SIZES}
    options = _merge(
        {
            path / "config.yaml": {**_section(config, path, "model", "kwargs"), **from_data},
            path / "var_dims.pkl": from_dims,
            weights_path: hyper,
        }
    )
    options["model_name"] = _text(model, "name", path / "config.yaml", "section model")
    control = _text(data, "control_pert", path / "config.yaml", "section data.kwargs")
    if hyper.get("control_pert", control) != control:
        raise ValueError(
            f"{weights_path}: expected control_pert={control!r} as in config.yaml, found {hyper['control_pert']!r}"
        )
    for column in ("pert_col", "cell_type_key"):
        _text(data, column, path / "config.yaml", "section data.kwargs")
    if options.get("embed_key") is not None:
        _text(options, "embed_key", path / "config.yaml", "section data.kwargs")
    weights = _weights(content, weights_path)
    _check_decoder(options, weights, weights_path)
    _check_layers(options, len(weights), path)

    perturbations = _one_hot_names(path, "pert_onehot_map", options.get("pert_dim"), "pert_dim")
    if perturbations is None:
        raise FileNotFoundError(
            f"{path}: expected pert_onehot_map as one of {', '.join(_ENDINGS)}, found none; without it no row of the "
            "weights has a name: copy it from where the model was trained"
        )
    recorded = _names(var_dims.get("pert_names"), path / "var_dims.pkl", "pert_names")
    if recorded is not None and set(recorded) != set(perturbations):
        differ = sorted(set(recorded) ^ set(perturbations))
        raise ValueError(f"{path}: pert_names of var_dims.pkl and pert_onehot_map disagree about {some(differ)}")
    genes = _names(var_dims.get("gene_names"), path / "var_dims.pkl", "gene_names")
    return LegacyFolder(
        path=path,
        options=options,
        weights=weights,
        perturbations=perturbations,
        contexts=_one_hot_names(path, "cell_type_onehot_map") or [],
        batches=_one_hot_names(path, "batch_onehot_map", options.get("batch_dim"), "batch_dim") or [],
        genes=genes if genes is not None else _names(hyper.get("gene_names"), weights_path, "gene_names"),
        data=data,
        training=_section(config, path, "training") if "training" in config else {},
        checkpoint=weights_path,
        progress=", ".join(
            f"{name} {content[name]}" for name in ("epoch", "global_step") if _is_int(content.get(name))
        ),
    )


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a training folder with config.yaml, var_dims.pkl, pert_onehot_map.pt and "
            "checkpoints/"
        )
    return _mapping(load_yaml(path, BoundedLoader), path, "the sections data and model")


def _mapping(value, path: Path, what: str) -> dict:
    """A dict whose keys are text."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{path}: expected {what}, found a {type(value).__name__}")
    return value


def _section(config: dict, path: Path, *names: str) -> dict:
    for depth, name in enumerate(names):
        if name not in config:
            where = ".".join(names[: depth + 1])
            raise ValueError(f"{path / 'config.yaml'}: expected a section {where}, found {some(config)}")
        config = _mapping(config[name], path / "config.yaml", f"`name: value` lines in {'.'.join(names[: depth + 1])}")
    return config


def _text(section: dict, name: str, path: Path, where: str) -> str:
    value = section.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}: expected a name as {name} in {where}, found {_short(value)}")
    return value


def _short(value) -> str:
    """A value as text for an error. Of a container only the type is named, because its text may be endless."""
    return repr(value)[:100] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _merge(sources: dict[Path, dict]) -> dict:
    """Options of several files; the last file wins. Options that weights depend on must agree."""
    merged: dict[str, Any] = {}
    where: dict[str, Path] = {}
    for path, options in sources.items():
        for name, value in options.items():
            if name in _SIZES and value is not None and not (_is_int(value) and value > 0):
                raise ValueError(f"{path}: expected a whole number above 0 as {name}, found {_short(value)}")
            # Another file has the size that this one leaves open.
            if name in _SIZES and value is None:
                continue
            if name in merged and name in _COMPARED and value != merged[name]:
                raise ValueError(
                    f"{path}: {name} is {_short(value)}, but {_short(merged[name])} in {where[name]}; these files are not "
                    "of one training: copy the folder again"
                )
            merged[name], where[name] = value, path
    inner = "transformer_backbone_kwargs"
    if inner in merged:
        _mapping(merged[inner], where[inner], f"options by name in {inner}")
        flags = {
            str(path): options[inner]["bidirectional_attention"]
            for path, options in sources.items()
            if isinstance(options.get(inner), dict) and "bidirectional_attention" in options[inner]
        }
        if len({bool(flag) for flag in flags.values()}) > 1:
            raise ValueError(f"bidirectional_attention differs: {flags}; these files are not of one training")
        if flags:
            merged[inner] = {**merged[inner], "bidirectional_attention": bool(next(iter(flags.values())))}
    return merged


def _choose_checkpoint(folder: Path, asked: str | None) -> Path:
    found = sorted(path.name for path in folder.glob("*.ckpt"))
    if asked is not None:
        if asked not in found:
            raise FileNotFoundError(f"{folder}: no checkpoint {asked!r}, found {some(found)}")
        return folder / asked
    if not found:
        raise FileNotFoundError(f"{folder}: expected a checkpoint, found no .ckpt file")
    chosen = found if len(found) == 1 else [name for name in _PREFERRED if name in found]
    if not chosen:
        raise ValueError(f"{folder}: found {some(found)}; say which with --checkpoint")
    if len(found) > 1:
        logger.warning(f"{folder} has {len(found)} checkpoints, {chosen[0]} is taken; another with --checkpoint")
    return folder / chosen[0]


def _weights(content: dict, path: Path) -> dict[str, StoredTensor]:
    if "state_dict" not in content:
        raise ValueError(f"{path}: expected a Lightning checkpoint with state_dict, found {some(content)}")
    weights = _mapping(content["state_dict"], path, "weights by name in state_dict")
    for name, tensor in weights.items():
        if not isinstance(tensor, StoredTensor) or not tensor.dtype.is_floating_point:
            found = f"a tensor of {tensor.dtype}" if isinstance(tensor, StoredTensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{path}: expected floating-point numbers as weight {name[:100]!r}, found {found}")
    if not weights:
        raise ValueError(f"{path}: expected weights in state_dict, found none")
    check_stored_apart(weights.values(), path)
    return weights


def _check_decoder(options: dict, weights: dict, path: Path):
    """Remove the options of a gene decoder if the model has none: the research code kept them all the same."""
    if not any(name.startswith("gene_decoder.") for name in weights):
        options["decoder_cfg"] = None
        return
    decoder = options.get("decoder_cfg")
    if not isinstance(decoder, dict) or not _is_int(decoder.get("gene_dim")):
        raise ValueError(
            f"{path}: the weights hold a gene decoder; expected its options as decoder_cfg (gene_dim, hidden_dims) in the "
            "hyper_parameters, or in config.yaml under model.kwargs, found none"
        )
    widths = decoder.get("hidden_dims")
    if (
        not isinstance(widths, list | tuple)
        or not all(_is_int(width) for width in widths)
        or len(widths) > len(weights)
    ):
        raise ValueError(f"{path}: expected widths as hidden_dims of decoder_cfg, found {_short(widths)}")


def _check_layers(options: dict, count: int, path: Path):
    """ValueError if there are more layers than weights. Call it before a model of so many layers is built."""
    inner = options.get("transformer_backbone_kwargs") or {}
    layers = {name: options[name] for name in ("n_encoder_layers", "n_decoder_layers") if name in options}
    layers |= {name: inner[name] for name in ("num_hidden_layers", "n_layer") if _is_int(inner.get(name))}
    for name, number in layers.items():
        if number > count:
            raise ValueError(f"{path}: {name} is {number}, but the checkpoint holds {count} weights in all")


def _one_hot_names(folder: Path, stem: str, width: int | None = None, option: str = "") -> list[str] | None:
    """The names of a one-hot map in the order of its vectors. None if there is no such file."""
    found = [folder / f"{stem}{ending}" for ending in _ENDINGS if (folder / f"{stem}{ending}").is_file()]
    maps = {path: _ordered_names(path, width, option) for path in found}
    for path, names in maps.items():
        if names != maps[found[0]]:
            raise ValueError(f"{found[0]} and {path} disagree; leave the one that belongs to the checkpoint")
    return maps[found[0]] if found else None


def _ordered_names(path: Path, width: int | None, option: str) -> list[str]:
    content = read_pickled(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a one-hot vector for each name, found a {type(content).__name__}")
    width = len(content) if width is None else width
    if len(content) != width:
        raise ValueError(
            f"{path}: expected {width} names ({option}), found {len(content)}; it is not of the same training as the "
            "checkpoint"
        )
    places: dict[int, str] = {}
    for key, vector in content.items():
        name = _name(key, path)
        place = _place(vector, width)
        if place is None or place in places:
            why = f"the place of {places[place]!r}" if place in places else "a vector that is not one-hot"
            raise ValueError(
                f"{path}: expected one 1 among {width} numbers, each name at a place of its own, found {why} for {name!r}; "
                "a model that was trained on perturbation features cannot be converted"
            )
        places[place] = name
    names = [places[place] for place in range(width)]
    if len(set(names)) < width:
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{path}: names stand twice when read as text: {some(twice)}")
    return names


def _place(vector, width: int) -> int | None:
    """Where a one-hot vector has its 1. None if the vector is not one-hot."""
    if not isinstance(vector, StoredTensor | StoredArray) or math.prod(vector.shape) != width:
        return None
    values = vector.load()
    if isinstance(values, list):
        return None
    flat = values.reshape(-1)
    nonzero = flat.nonzero().flatten() if isinstance(flat, torch.Tensor) else flat.nonzero()[0]
    return int(nonzero[0]) if len(nonzero) == 1 and flat[nonzero[0]] == 1 else None


def _name(value, path: Path) -> str:
    """A name as text. A number becomes the same text as a number in an obs column."""
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return value
    if _is_int(value) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise ValueError(f"{path}: expected names, found {_short(value)}")


def _names(value, path: Path, what: str) -> list[str] | None:
    if value is None:
        return None
    values = value.load() if isinstance(value, StoredArray) else value
    values = values if isinstance(values, list | tuple) else values.tolist() if isinstance(value, StoredArray) else None
    if values is None:
        raise ValueError(f"{path}: expected a list of names as {what}, found a {type(value).__name__}")
    return [_name(entry, path) for entry in values]
