"""Reading the files of a processor. They must agree with one another and with the model's config."""

import os
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file, extract_commit_hash

from .checkpoint_files import LARGEST_SIZE, find_file, read_json
from .configuration_perturbation import PerturbationConfig
from .constants import Normalize, Values
from .finite import within_reach
from .labels import LabelSettings
from .messages import closest, counted
from .vocabulary import (
    PERTURBATION_FEATURES_FILE,
    VOCABULARY_FILE,
    PerturbationFeatures,
    Vocabulary,
)


def _is_name(value) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(value) -> bool:
    return _is_name(value) or (isinstance(value, list) and value != [] and all(map(_is_name, value)))


def _is_table(value, of: Callable) -> bool:
    return isinstance(value, dict) and all(_is_name(key) and of(item) for key, item in value.items())


def _is_count(value) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def fits_scale(value) -> bool:
    """Whether a value is a scale as a checkpoint or store remembers it."""
    return (
        isinstance(value, dict)
        and {"values"} <= set(value) <= {"values", "total"}
        and _is_positive(value.get("total", 1))
    )


def _is_positive(value) -> bool:
    return type(value) in (int, float) and within_reach(value)


def _is_place(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"X|raw/X|(layers|obsm)/.+", value, re.DOTALL) is not None


# The check of each setting, and how errors describe what is expected. Settings of the second table may be absent.
_SETTINGS: dict[str, tuple[Callable, str]] = {
    "perturbation_key": (lambda value: value is None or _is_name(value), "the name of a column, or null"),
    "control": (_is_name, "a label"),
    "context_key": (lambda value: value is None or _are_names(value), "the names of columns, or null"),
    "batch_key": (lambda value: value is None or _are_names(value), "the names of columns, or null"),
    "input": (_is_place, "'X', 'raw/X', 'layers/NAME' or 'obsm/NAME'"),
    "gene_input": (lambda value: value is None or _is_place(value), "'X', 'layers/NAME' or null"),
    "values": (
        lambda value: value in (Values.LOG1P, Values.COUNTS, Values.EMBEDDING),
        "'log1p', 'counts' or 'embedding'",
    ),
    "normalize": (lambda value: value in (Normalize.COUNTS_TO_LOG1P, Normalize.NONE), "'counts_to_log1p' or 'none'"),
    "target_sum": (lambda value: value is None or _is_positive(value), "a number above 0, or null"),
    "combination_separator": (lambda value: value is None or _is_name(value), "a text, or null"),
    "feature_dim": (_is_count, "a number of features"),
    "set_size": (_is_count, "a number of cells"),
}
_OPTIONAL_SETTINGS: dict[str, tuple[Callable, str]] = {
    "predicts": (lambda value: value in (None, Values.LOG1P), "'log1p' or null"),
    "perturbation_dim": (_is_count, "the width of a vector"),
    "control_labels": (
        lambda value: value is None or _are_names(value) or _is_table(value, _are_names),
        "a list of labels, or one for each dataset",
    ),
    "context": (lambda value: value is None or _is_name(value), "the name of a context, or null"),
    "perturbation_map": (lambda value: value is None or _is_table(value, _is_name), "labels and their names, or null"),
    "unlabelled": (lambda value: value in ("error", "drop"), "'error' or 'drop'"),
    "exclude": (lambda value: value is None or _is_table(value, lambda of: isinstance(of, list)), "columns and values"),
    "include": (lambda value: value is None or _is_table(value, lambda of: isinstance(of, list)), "columns and values"),
    "scale": (lambda value: value is None or fits_scale(value), "the kind and total of the values, or null"),
    "gene_key": (lambda value: value is None or _is_name(value), "the name of a column of var, or null"),
    "control_expression": (lambda value: type(value) is bool, "true or false"),
    "ignore_gene_versions": (lambda value: type(value) is bool, "true or false"),
    "duplicate_genes": (lambda value: value in ("error", "first", "sum"), "'error', 'first' or 'sum'"),
    "dose_key": (lambda value: value is None or _is_name(value), "the name of a column, or null"),
    "batch_datasets": (
        lambda value: value is None or (isinstance(value, list) and value != [] and all(map(_is_name, value))),
        "the names of datasets, or null",
    ),
    "dataset": (lambda value: value is None or _is_name(value), "the name of a dataset, or null"),
    "dose_encoding": (lambda value: value in ("log", "linear"), "'log' or 'linear'"),
    "doses": (
        lambda value: value is None or _is_table(value, lambda of: isinstance(of, list) and all(map(_is_positive, of))),
        "the doses of each perturbation, or null",
    ),
    "dose_span": (
        lambda value: (
            value is None
            or (isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value)) and value[0] <= value[1])
        ),
        "the smallest and the largest dose, or null",
    ),
}
# How labels and values are found in an AnnData; this differs from one laboratory to the next.
READING = (
    *(field.name for field in fields(LabelSettings)),
    "input",
    "gene_input",
    "gene_key",
    "ignore_gene_versions",
    "duplicate_genes",
)
# What a processor remembers beside its vocabulary and the width of its features.
PROCESSOR_SETTINGS = tuple(
    dict.fromkeys(
        (
            *(name for name in _SETTINGS if name != "feature_dim"),
            *READING,
            "predicts",
            "control_expression",
            "dose_encoding",
            "doses",
            "dose_span",
            "scale",
        )
    )
)
OPTIONAL_SETTINGS = tuple(name for name in _OPTIONAL_SETTINGS if name != "perturbation_dim")
# Settings that transformers adds, and their checks.
_OF_LIBRARY: dict[str, tuple[Callable, str]] = {
    "auto_map": (lambda value: isinstance(value, dict), "classes by name"),
    "processor_class": (lambda value: value == "StateProcessor", "'StateProcessor'"),
}


