"""What the labels of a cell say: its perturbation in one canonical spelling, its context, its batch. Read in one place."""

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from .doses import check_doses, dose_text
from .finite import within_reach
from .messages import closest, counted, instead, some


# Texts that stand for "no label".
MISSING = ("", "nan", "none", "na", "n/a", "<na>", "null", "unassigned")
# The labels that public screens give their controls; a number may follow.
_CONTROLS = re.compile(
    r"(non[-_ ]?targeting|nt|ntc|ntg|neg(ative)?[-_ ]?(c(on)?tro?l)?|c(on)?tro?l|dmso([-_ ]tf)?|vehicle|unperturbed|untreated|mock"
    r"|pbs|safe[-_ ]?(targeting|harbor)|scrambled?)[-_. \d]*",
    re.IGNORECASE,
)
JOINED = "|"  # joins the values of several columns
_NOTED = 100  # values of a column that may be named in a hint
_DOSE = "@"  # stands between a perturbation and its dose
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclass(frozen=True)
class LabelSettings:
    r"""
    How labels are found in obs. All values can be written as JSON.

    Args:
        perturbation_key (`str`, *optional*): column of the perturbations. None: every cell is a control.
        control (`str`): the name that control cells get.
        control_labels (`list[str]` or `dict[str, list[str]]`, *optional*): the labels that mark controls, or those of each
            dataset: names, or patterns such as `non-targeting*`. By default `control` alone.
        context_key (`str` or `list[str]`, *optional*): column of the contexts, or several, whose values are joined with "|".
            None: `context` says it.
        context (`str`, *optional*): the context of all cells, where no column says it.
        batch_key (`str` or `list[str]`, *optional*): column, or columns, of the experimental batch.
        combination_separator (`str`, *optional*): joins perturbations applied together.
        perturbation_map (`dict[str, str]`, *optional*): labels of the data to names of perturbations. A key is a label, or a
            pattern with one `*`, whose text replaces the `*` of the name: `{"*_g1": "*", "*_g2": "*"}`.
        unlabelled (`str`): what becomes of cells without a label: `"error"`, or `"drop"`.
        exclude, include (`dict[str, list]`, *optional*): columns of obs, each with a list of values. `exclude` leaves out
            cells that have one of the values; `include` uses only cells that have one in each column.
        dose_key (`str`, *optional*): column of the dose: a number, or for a combination one for each part, `"1;0.5"`.
        batch_datasets (`list[str]`, *optional*): the datasets whose batches are told apart. A batch is then called
            "DATASET|BATCH": batch 1 of one screen is not batch 1 of another.
        dataset (`str`, *optional*): the dataset of all cells, where the caller does not say it.
    """

    perturbation_key: str | None = "perturbation"
    control: str = "control"
    control_labels: "list[str] | dict[str, list[str]] | None" = None
    context_key: str | list[str] | None = "cell_type"
    context: str | None = None
    batch_key: str | list[str] | None = None
    combination_separator: str | None = "+"
    perturbation_map: dict[str, str] | None = None
    unlabelled: str = "error"
    exclude: dict[str, list] | None = None
    include: dict[str, list] | None = None
    dose_key: str | None = None
    batch_datasets: list[str] | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.unlabelled not in ("error", "drop"):
            raise ValueError(f"unlabelled={self.unlabelled!r}; {closest(self.unlabelled, ('error', 'drop'))}")
        by_dataset = self.control_labels if isinstance(self.control_labels, dict) else {}
        known = sorted({*(self.batch_datasets or ()), *by_dataset})
        if self.dataset is not None and known and self.dataset not in known:
            raise ValueError(f"there was no dataset {self.dataset!r} in training; {closest(self.dataset, known)}")
        if (self.context_key is None) == (self.context is None):
            raise ValueError(
                f"set one of context_key (found {self.context_key!r}), the column with each cell's context, and context "
                f"(found {self.context!r}), the context of all cells"
            )
        for name, value in (("exclude", self.exclude), ("include", self.include)):
            if value is not None and not (isinstance(value, dict) and all(isinstance(v, list) for v in value.values())):
                raise ValueError(f"{name}={value!r}: expected columns of obs, each with a list of values")
        for label, name in (self.perturbation_map or {}).items():
            if label.count("*") > 1 or name.count("*") > label.count("*"):
                raise ValueError(
                    f"perturbation_map has {label!r}: {name!r}; expected a label and its name, or a pattern with one '*' and "
                    "a name with at most one"
                )


