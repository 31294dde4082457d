"""A training run as one YAML file with flags on top: sections `data`, `model` and `training`."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pertstate.base.hub_names import is_repository, split_revision
from pertstate.base.messages import closest
from pertstate.base.printable import printable
from pertstate.base.public import public
from pertstate.data.arguments import DataArguments, PrepareArguments, StreamArguments
from pertstate.data.bounded_yaml import BoundedLoader, load_yaml
from pertstate.data.in_memory import name_of
from pertstate.data.options import LOOKS, Word, as_declared, looks_like


# Fields that hold paths of the machine that runs.
_PATHS = (
    "data.datasets",
    "data.genes_file",
    "data.perturbation_features",
    "data.splits",
    "data.store",
    "model.pretrained",
    "stream.gene_names",
    "stream.path",
    "training.output_dir",
    "training.resume_from_checkpoint",
)
_HUB_NAMES = ("data.store", "model.pretrained", "stream.path")
_SECTIONS = ("data", "model", "training", "stream", "prepare")
# Fields of the model section that say which other fields it has.
_NAMING = ("model_type", "pretrained", "pretrained_revision")


@dataclass
class RunConfig:
    """
    The sections: data, model fields (`preset` and any field of the config), training, stream and store arguments; which
    fields of the data section stand in the file or among the flags, `given`; and what was decided for the run, in sentences
    that its log says, `notes`.
    """

    data: DataArguments
    model: dict
    training: dict
    stream: StreamArguments
    prepare: PrepareArguments
    given: frozenset[str]
    notes: list[str] = field(default_factory=list)

    def to_yaml(self) -> str:
        """
        The run as one YAML file that [`load_run_config`] reads to the same: file and flags together, without what is
        at its default, without tokens, and with the last part of every path alone, as folders are private.
        """
        content = {
            "data": _changed(self.data),
            "model": self.model,
            "training": self.training,
            "stream": _changed(self.stream),
        }
        for section, values in content.items():
            content[section] = {
                name: public(_last_part(f"{section}.{name}", value))
                for name, value in values.items()
                if not name.endswith("_token") and name not in ("overwrite", "dry_run")
            }
        written = {section: values for section, values in content.items() if values}
        return yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def load_run_config(
    path: str,
    flags: list[str],
    model_fields: Callable[[dict], dict[str, Any]] | None = None,
    training_fields: dict[str, Any] | None = None,
) -> RunConfig:
    """
    Read a run from YAML, flags winning over it. The type of a field says what its plain words mean ([`as_declared`]).

    Args:
        path (`str`): YAML file with the sections `data`, `model` and `training` (and `stream`, or `prepare`).
        flags (`list[str]`): see [`parse_flags`].
        model_fields (callable, *optional*): from the model section (its `model_type`, `pretrained`) to the fields that it
            may hold and their types.
        training_fields (`dict[str, type]`, *optional*): fields of the training arguments and their types. Without these
            two, their sections are not checked and their words are what they look like.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, an unknown section, field or flag (the nearest is said), or a
            value that does not fit the type of its field.
    """
    return run_of(read_sections(path), path, list(parse_flags(flags)), model_fields, training_fields)


def run_of(
    content: dict[str, dict],
    source: str,
    pairs: list[tuple[str, Any]],
    model_fields: Callable[[dict], dict[str, Any]] | None = None,
    training_fields: dict[str, Any] | None = None,
) -> RunConfig:
    """
    A run from its sections and from flags, which win; see [`load_run_config`].

    Args:
        content (`dict[str, dict]`): all of the sections, by name.
        source (`str`): where they come from, for messages.
        pairs (`list[tuple[str, Any]]`): flags and their values.
    """
    # The family decides which fields there are; a flag may name it, or the checkpoint that is of one.
    naming = {**content["model"], **{name.removeprefix("model."): value for name, value in pairs}}
    family = {name: as_declared(f"model.{name}", str | None, naming[name]) for name in _NAMING if name in naming}
    checked = {
        "data": _types(DataArguments),
        "model": None if model_fields is None else {"preset": str | None, **model_fields(family)},
        "training": training_fields,
        "stream": _types(StreamArguments),
        "prepare": _types(PrepareArguments),
    }
    known = {section: names for section, names in checked.items() if names is not None}
    for section, values in content.items():
        for name in values:
            if section in known and name not in known[section]:
                raise ValueError(
                    f"{source}: unknown field {name!r} in section {section!r}; {_where(name, section, known)}"
                )
    for name, value in pairs:
        section, _, own = name.rpartition(".")
        section = section or _section_of(name, known)
        if own not in known.get(section, ()):
            raise ValueError(f"unknown flag --{name}; {_where(own, section, known)}")
        content[section][own] = value
    typed = {section: _as_types(section, content[section], checked[section]) for section in ("model", "training")}
    return RunConfig(
        DataArguments(**content["data"]),
        typed["model"],
        typed["training"],
        StreamArguments(**content["stream"]),
        PrepareArguments(**content["prepare"]),
        frozenset(content["data"]),
    )


def read_sections(path: str) -> dict[str, dict]:
    """The sections of a file; those that are absent are empty."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such run configuration (looked from {Path.cwd()})")
    content = load_yaml(path, RunLoader) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the sections {list(_SECTIONS)}, found {type(looks_like(content)).__name__}")
    sections: dict[str, dict] = {section: {} for section in _SECTIONS}
    for section, values in content.items():
        if section not in _SECTIONS:
            raise ValueError(f"{path}: unknown section {str(section)!r}; {closest(section, _SECTIONS)}")
        if isinstance(values, dict):
            sections[section] = {str(name): value for name, value in values.items()}
        elif looks_like(values) is not None:
            raise ValueError(
                f"{path}: section {section!r} should hold `field: value` lines, found {looks_like(values)!r}"
            )
    return sections


