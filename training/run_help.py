"""The fields of a run, section by section, with type, default and one line each: what `--help` prints."""

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.labels import LabelSettings
from pertstate.base.messages import closest
from pertstate.configuration_state import StateConfig
from pertstate.data.arguments import DataArguments, PrepareArguments, StreamArguments
from pertstate.data.options import type_name
from pertstate.data.sentences import SentenceDataset
from pertstate.data.stream_survey import survey_stream
from pertstate.data.streaming import SentenceStream
from pertstate.families import FAMILIES
from pertstate.processing import StateProcessor
from pertstate.training.arguments import WITHOUT_MEANING, StateTrainingArguments
from pertstate.training.automatic import AUTO, OF_TRAINING
from pertstate.training.run_config import parse_flags


USAGE = """\
usage: pertstate train CELLS|CONFIG.yaml [--any_field value ...]

Train a model. CELLS is a .h5ad, a .zarr, a folder or glob of them, or a cell store: columns are found by their names, sizes
are chosen (auto), and some training groups are held out to choose the best step. CONFIG.yaml has the sections data, model and
training (or stream); `pertstate configs` lists some to start from. --dry_run says what a run would be, and stops.
A flag sets any of their fields and wins over the file: --learning_rate 3e-4, --test_contexts NK B, --model.hidden_size 256.
Many devices: accelerate launch -m pertstate.train CELLS|CONFIG.yaml [--any_field value ...]
"""

# What a description may refer to: `see [`NAME`]`.
_REFERENCES = {
    "LabelSettings": (LabelSettings,),
    "StateProcessor": (StateProcessor,),
    "StateProcessor.fit": (StateProcessor.fit, StateProcessor),
    "SentenceDataset": (SentenceDataset,),
    "SentenceStream": (SentenceStream,),
    "survey_stream": (survey_stream,),
}
_REFERENCE = re.compile(r"see \[`([\w.]+)`\]\.?")


@dataclasses.dataclass(frozen=True)
class FieldHelp:
    """What is said of a field of a section."""

    name: str
    type: str
    default: str
    text: str


def help_of_train(argv: list[str]) -> str:
    """
    The fields of the sections that training reads. Those of the model section are of the State model, or of the family that
    `--model_type` names.

    Raises:
        ValueError: no family has this name.
    """
    if not argv:
        return f"{USAGE}\n`pertstate train --help` lists the fields."
    flags = [word for word in argv if word not in ("-h", "--help")]
    first = next((place for place, word in enumerate(flags) if word.startswith("--")), len(flags))
    named = {name.removeprefix("model."): value for name, value in parse_flags(flags[first:])}
    family = str(named.get("model_type", StateConfig.model_type))
    if family not in FAMILIES:
        raise ValueError(f"model_type={family!r} is no family of models; {closest(family, FAMILIES)}")
    config = FAMILIES[family].config
    of_model = [
        FieldHelp("model_type", "str", StateConfig.model_type, f"The family of models: {', '.join(FAMILIES)}"),
        FieldHelp(
            "preset",
            "str",
            "null",
            f"Named sizes of the family: {', '.join((*config.presets, AUTO)) if config.presets else 'none'}",
        ),
        FieldHelp("pretrained", "str", "null", "Folder or Hub repository of a checkpoint that is trained further"),
        FieldHelp("pretrained_revision", "str", "null", "Commit, tag or branch of a Hub repository in pretrained"),
        *map(_or_auto, _fields(config, _own_fields(config))),
    ]
    return USAGE + _listed(
        {
            "data": ("which cells are read and what is held out", list(_fields(DataArguments))),
            "model": (
                f"of model_type {family}; --model_type NAME --help lists another family's. Sizes that follow from the data "
                "(input_dim, num_perturbations ..) are not set",
                of_model,
            ),
            "training": (
                f"those of transformers.TrainingArguments and some more{_family_defaults(config)}",
                [_or_auto(of) for of in _fields(StateTrainingArguments) if of.name not in WITHOUT_MEANING],
            ),
            "stream": ("cells that are read while the model trains, instead of files", list(_fields(StreamArguments))),
        }
    )


def _family_defaults(config: type[PerturbationConfig]) -> str:
    own = ", ".join(f"{name} {_as_yaml(value)}" for name, value in config.training_defaults.items())
    return own and f"; unless it is set, {config.model_type} is trained with {own}"


def help_of_prepare() -> str:
    """The fields of the sections that `pertstate prepare` reads."""
    return _listed(
        {
            "data": ("which files are read, and how", list(_fields(DataArguments))),
            "prepare": ("how the store is laid out", list(_fields(PrepareArguments))),
        }
    )