def control_settings(control: "str | list[str] | dict[str, Any]") -> dict[str, Any]:
    """
    The settings `control` and `control_labels` of what a run says of its controls: a name, a pattern, a list of them, or
    one of these for each dataset.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(control, str) and "*" not in control:
        return {"control": control, "control_labels": None}
    per_dataset = control if isinstance(control, dict) else {"": control}
    labels = {dataset: [of] if isinstance(of, str) else of for dataset, of in per_dataset.items()}
    if not labels or not all(
        isinstance(of, list) and of and all(isinstance(x, str) for x in of) for of in labels.values()
    ):
        raise ValueError(f"control={control!r}: expected a name, a pattern such as 'non-targeting*', or a list of them")
    first = next(iter(labels.values()))[0]
    name = first.split("*")[0].strip("_-. ") or "control"
    return {"control": name, "control_labels": labels if isinstance(control, dict) else labels[""]}


@dataclass
class LabelReader:
    """
    Reads labels. Each distinct label is parsed once: the canonical name has its parts in alphabetical order, without parts
    that are controls, so that `A+ctrl`, `ctrl+A` and `A` are one name, and so are `A+B` and `B+A`.

    A separator within brackets, or with nothing on one side of it, does not separate (`(+)-JQ1`). With a `dose_key` a
    canonical name says the dose of each part: `A@0.1+B@10`.

    Args:
        settings ([`LabelSettings`]): how labels are found.
        whole (collection of `str`): names that contain the separator and stay whole.
    """

    settings: LabelSettings
    whole: Collection[str] = ()
    _seen: dict[tuple, str] = field(default_factory=dict)
    # The values of the columns that cells are chosen by, of each `exclude` and `include`.
    _values: dict[tuple[str, str], dict] = field(default_factory=dict)

    # Names

    def is_control(self, label: str, dataset: str | None = None) -> bool:
        """Whether a label, or a part of one, marks controls."""
        labels = self.settings.control_labels
        if labels is None:
            return label == self.settings.control
        if isinstance(labels, Mapping):
            if dataset is not None:
                labels = labels.get(dataset, [self.settings.control])
            else:
                labels = [one for of in labels.values() for one in of]
        return any(_matches(label, one) for one in labels)

    def canonical(self, label: str, dataset: str | None = None, dose: Any = None) -> str:
        """
        The canonical name of a label of the data.

        Args:
            label (`str`): the label.
            dataset (`str`, *optional*): whose controls are meant, where they differ.
            dose (`float` or `str`, *optional*): of the label's parts, separated by ";", or the one dose of all of them.

        Raises:
            ValueError: a dose is not a number above 0, there are not as many doses as parts, or a perturbation has
                the name of the controls.
        """
        key = (label, dataset, str(dose))  # True is no dose, and equals 1
        if key not in self._seen:
            self._seen[key] = self._parse(label.strip(), dataset, dose)
        return self._seen[key]

    def _parse(self, label: str, dataset: str | None, dose: Any) -> str:
        settings = self.settings
        if self.is_control(label, dataset):
            return settings.control
        parts = [self._mapped(part) for part in self._split(self._mapped(label, whole=True))]
        if not self.settings.dose_key:
            named = [part for part in parts if not self.is_control(part, dataset)]
            name = (settings.combination_separator or "").join(sorted(named)) or settings.control
            if named and name == settings.control:
                raise ValueError(
                    f"the perturbation {label!r} is called {name!r}, as the controls are by control={settings.control_labels!r}; "
                    "name it otherwise, or list it among the controls"
                )
            return name
        doses = self._doses(label, parts, dose, dataset)
        named = [f"{part}{_DOSE}{of}" for part, of in zip(parts, doses) if not self.is_control(part, dataset)]
        return (settings.combination_separator or "").join(sorted(named)) or settings.control

    def named(self, name: str) -> str:
        """The canonical name of what a person wrote: as `canonical`, but a dose is part of the name (`A@0.1`), or absent."""
        parts = [part for part in self._split(name.strip()) if not self.is_control(part)]
        if self.settings.dose_key:
            parts = [
                part if dose is None else f"{of}{_DOSE}{dose_text(dose)}"
                for part in parts
                for of, dose in [split_dose(part)]
            ]
        return (self.settings.combination_separator or "").join(sorted(parts)) or self.settings.control

    def _mapped(self, label: str, whole: bool = False) -> str:
        """
        The name that `perturbation_map` gives a label; exact labels go before patterns.

        Args:
            whole (`bool`): the label is not split into parts yet. If it holds the separator, only patterns with the separator
                apply to it.
        """
        table, separator = self.settings.perturbation_map or {}, self.settings.combination_separator
        if label in table:
            return table[label]
        for pattern, name in table.items():
            if whole and separator and separator in label and separator not in pattern:
                continue
            before, star, after = pattern.partition("*")
            fits = star and len(label) > len(before) + len(after) and label.startswith(before) and label.endswith(after)
            if fits:
                return name.replace("*", label[len(before) : len(label) - len(after)])
        return label

    def _split(self, label: str) -> list[str]:
        separator = self.settings.combination_separator
        if not separator or separator not in label or label in self.whole:
            return [label]
        parts, depth, start = [], 0, 0
        for i, character in enumerate(label):
            depth = max(0, depth + _BRACKETS.get(character, 0))
            if depth == 0 and label.startswith(separator, i) and i >= start:
                parts.append(label[start:i])
                start = i + len(separator)
        parts = [part.strip() for part in (*parts, label[start:])]
        return parts if all(parts) else [label]

    def _doses(self, label: str, parts: list[str], dose: Any, dataset: str | None) -> list[str]:
        texts = str(dose).split(";") if isinstance(dose, str) else [dose]
        if len(texts) == 1:
            texts = texts * len(parts)
        if len(texts) != len(parts):
            raise ValueError(
                f"{label!r} has {len(parts)} parts and the doses {dose!r}; expected one dose, or one for each part"
            )
        return [self._dose(label, part, text, dataset) for part, text in zip(parts, texts)]

    def _dose(self, label: str, part: str, dose: Any, dataset: str | None) -> str:
        if self.is_control(part, dataset):
            return ""
        try:
            number = float(str(dose))  # as it is written: 0.1 in single precision is 0.1
        except ValueError:
            number = math.nan
        if not within_reach(number):
            what = (
                "without its unit, all doses in one unit"
                if isinstance(dose, str) and any(character.isdigit() for character in dose)
                else "that a model can compute with (cells that got nothing are controls: give them the control's label)"
            )
            raise ValueError(
                f"obs[{self.settings.dose_key!r}] holds {dose!r} for {label!r}; expected a number above 0, {what}"
            )
        return dose_text(number)

    def parts(self, name: str) -> list[tuple[str, float | None]]:
        """The single perturbations of a canonical name, each with its dose or None; none for the control."""
        if name == self.settings.control:
            return []
        parts = [name] if name in self.whole else self._split(name)
        parts = [part for part in parts if not self.is_control(part)]
        return [split_dose(part) if self.settings.dose_key else (part, None) for part in parts]

    def at_doses(self, name: str, doses: list[float]) -> str:
        """
        The canonical name of a perturbation at doses.

        Args:
            doses (`list[float]`): one for each perturbation applied together, in the order of the name as it is written.

        Raises:
            ValueError: a dose is not a number above 0, or there is not one for each perturbation.
        """
        parts = [split_dose(part)[0] for part in self._split(name.strip()) if not self.is_control(part)]
        if len(doses) != len(parts):
            raise ValueError(f"doses: expected {len(parts)} (one for each perturbation together), found {len(doses)}")
        check_doses(doses)
        dosed = sorted(f"{part}{_DOSE}{dose_text(dose)}" for part, dose in zip(parts, doses))
        return (self.settings.combination_separator or "").join(dosed) or self.settings.control

    def unmeasured(self) -> list[str]:
        """
        The labels read so far that are split into parts of which one occurs nowhere else: neither alone, nor with a control,
        nor in another combination. There the separator may belong to a name.
        """
        labels = sorted({label.strip() for label, *_ in self._seen})
        cut = {
            label: [part for part in self._split(self._mapped(label, whole=True)) if not self.is_control(part)]
            for label in labels
        }
        seen: dict[str, set[frozenset[str]]] = {}
        for parts in cut.values():
            for part in parts:
                seen.setdefault(part, set()).add(frozenset(parts))
        return [label for label, parts in cut.items() if len(parts) > 1 and any(len(seen[part]) == 1 for part in parts)]

    def unmet(self) -> list[str]:
        """The values of `exclude` and `include` that no cell read so far has, in sentences."""
        notes = []
        for (name, key), found in self._values.items():
            for value in getattr(self.settings, name)[key]:
                if _comparable(value) not in found:
                    notes.append(f"{name}: no cell has {value!r} in obs[{key!r}]; {closest(value, found.values())}")
        return notes

    def doubts(self, groups: pd.DataFrame) -> list[str]:
        """
        What a person should look at in the labels read so far, in sentences: combinations of parts that nobody measured, filters
        that do nothing, names that are written almost alike.

        Args:
            groups (`pandas.DataFrame`): columns `context` and `perturbation`, of the cells that were read.
        """
        notes, unmeasured = [], self.unmeasured()
        if unmeasured:
            notes.append(
                f"{len(unmeasured)} labels are read as combinations, and a part of each stands nowhere else in the data: "
                f"{some(unmeasured)}; where {self.settings.combination_separator!r} belongs to names, set combination_separator: null"
            )
        notes += self.unmet()
        for key in ("context", "perturbation"):
            for names in alike(groups[key].unique()):
                notes.append(
                    f"{key}s {some(names)} are written almost alike, and are told apart; if they are the same, write them alike"
                )
        return notes

    def _note_values(self, name: str, key: str, found):
        noted = self._values.setdefault((name, key), {})
        wanted = {_comparable(value) for value in getattr(self.settings, name)[key]}
        for value in found:
            if len(noted) < _NOTED or _comparable(value) in wanted:
                noted.setdefault(_comparable(value), value)

    # Cells

    @property
    def columns(self) -> list[str]:
        """The columns of obs that are read."""
        settings = self.settings
        keys = [
            settings.perturbation_key,
            *_listed(settings.context_key),
            *_listed(settings.batch_key),
            settings.dose_key,
        ]
        keys += [*(settings.exclude or ()), *(settings.include or ())]
        return list(dict.fromkeys(key for key in keys if key is not None))

    def read(self, obs: pd.DataFrame, dataset: str | None = None) -> pd.DataFrame:
        """
        The labels of the cells of a table: columns `perturbation` (canonical), `context` and, where there are batches,
        `batch`, as plain strings. Cells that are left out have None in all of them.

        Raises:
            KeyError: a column is missing; those that exist are listed.
            ValueError: a label is empty, blank, or holds a NUL character (unless such cells are dropped); a dose is wrong.
        """
        settings = self.settings
        dataset = settings.dataset if dataset is None else dataset
        columns = {"perturbation": _listed(settings.perturbation_key), "context": _listed(settings.context_key)}
        if settings.batch_key is not None:
            columns["batch"] = _listed(settings.batch_key)
        given = {key: _column(obs, key, name) for name, keys in columns.items() for key in keys}
        kept = np.ones(len(obs), dtype=bool)
        for name, table in (("include", settings.include), ("exclude", settings.exclude)):
            for key, values in (table or {}).items():
                codes, found = pd.factorize(_column(obs, key, "filter").astype(object), use_na_sentinel=False)
                self._note_values(name, key, found)
                wanted = {_comparable(value) for value in values}
                is_one = np.array([_comparable(of) in wanted for of in found], dtype=bool)[codes]
                kept &= is_one == (name == "include")
        read: dict[str, np.ndarray] = {}
        for name, keys in columns.items():
            parts = []
            for key in keys:
                labels = _Texts(
                    given[key], partial(self.is_control, dataset=dataset) if name == "perturbation" else None
                )
                if settings.unlabelled == "drop":
                    kept &= ~labels.missing()
                labels.check(key, kept)
                parts.append(labels.texts())
            if parts:
                read[name] = parts[0] if len(parts) == 1 else _joined(parts)
        if "batch" in read and settings.batch_datasets is not None and dataset is not None:
            read["batch"] = _joined([np.full(len(obs), dataset, dtype=object), read["batch"]])
        if settings.context is not None:
            read["context"] = np.full(len(obs), settings.context, dtype=object)
        if settings.perturbation_key is None:
            read["perturbation"] = np.full(len(obs), settings.control, dtype=object)
        elif settings.dose_key is None:
            read["perturbation"] = self._canonical_names(read["perturbation"], kept, dataset)
        else:
            doses = _column(obs, settings.dose_key, "dose")
            read["perturbation"] = self._dosed_names(read["perturbation"], doses, kept, dataset)
        frame = pd.DataFrame({name: read[name] for name in columns}, index=obs.index)
        if not kept.all():
            frame.loc[~kept] = None
        return frame

    def _canonical_names(self, labels: np.ndarray, kept: np.ndarray, dataset: str | None) -> np.ndarray:
        codes, names = pd.factorize(labels)
        used = np.zeros(len(names), dtype=bool)
        used[codes[kept]] = True
        return np.array([self.canonical(n, dataset) if use else None for n, use in zip(names, used)], dtype=object)[
            codes
        ]

    def _dosed_names(self, labels: np.ndarray, doses: pd.Series, kept: np.ndarray, dataset: str | None) -> np.ndarray:
        codes, names = pd.factorize(labels)
        dose_codes, values = pd.factorize(doses, use_na_sentinel=False)
        values = np.asarray(values)  # whose numbers keep their precision
        pairs, inverse = np.unique((codes * max(1, len(values)) + dose_codes)[kept], return_inverse=True)
        parsed = [self.canonical(names[pair // len(values)], dataset, values[pair % len(values)]) for pair in pairs]
        found = np.full(len(labels), None, dtype=object)
        found[kept] = np.array(parsed, dtype=object)[inverse]
        return found


def alike(names: Collection[str]) -> list[list[str]]:
    """Names that differ in nothing but case, spaces and the form of their letters in Unicode, each such group sorted."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        folded = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(folded, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _matches(label: str, pattern: str) -> bool:
    """Whether a label is the one that is named, or fits a pattern, in which `*` stands for any text and all else for itself."""
    first, *inner = pattern.split("*")
    if not inner:
        return label == pattern
    last = inner.pop()
    at, end = len(first), len(label) - len(last)
    if at > end or not label.startswith(first) or not label.endswith(last):
        return False
    for part in inner:  # each at its first place, so that no pattern takes long
        at = label.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def looks_like_control(label: str) -> bool:
    """Whether a label is one that public screens give their controls."""
    return _CONTROLS.fullmatch(label.strip()) is not None