# The values that optional settings have where they are absent; None for those not listed.
DEFAULTS = {
    "unlabelled": "error",
    "dose_encoding": "log",
    "duplicate_genes": "error",
    "ignore_gene_versions": False,
    "control_expression": False,
}


def is_default(name: str, value) -> bool:
    """Whether an optional setting has the value that it has where it is absent."""
    return name in OPTIONAL_SETTINGS and value == DEFAULTS.get(name)


def fits_reading(reading: dict) -> bool:
    """Whether settings are those of `READING`, each as it must be; the optional ones may be absent."""
    known = {**_SETTINGS, **_OPTIONAL_SETTINGS}
    needed = {name for name in READING if name in _SETTINGS}
    return needed <= set(reading) <= set(READING) and all(known[name][0](value) for name, value in reading.items())


def check_settings(settings: dict, path: str | os.PathLike):
    """
    Check that the content of `processor_config.json` is what a processor writes.

    Raises:
        ValueError: a setting is missing, unknown, or of another type or value.
    """
    known = {**_SETTINGS, **_OPTIONAL_SETTINGS, **_OF_LIBRARY}
    for name in settings:
        if name not in known:
            raise ValueError(f"{path}: unknown setting {name!r}; {closest(name, known)}")
    missing = [name for name in _SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"{path}: expected the settings {sorted(_SETTINGS)}, but {missing} are missing; copy it again")
    for name, (fits, expected) in known.items():
        if name in settings and not fits(settings[name]):
            raise ValueError(
                f"{path}: {name}: expected {expected}, found {settings[name]!r}; correct it, or copy it again"
            )
    if settings["target_sum"] is None and settings.get("predicts") is None:
        raise ValueError(f"{path}: target_sum: expected a number above 0, found null; correct it, or copy it again")
    for first, second, agree in _CONTRADICTIONS:
        if not agree(settings):
            raise ValueError(
                f"{path}: {first}={settings.get(first)!r} contradicts {second}={settings.get(second)!r}; copy the checkpoint again"
            )


# Pairs of settings, and whether they agree.
_CONTRADICTIONS: tuple[tuple[str, str, Callable[[dict], bool]], ...] = (
    ("values", "input", lambda s: (s["values"] == Values.EMBEDDING) == s["input"].startswith("obsm/")),
    ("values", "normalize", lambda s: s["values"] != Values.COUNTS or s["normalize"] == Normalize.NONE),
    ("values", "gene_input", lambda s: s["gene_input"] is None or s["values"] == Values.EMBEDDING),
    ("predicts", "values", lambda s: s.get("predicts") is None or s["values"] == Values.COUNTS),
    ("context", "context_key", lambda s: s.get("context") is None or s["context_key"] is None),
    ("doses", "dose_key", lambda s: s.get("doses") is None or s.get("dose_key") is not None),
    ("dose_span", "doses", lambda s: s.get("dose_span") is None or s.get("doses") is not None),
    ("batch_datasets", "batch_key", lambda s: s.get("batch_datasets") is None or s["batch_key"] is not None),
)


