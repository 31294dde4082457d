"""A training run as one YAML file with flags on top: sections `data`, `model` and `training`."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from pertstate.base.hub_names import is_repository, split_revision
from pertstate.base.messages import closest
from pertstate.data.arguments import DataArguments, PrepareArguments, StreamArguments


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


@dataclass
class RunConfig:
    """
    The sections: data, model fields (`preset` and any field of the config), training, stream and store arguments; and
    which fields of the data section stand in the file or among the flags, `given`.
    """

    data: DataArguments
    model: dict
    training: dict
    stream: StreamArguments
    prepare: PrepareArguments
    given: frozenset[str]

    def to_yaml(self) -> str:
        """
        The run as one YAML file that [`load_run_config`] reads to the same: file and flags together, without what is
        at its default, without tokens, and of every path its last part, as the rest is nobody's business.
        """
        content = {"data": self.data, "model": self.model, "training": self.training, "stream": self.stream}
        for section, values in content.items():
            if dataclasses.is_dataclass(values):
                values = {
                    f.name: getattr(values, f.name)
                    for f in dataclasses.fields(values)
                    if getattr(values, f.name) != _default(f)
                }
            content[section] = {
                name: _last_part(f"{section}.{name}", value)
                for name, value in values.items()
                if not name.endswith("_token")
            }
        written = {section: values for section, values in content.items() if values}
        return yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def load_run_config(
    path: str,
    flags: list[str],
    model_fields: Callable[[dict], set[str]] | None = None,
    training_fields: set[str] | None = None,
) -> RunConfig:
    """
    Read a run from YAML, flags winning over it.

    Args:
        path (`str`): YAML file with the sections `data`, `model` and `training` (and `stream`, or `prepare`).
        flags (`list[str]`): `--field value` or `--section.field value`; values are read as YAML, several words after a
            flag are a list.
        model_fields (callable, *optional*): from the model section (its `model_type`) to the fields that it may hold.
        training_fields (`set[str]`, *optional*): fields of the training arguments. Without these two, their sections
            are not looked at.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, an unknown section, field or flag (the nearest is said).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such run configuration (looked from {Path.cwd()})")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the sections {list(_SECTIONS)}, found {type(content).__name__}")
    for section, values in content.items():
        if section not in _SECTIONS:
            raise ValueError(f"{path}: unknown section {section!r}; {closest(section, _SECTIONS)}")
        if not isinstance(values, dict | None):
            raise ValueError(f"{path}: section {section!r} should hold `field: value` lines, found {values!r}")
    pairs = list(_parse_flags(flags))
    # The family decides which fields there are; a flag may name it, or the checkpoint that is of one.
    naming = ("model_type", "pretrained", "pretrained_revision")
    family = {name.rpartition(".")[2]: value for name, value in pairs if name.removeprefix("model.") in naming}
    known = {
        "data": {f.name for f in dataclasses.fields(DataArguments)},
        "model": model_fields and model_fields({**(content.get("model") or {}), **family}) | {"preset"},
        "training": training_fields,
        "stream": {f.name for f in dataclasses.fields(StreamArguments)},
        "prepare": {f.name for f in dataclasses.fields(PrepareArguments)},
    }
    not_looked_at = [section for section, names in known.items() if names is None]
    for section, values in content.items():
        for name in values or {}:
            if section not in not_looked_at and name not in known[section]:
                raise ValueError(
                    f"{path}: unknown field {name!r} in section {section!r}; {_where(name, section, known)}"
                )
    known = {section: names for section, names in known.items() if section not in not_looked_at}
    merged = {section: dict(content.get(section) or {}) for section in _SECTIONS}
    for name, value in pairs:
        section, _, field_name = name.rpartition(".")
        if section:
            if section not in known or field_name not in known[section]:
                raise ValueError(f"unknown flag --{name}; {_where(field_name, section, known)}")
            merged[section][field_name] = value
            continue
        sections = [s for s, names in known.items() if name in names]
        if not sections:
            raise ValueError(f"unknown flag --{name}; {_where(name, None, known)}")
        if len(sections) > 1:
            raise ValueError(
                f"--{name} is a field of {sections}: write --{sections[0]}.{name} or --{sections[1]}.{name}"
            )
        merged[sections[0]][name] = value
    for name, value in merged["training"].items():
        if name.endswith("_strategy") and value is False:
            # YAML reads the strategy `no` as false.
            merged["training"][name] = "no"
    stream, prepare = StreamArguments(**merged["stream"]), PrepareArguments(**merged["prepare"])
    data = DataArguments(**merged["data"])
    return RunConfig(data, merged["model"], merged["training"], stream, prepare, frozenset(merged["data"]))


def _default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _last_part(field: str, value):
    """Of a path, or of each path of a mapping; what is no path, or a name on the Hub, stays as it is."""
    if field not in _PATHS or (field in _HUB_NAMES and value is not None and is_repository(split_revision(value)[0])):
        return value
    if isinstance(value, dict):
        return {name: Path(path).name for name, path in value.items()}
    return Path(value).name if isinstance(value, str) else value


def _where(name: str, section: str | None, known: dict[str, set[str]]) -> str:
    elsewhere = [s for s, names in known.items() if name in names and s != section]
    if elsewhere:
        return f"it belongs to section {elsewhere[0]!r}"
    return closest(name, sorted(known[section] if section in known else set().union(*known.values())))


def _parse_flags(flags: list[str]):
    """`--name value ...` pairs; a flag without value is true."""
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
        values = [_parse_value(word) for word in words]
        yield name, True if not values else values[0] if len(values) == 1 else values


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are what they look like: 1e-4 is a number, 010, 12:30 and 2020-01-01 are text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:true|false|yes|no|on|off)", list("tTfFyYnNoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """YAML in which text that [`_Loader`] or YAML 1.1 would read as something else stands in quotes."""

    def ignore_aliases(self, data) -> bool:
        return True


for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def _parse_value(word: str):
    """A word of the command line as YAML reads it: a plain word, or a list, mapping or text in quotes."""
    if word.startswith(("[", "{", '"', "'")):
        try:
            return yaml.load(word, _Loader)
        except yaml.YAMLError:
            return word
    # Not through the parser, to which a lone | or # or - is structure.
    loader = _Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, word, (True, False)), word))