def suggested_controls(labels: list[str]) -> str | list[str] | None:
    """
    The option `control` that a person may mean: the labels that look like controls, as a pattern where they are many and it
    fits no other label.
    """
    labels = sorted({label.strip() for label in labels})
    found = [label for label in labels if looks_like_control(label)]
    stems = {label.rstrip("-_. 0123456789") for label in found}
    if len(found) > 3 and len(stems) == 1:
        pattern = f"{stems.pop()}*"
        if [label for label in labels if _matches(label, pattern)] == found:
            return pattern
    return None if not found else found[0] if len(found) == 1 else found


def split_dose(part: str) -> tuple[str, float | None]:
    """A part of a name without its dose, and the dose; None where it has none."""
    name, at, dose = part.rpartition(_DOSE)
    try:
        return (name, float(dose)) if at else (part, None)
    except ValueError:
        return part, None


def _listed(keys: str | list[str] | None) -> list[str]:
    return [] if keys is None else [keys] if isinstance(keys, str) else list(keys)


def _column(obs: pd.DataFrame, key: str, name: str) -> pd.Series:
    if key not in obs:
        setting = "include or exclude" if name == "filter" else f"{name}_key"
        raise KeyError(
            f"obs has no column {key!r} ({name}), {instead(key, obs.columns)}; name the column with {setting}"
            + (", or the one context of all cells with context" if name == "context" else "")
        )
    return obs[key]