def check_agreement(settings: dict, vocabulary, features, config: dict | None, path: str | os.PathLike):
    """
    Check that the names and settings of a processor belong to the model beside it.

    Args:
        settings (`dict`), vocabulary ([`Vocabulary`]), features ([`PerturbationFeatures`], *optional*): the processor's.
        config (`dict`, *optional*): content of the model's `config.json`; None for a processor without a model.
        path: the checkpoint, for errors.

    Raises:
        ValueError: two files differ in a width, or in the number of genes, perturbations, contexts or batches.
    """

    def check(of: str, expected, found, place: str, noun: str | None = None):
        if expected != found:
            shown = found if noun is None else f"no {noun}" if found is None else counted(found, noun)
            raise ValueError(
                f"{path}: {of} says {expected}, found {shown} {place}; the files belong to different "
                "checkpoints: save or copy model and processor together"
            )

    genes, batches = len(vocabulary.genes), len(vocabulary.batches)
    if settings["values"] != Values.EMBEDDING:
        check("feature_dim in processor_config.json", settings["feature_dim"], genes, "in vocabulary.json", "gene")
    if features is not None:
        width = settings["perturbation_dim"]
        check(
            "perturbation_dim in processor_config.json", width, features.dim, "in each perturbation's vector", "number"
        )
    if config is None:
        return
    default = {field.name: field.default for field in fields(PerturbationConfig)}
    names = (
        "input_dim",
        "output_dim",
        "num_perturbations",
        "perturbation_dim",
        "num_contexts",
        "num_batches",
        "gene_dim",
    )
    asked = {name: config.get(name, default[name]) for name in names}
    found = {
        "input_dim": ("feature", "(feature_dim) in processor_config.json", settings["feature_dim"]),
        "num_perturbations": ("perturbation", "in vocabulary.json", len(vocabulary.perturbations)),
        "perturbation_dim": ("number", "in each perturbation's vector", None if features is None else features.dim),
        "num_contexts": ("context", "in vocabulary.json", len(vocabulary.contexts)),
        "num_batches": ("batch", "in vocabulary.json", batches),
        "gene_dim": ("gene", "in vocabulary.json", genes),
    }
    if settings["values"] != Values.EMBEDDING:
        found["output_dim"] = ("feature", "(feature_dim) in processor_config.json", settings["feature_dim"])
        asked["output_dim"] = asked["output_dim"] or asked["input_dim"]
    # A processor with vectors needs a model that takes them. A processor that reads expression beside an embedding needs a
    # model with a gene decoder.
    needed = {"perturbation_dim": features is not None, "gene_dim": settings["gene_input"] is not None}
    for name, (noun, place, number) in found.items():
        if asked[name] is not None or needed.get(name, False):
            check(f"{name} in {CONFIG_NAME}", asked[name], number, place, noun)
    # The positions of perturbed genes, where a family has them.
    genes_at = dict(enumerate(vocabulary.genes))
    for name, position in zip(vocabulary.perturbations, config.get("perturbed_genes") or []):
        check(
            f"perturbed_genes in {CONFIG_NAME}", name, genes_at.get(position), f"at gene {position} of vocabulary.json"
        )


def _needed_file(name: str | os.PathLike, file: str, hub: dict) -> str:
    """The path of a file of the checkpoint. OSError where it has none."""
    path = cached_file(name, file, **hub)
    if path is None:
        raise FileNotFoundError(f"{name} has no file {file}; copy the checkpoint again")
    return path


def read_settings(name: str | os.PathLike, hub: dict) -> dict:
    """The content of the `processor_config.json` of a checkpoint, checked. Raises as [`read_processor_tables`]."""
    path = _needed_file(name, PROCESSOR_NAME, hub)
    settings = read_json(path)
    check_settings(settings, path)
    return settings


def read_processor_tables(name: str | os.PathLike, hub: dict) -> tuple[dict, str | None]:
    """
    The vocabulary and perturbation features of a checkpoint, all of its files checked.

    Args:
        name: folder, or repository on the Hub.
        hub (`dict`): [`hub_arguments`].

    Returns:
        The processor's arguments `vocabulary` and, if it has any, `perturbation_features`; and for a repository on the Hub
        the commit, from which all other files should be read.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or does not agree with another one, the model's config included.
    """
    vocabulary = _needed_file(name, VOCABULARY_FILE, hub)
    if (commit := extract_commit_hash(vocabulary, None)) is not None:
        # All files of one commit, though a branch may move meanwhile.
        hub = {**hub, "revision": commit}
    tables: dict[str, Any] = {"vocabulary": Vocabulary.from_file(vocabulary)}
    settings = read_settings(name, hub)
    if "perturbation_dim" in settings:
        features = _needed_file(name, PERTURBATION_FEATURES_FILE, hub)
        tables["perturbation_features"] = PerturbationFeatures.from_file(features)
    # A processor may stand alone; beside a model it must be the model's.
    of_model = find_file(name, CONFIG_NAME, hub)
    config = None if of_model is None else read_json(of_model)
    check_agreement(settings, tables["vocabulary"], tables.get("perturbation_features"), config, name)
    return tables, commit
