"""A training run as one YAML file with flags on top: sections `data`, `model` and `training`."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

from cellstate.configuration_state import closest
from cellstate.data.perturbation_features import read_perturbation_features
from cellstate.data.reading import H5ADFile, expand_paths
from cellstate.data.splits import Splits
from cellstate.processing import StateProcessor


@dataclass
class DataArguments:
    """
    The `data` section.

    Args:
        splits (`str`, *optional*): TOML file with `[datasets]`, `[training]`, `[zeroshot]`, `[fewshot]`. Or, for the
            simple cases, the next five fields.
        datasets (`dict[str, str]` or `str`, *optional*): name of each dataset to a file, folder or glob; or one of
            these alone.
        test_contexts, val_contexts (`list[str]`): contexts held out whole, in every dataset that has them.
        test_perturbations, val_perturbations (`list[str]`): perturbations held out in every remaining context.
        contexts (`list[str]`, *optional*): use these contexts of the files alone.
        perturbation_key, control, context_key, batch_key, input, genes, normalize, combination_separator,
            gene_input, target_sum: see [`StateProcessor.fit`].
        perturbation_features (`str`, *optional*): file with a vector for each perturbation, see
            [`read_perturbation_features`]; used instead of ids, so that unseen perturbations can be predicted.
        hvg_on_all (`bool`): choose highly variable genes on all cells, held-out ones too; only to repeat figures.
        control_matching, small_groups, control_sentences, heldout_controls: see [`SentenceDataset`].
    """

    splits: str | None = None
    datasets: dict | str | None = None
    test_contexts: list = field(default_factory=list)
    val_contexts: list = field(default_factory=list)
    test_perturbations: list = field(default_factory=list)
    val_perturbations: list = field(default_factory=list)
    contexts: list | None = None
    perturbation_key: str = "perturbation"
    control: str = "control"
    context_key: str = "cell_type"
    batch_key: str | None = None
    input: str = "X"
    genes: int | list | None = None
    normalize: str = "auto"
    combination_separator: str | None = "+"
    gene_input: str | None = None
    target_sum: float | int | str | None = None
    perturbation_features: str | None = None
    hvg_on_all: bool = False
    control_matching: str = "context"
    small_groups: str = "pad"
    control_sentences: bool = True
    heldout_controls: bool = True

    def __post_init__(self):
        simple = ("test_contexts", "val_contexts", "test_perturbations", "val_perturbations")
        for option in dataclasses.fields(self):
            setattr(self, option.name, _checked(option, getattr(self, option.name)))
        if (self.splits is None) == (self.datasets is None):
            raise ValueError(
                "data: set one of `splits` (a TOML file) and `datasets` (files), found "
                + ("neither" if self.splits is None else "both")
            )
        if self.splits is not None and any(getattr(self, name) for name in simple):
            raise ValueError(f"data: with a `splits` file, say there what is held out, not in {list(simple)}")
        for kind in ("contexts", "perturbations"):
            both = set(getattr(self, f"test_{kind}")) & set(getattr(self, f"val_{kind}"))
            if both:
                raise ValueError(f"data: {sorted(both)} are in val_{kind} and test_{kind}; a pair has one split")

    def processor_options(self) -> dict:
        """Arguments of [`StateProcessor.fit`]."""
        names = ("perturbation_key", "control", "context_key", "batch_key", "input", "genes", "normalize")
        options = {name: getattr(self, name) for name in (*names, "combination_separator", "gene_input", "target_sum")}
        if self.perturbation_features is not None:
            options["perturbation_features"] = read_perturbation_features(self.perturbation_features)
        return options

    def sentence_options(self) -> dict:
        """Arguments of [`SentenceDataset`]."""
        names = ("control_matching", "small_groups", "control_sentences", "heldout_controls")
        return {name: getattr(self, name) for name in names}

    def resolve_splits(self) -> Splits:
        """The [`Splits`] that the section describes; reads labels of the files where the simple fields need them."""
        if self.splits is not None:
            return Splits.from_toml(self.splits)
        named = self.datasets if isinstance(self.datasets, dict) else {Path(self.datasets).stem: self.datasets}
        datasets = {name: expand_paths(pattern) for name, pattern in named.items()}
        held = {"test": self.test_perturbations, "val": self.val_perturbations}
        contexts = {**dict.fromkeys(self.val_contexts, "val"), **dict.fromkeys(self.test_contexts, "test")}
        if not contexts and not any(held.values()):
            return Splits(datasets, set(datasets))
        present = self._present(datasets)
        for context in contexts:
            if context not in {c for _, c in present}:
                raise ValueError(
                    f"data: held-out context {context!r} is not in the data; {closest(context, sorted({c for _, c in present}))}"
                )
        everything = sorted({p for names in present.values() for p in names})
        for name in (n for names in held.values() for n in names):
            if name not in everything:
                raise ValueError(
                    f"data: held-out perturbation {name!r} is not in the data; {closest(name, everything)}"
                )
        zeroshot, fewshot = {}, {}
        for (dataset, context), names in present.items():
            if context in contexts:
                zeroshot[dataset, context] = contexts[context]
                continue
            here = {split: [n for n in wanted if n in names] for split, wanted in held.items()}
            if any(here.values()):
                fewshot[dataset, context] = here
        return Splits(datasets, set(datasets), zeroshot, fewshot)

    def _present(self, datasets: dict[str, list[Path]]) -> dict[tuple[str, str], set[str]]:
        """Perturbations of each (dataset, context), from the obs of the files."""
        reader = StateProcessor(
            perturbation_key=self.perturbation_key, control=self.control, context_key=self.context_key
        )
        present: dict[tuple[str, str], set[str]] = {}
        for name, paths in datasets.items():
            for path in paths:
                with H5ADFile(path) as data:
                    labels = reader.labels(data)
                if self.contexts is not None:
                    labels = labels[labels["context"].isin(self.contexts)]
                for context, group in labels.groupby("context"):
                    present.setdefault((name, str(context)), set()).update(group["perturbation"].unique())
        return present


def _checked(option: dataclasses.Field, value):
    """The value of a field as its type says. A whole number where names are expected is a name, as in `control: 0`."""

    def as_name(item):
        return str(item) if isinstance(item, int) and not isinstance(item, bool) else item

    takes_list, takes_text = isinstance([], option.type), isinstance("", option.type)
    if isinstance(value, list):
        value = [as_name(item) for item in value]
    elif not isinstance(1, option.type):
        value = as_name(value)
    if takes_list and isinstance(value, str):
        value = [value]
    fits = isinstance(value, option.type) and (option.type is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        expected = option.type.__name__ if isinstance(option.type, type) else str(option.type)
        raise ValueError(
            f"data.{option.name}: expected {expected}, found {value!r}"
            + ("; a name that reads as something else stands in quotes" if takes_list or takes_text else "")
        )
    return value


@dataclass
class RunConfig:
    """The three sections: data arguments, model fields (`preset` and any field of the config), training arguments."""

    data: DataArguments
    model: dict
    training: dict


def load_run_config(path: str, flags: list[str], model_fields: set[str], training_fields: set[str]) -> RunConfig:
    """
    Read a run from YAML, flags winning over it.

    Args:
        path (`str`): YAML file with the sections `data`, `model` and `training`.
        flags (`list[str]`): `--field value` or `--section.field value`; values are read as YAML, several words after a
            flag are a list.
        model_fields, training_fields (`set[str]`): fields of the model's config and of the training arguments.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, an unknown section, field or flag (the nearest is said).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such run configuration (looked from {Path.cwd()})")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    known = {
        "data": {f.name for f in dataclasses.fields(DataArguments)},
        "model": model_fields | {"preset"},
        "training": training_fields,
    }
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the sections {list(known)}, found {type(content).__name__}")
    for section, values in content.items():
        if section not in known:
            raise ValueError(f"{path}: unknown section {section!r}; {closest(section, known)}")
        if not isinstance(values, dict | None):
            raise ValueError(f"{path}: section {section!r} should hold `field: value` lines, found {values!r}")
        for name in values or {}:
            if name not in known[section]:
                raise ValueError(
                    f"{path}: unknown field {name!r} in section {section!r}; {_where(name, section, known)}"
                )
    merged = {section: dict(content.get(section) or {}) for section in known}
    for name, value in _parse_flags(flags):
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
    return RunConfig(DataArguments(**merged["data"]), merged["model"], merged["training"])


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