def descriptions(source: Any) -> dict[str, str]:
    """
    The first sentence that a class, or a function, says of each of its arguments: the `help` of a dataclass field, or the
    `Args:` of its docstring and of its bases.
    """
    found: dict[str, str] = {}
    for one in reversed(source.__mro__) if isinstance(source, type) else [source]:
        found |= _args_of(inspect.getdoc(one) if "__doc__" in vars(one) or not isinstance(one, type) else None)
    if dataclasses.is_dataclass(source):
        found |= {
            field.name: str(field.metadata["help"]) for field in dataclasses.fields(source) if "help" in field.metadata
        }
    return {name: _first_sentence(name, text) for name, text in found.items()}


def _fields(section: type, only: Iterable[str] | None = None) -> Iterator[FieldHelp]:
    texts = descriptions(section)
    for field in dataclasses.fields(section):
        if not field.init or (only is not None and field.name not in only):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield FieldHelp(field.name, _type_in_short(field.type), _as_yaml(default), texts.get(field.name, ""))


def _or_auto(field: FieldHelp) -> FieldHelp:
    """The field as runs take it: some may be `auto`."""
    return (
        dataclasses.replace(field, type=f"{field.type}|{AUTO}") if field.name in ("set_size", *OF_TRAINING) else field
    )


def _type_in_short(kind) -> str:
    """Without None, which every default of null shows; and options alone where the library also takes any text."""
    names = [name for name in type_name(kind).split(" | ") if name != "None"]
    options = [name.strip("'") for name in names if name.startswith("'")]
    if options and "str" in names:
        return "|".join(options) if len(options) < 8 else "str"
    return "|".join(name.strip("'") for name in names if not (name == "int" and "float" in names))


def _own_fields(config: type) -> set[str]:
    """Those that this package declares, not those that transformers keeps in every config."""
    return {
        name
        for one in config.__mro__
        if not one.__module__.startswith("transformers.")
        for name in one.__dict__.get("__annotations__", {})
    }


def _listed(sections: dict[str, tuple[str, list[FieldHelp]]]) -> str:
    """The sections as argparse lays out groups of flags."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=6),
    )
    names = [field.name for _, fields in sections.values() for field in fields]
    for section, (about, fields) in sections.items():
        group = parser.add_argument_group(f"section {section}", about)
        for field in fields:
            flag = f"--{section}.{field.name}" if names.count(field.name) > 1 else f"--{field.name}"
            text = f"{field.text} (default: {field.default})".strip().replace("%", "%%")
            group.add_argument(flag, metavar=field.type, help=text)
    return "\n" + parser.format_help()


def _as_yaml(value) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _args_of(doc: str | None) -> dict[str, str]:
    """What the `Args:` (or `Parameters:`) of a docstring say of each name."""
    found: dict[str, str] = {}
    match = re.search(r"^(?:Args|Parameters):\n((?:(?: {4}.*)?\n?)*)", doc or "", re.MULTILINE)
    if match is None:
        return found
    # An entry starts at the indent of the first, and ends where a line is blank; the lines of a list are not wanted.
    entries: list[str] = []
    for line in match[1].splitlines():
        text = line[4:]
        if text and not text.startswith(" ") and (not entries or not entries[-1].endswith(",")):
            entries.append(text)
        elif text.strip() and entries and not entries[-1].endswith("\n"):
            entries[-1] += " " + text.strip()
        elif entries:
            entries[-1] += "\n"
    for entry in entries:
        head, text = _split_at_colon(entry.partition("\n")[0])
        names = [name.strip() for name in re.sub(r"\([^()]*\)|\[[^\]]*\]", "", head).split(",")]
        if text and all(name.isidentifier() for name in names):
            found |= dict.fromkeys(names, text)
    return found


def _split_at_colon(entry: str) -> tuple[str, str]:
    """An entry in two, at the first colon that stands outside of brackets."""
    depth = 0
    for place, letter in enumerate(entry):
        depth += (letter in "([") - (letter in ")]")
        if letter == ":" and depth == 0:
            return entry[:place], entry[place + 1 :].strip()
    return entry, ""


def _first_sentence(name: str, text: str) -> str:
    """Of a description, or of what it refers to."""
    reference = _REFERENCE.fullmatch(text.strip())
    if reference is not None and reference[1] in _REFERENCES:
        return next(found[name] for source in _REFERENCES[reference[1]] if name in (found := descriptions(source)))
    plain = re.sub(r"\[?`([^`]*)`\]?", r"\1", text)
    sentence = re.split(r"(?<=[\w)\"'])\.(?:\s|$)|;\s", plain, maxsplit=1)[0].strip().rstrip(":")
    return sentence[:1].upper() + sentence[1:]