def _types(section: type) -> dict[str, Any]:
    return {one.name: one.type for one in dataclasses.fields(section)}


def _as_types(section: str, values: dict, declared: dict[str, Any] | None) -> dict:
    if declared is None:
        return looks_like(values)
    return {name: as_declared(f"{section}.{name}", declared[name], value) for name, value in values.items()}


def _changed(arguments: DataArguments | StreamArguments) -> dict:
    """The fields of a section that are not at their default."""
    values = {one.name: getattr(arguments, one.name) for one in dataclasses.fields(arguments)}
    return {
        one.name: values[one.name]
        for one in dataclasses.fields(arguments)
        if values[one.name] != (one.default if one.default_factory is dataclasses.MISSING else one.default_factory())
    }


def _last_part(name: str, value):
    """Of a path, or of each path of a mapping; what is no path, or a name on the Hub, stays as it is."""
    if name not in _PATHS or (name in _HUB_NAMES and value is not None and is_repository(split_revision(value)[0])):
        return value
    if isinstance(value, dict):
        return {name: Path(name_of(cells)).name for name, cells in value.items()}
    return Path(value).name if isinstance(value, str) else value


def _section_of(name: str, known: dict[str, dict[str, Any]]) -> str:
    """The section that a flag without one belongs to."""
    sections = [section for section, names in known.items() if name in names]
    if not sections:
        raise ValueError(f"unknown flag --{name}; {_where(name, None, known)}")
    if len(sections) > 1:
        raise ValueError(f"--{name} is a field of {sections}: write --{sections[0]}.{name} or --{sections[1]}.{name}")
    return sections[0]


def _where(name: str, section: str | None, known: dict[str, dict[str, Any]]) -> str:
    elsewhere = [other for other, names in known.items() if name in names and other != section]
    if elsewhere:
        return f"it belongs to section {elsewhere[0]!r}"
    here = known[section] if section in known else {name for names in known.values() for name in names}
    return closest(name, sorted(here))


def parse_flags(flags: list[str]) -> Iterator[tuple[str, Any]]:
    """
    `--field value ...` or `--section.field value ...` as pairs. Several words after a flag are a list, no word is true, and a word
    that starts with a bracket or a quote is read as YAML.

    Raises:
        ValueError: a word belongs to no flag, or a flag has an empty one: a variable of the shell that is not set would leave out the
            file of splits.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if has_value else []))
        elif not groups:
            raise ValueError(f"expected --field value, found {word!r}")
        else:
            groups[-1][1].append(word)
    for name, words in groups:
        if any(not word.strip() for word in words):
            raise ValueError(f"--{name} is empty: expected a value; name one, or leave it out, or write null for none")
        values = [_parse_word(word) for word in words]
        yield name, True if not values else values[0] if len(values) == 1 else values


def _parse_word(word: str):
    """A word of the command line: as YAML where it starts like a list, a mapping or a text in quotes."""
    if word.startswith(("[", "{", '"', "'")):
        try:
            return yaml.load(word, RunLoader)
        except yaml.YAMLError:
            return Word(word)
    return Word(word)


class RunLoader(BoundedLoader):
    """YAML whose plain words stay words, for the types of the fields to decide; quoted text is text. It has no tags."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}
    yaml_constructors = {
        tag: BoundedLoader.yaml_constructors[tag] for tag in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)
    }


def _construct_text(loader: RunLoader, node: yaml.ScalarNode) -> str:
    return Word(node.value) if node.style is None else node.value


RunLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)


class _Dumper(yaml.SafeDumper):
    """
    YAML in which text that looks like something else, to this package or to YAML 1.1, stands in quotes, and text that is
    not printable as escapes.
    """

    def write_double_quoted(self, text: str, split: bool = True):
        self.allow_unicode, kept = printable(text) == text, self.allow_unicode
        super().write_double_quoted(text, split)
        self.allow_unicode = kept

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if printable(text, "\n\t") == text else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", str(text), style)

    def ignore_aliases(self, data) -> bool:
        return True


def _represent_word(dumper: _Dumper, word: Word) -> yaml.ScalarNode:
    """Plain, as it was read: the type of its field decides what it is."""
    return dumper.represent_scalar(dumper.resolve(yaml.ScalarNode, str(word), (True, False)), str(word))


def as_yaml(value: Any, flow: bool = False) -> str:
    """What was read from a run file as text that is read as the same: plain words are plain, and text is in quotes where it must be."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=flow)
    return text.removesuffix("...\n").strip() if flow else text


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(Word, _represent_word)
for _kind, _pattern in LOOKS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern.pattern})$"), None)