def label_text(value) -> str:
    """A label as text, without spaces around it. Whole numbers are written alike, also where they are stored as fractions."""
    if isinstance(value, (float, np.floating)) and value.is_integer():
        return str(int(value))
    return str(value).strip()


class _Texts:
    """A column as plain strings, each distinct one looked at once."""

    def __init__(self, column: pd.Series, is_label: Callable[[str], bool] | None = None):
        self.index = column.index
        if isinstance(column.dtype, pd.CategoricalDtype):
            self.codes, values = column.cat.codes.to_numpy(), column.cat.categories
        else:
            self.codes, values = pd.factorize(column)
        self.names = np.array([label_text(value) for value in values], dtype=object)
        # A word that usually says "no label" may be that of the controls.
        self.gone = np.array([name.lower() in MISSING and not (is_label and is_label(name)) for name in self.names])

    def missing(self) -> np.ndarray:
        """Which cells have no label."""
        return (self.codes < 0) | (np.append(self.gone, True)[self.codes] if len(self.names) else True)

    def check(self, key: str, kept: np.ndarray):
        """ValueError if one of the cells that are kept has no label, or one with a NUL character."""
        missing = self.missing() & kept
        if missing.any():
            at = int(np.flatnonzero(missing)[0])
            label = "" if self.codes[at] < 0 else self.names[self.codes[at]]
            what = "is empty" if self.codes[at] < 0 else "is blank" if not label.strip() else f"says {label!r}"
            raise ValueError(
                f"obs[{key!r}] {what} in {counted(int(missing.sum()), 'cell')}, first in {self.index[at]!r}; label them, or set "
                "unlabelled: drop"
            )
        # In some places pandas and numpy see the whole of a text with a NUL, in others only what stands before the NUL.
        cut = next((name for name in self.names if "\0" in name), None)
        if cut is not None:
            raise ValueError(f"obs[{key!r}] holds {cut!r}, a label with a NUL character; rename it")

    def texts(self) -> np.ndarray:
        """The string of each cell; any string for a cell without a label."""
        return self.names[self.codes] if len(self.names) else np.full(len(self.codes), "", dtype=object)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    codes, names = pd.factorize(pd.MultiIndex.from_arrays(parts))
    return np.array([JOINED.join(name) for name in names], dtype=object)[codes]


def _comparable(value) -> Any:
    """What values of obs are compared by: a number or boolean equals its text."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return None
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        return float(text)
    except ValueError:
        return text


__all__ = ["LabelReader", "LabelSettings"]
