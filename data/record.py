"""The record of what a checkpoint learned from. Baselines, warnings of leaks, model cards and resumed runs read it."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pertstate.base.bounded_text import DAMAGED, LARGEST_TABLES
from pertstate.base.cell_ids import is_number, mixed, name_id
from pertstate.base.checkpoint_files import find_file, read_json
from pertstate.base.constants import Split
from pertstate.base.files import whole_file
from pertstate.base.finite import are_finite
from pertstate.base.origin import FALSE_DISCOVERIES, RECORD_FILE, RECORD_FORMAT, read_change_tests
from pertstate.base.public import public
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.data.group_means import GroupMeans


RECORD_ARRAYS = "record.safetensors"
_SPREAD = "interval_spread"
# The hashes of at most so many training cells are kept, the lowest ones: a fair sample, 8 MB.
MAX_HASHES = 1_000_000
# Where at least this share of a group's cells were trained on under another name, the group counts as seen.
SEEN_SHARE = 0.05


@dataclass(frozen=True)
class RecordedGroup:
    """One (dataset, context, perturbation) of a run: its split, and how many cells it has."""

    dataset: str
    context: str
    perturbation: str
    split: str
    cells: int


@dataclass(frozen=True)
class Ancestor:
    """
    A checkpoint that training started from, or that this one started from in its turn.

    Args:
        name (`str`): its repository, or the last part of its folder.
        groups (`list[RecordedGroup]`, *optional*): what it was trained on; None where it has no record.
    """

    name: str
    groups: list[RecordedGroup] | None


@dataclass
class RunRecord:
    """
    What a run trained on and what it held out.

    Args:
        control (`str`): the canonical name of control cells.
        groups (`list[RecordedGroup]`): all groups of the run's data, with their splits.
        learned_controls (`list[tuple[str, str]]`): the (dataset, context) pairs whose control cells were among the training
            cells.
        sources (`list[dict]`): the files, stores and streams, with their hashes; see [`~pertstate.hub.provenance.Source`].
        settings (`dict`): the sections of the run that shape its result.
        notes (`list[str]`): what was left out of the data, in sentences.
        chosen_on_all (`bool`): highly variable genes were chosen on all cells, test cells among them.
        ancestors (`list[Ancestor]`): the checkpoints that came before, the nearest first.
        means ([`GroupMeans`], *optional*): of the training groups, in the units of predictions.
        hashes (`np.ndarray`, *optional*): hashes of training cells, sorted; None where cells have no barcodes.
        whole (`bool`): whether these are all training cells, and no sample.
        change_tests (`dict[str, float]`): perturbation to the adjusted p-value of its change in training, see
            [`~pertstate.training.change_test.change_tests`]; those of ancestors are among them. Empty if none was tested.
        intervals ([`ChangeIntervals`], *optional*): of predicted mean changes; None if no training groups were held out in turn.
        calibration ([`ConfidenceCalibration`], *optional*): of the model's confidence; None if it has none, or the run had too few
            validation groups.
    """

    control: str
    groups: list[RecordedGroup]
    learned_controls: list[tuple[str, str]] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chosen_on_all: bool = False
    ancestors: list[Ancestor] = field(default_factory=list)
    means: GroupMeans | None = None
    hashes: np.ndarray | None = None
    whole: bool = True
    change_tests: dict[str, float] = field(default_factory=dict)
    intervals: ChangeIntervals | None = None
    calibration: ConfidenceCalibration | None = None

    # Questions

    def of_split(self, split: str) -> list[RecordedGroup]:
        """The groups of a split."""
        return [group for group in self.groups if group.split == split]

    def seen(self, dataset: str | None, context: str, perturbation: str) -> str:
        """
        How a group was trained on, in words; empty where it was not.

        Args:
            dataset (`str`, *optional*): its dataset, where it is known to be one of the run's.
        """
        datasets, of_ancestors = self._trained
        of_pair = datasets.get((context, perturbation), set())
        if of_pair if dataset is None else dataset in of_pair:
            return "trained on"
        return of_ancestors.get((context, perturbation), "")

    @cached_property
    def _trained(self) -> tuple[dict[tuple[str, str], set[str]], dict[tuple[str, str], str]]:
        """The datasets in which each (context, perturbation) was trained on, and what is said of those of ancestors."""
        datasets: dict[tuple[str, str], set[str]] = {}
        for group in self.of_split(Split.TRAIN):
            datasets.setdefault((group.context, group.perturbation), set()).add(group.dataset)
        of_ancestors: dict[tuple[str, str], str] = {}
        for ancestor in self.ancestors:
            for group in ancestor.groups or ():
                of_ancestors.setdefault((group.context, group.perturbation), f"trained on by {ancestor.name}")
        return datasets, of_ancestors

    def seen_cells(self, perturbation: str, ids: np.ndarray | None) -> bool:
        """
        Whether cells of a perturbation are among the training cells, whatever their context is called.

        Args:
            ids (`np.ndarray`, *optional*): see [`~pertstate.base.cell_ids.cell_ids`].
        """
        if self.hashes is None or ids is None or not len(self.hashes):
            return False
        found = hashes_of(ids, perturbation)
        found = found if self.whole else found[found <= self.hashes[-1]]
        return bool(len(found)) and float(np.isin(found, self.hashes).mean()) >= SEEN_SHARE

    def indistinguishable(self, perturbations: Iterable[str]) -> list[str]:
        """Those of some perturbations whose change in training is not distinguishable from none, sorted."""
        return sorted({name for name in perturbations if self.change_tests.get(name, 0) > FALSE_DISCOVERIES})

    def warnings(self, scored: Iterable[tuple[str | None, str, str]]) -> list[str]:
        """
        What must be said beside scores.

        Args:
            scored (iterable of `(dataset, context, perturbation)`): the scored groups; None for a dataset that is not known to be one
                of the run's.
        """
        notes = []
        if self.chosen_on_all:
            notes.append("highly variable genes were chosen on all cells, the scored ones among them")
        groups = set(scored)
        places = {(dataset, context) for dataset, context, _ in groups}
        learned = sorted({c for d, c in self.learned_controls if (d, c) in places or (None, c) in places})
        if learned:
            notes.append(
                f"control cells of the scored contexts were among the training cells: {', '.join(learned[:10])}"
            )
        val = self.of_split(Split.VAL)
        chose = [g for g in val if {(g.dataset, g.context, g.perturbation), (None, g.context, g.perturbation)} & groups]
        if chose:
            notes.append(
                "scored groups were the validation groups that chose the checkpoint: "
                + ", ".join(f"{group.context} / {group.perturbation}" for group in chose[:10])
            )
        own = {(group.context, group.perturbation) for group in self.of_split(Split.TRAIN)}
        own |= set() if self.means is None else {(context, name) for _, context, name in self.means.groups}
        notes += [
            f"the baselines do not know what {ancestor.name}, from which training started, was trained on, as the model does"
            for ancestor in self.ancestors
            if not {(group.context, group.perturbation) for group in ancestor.groups or ()} <= own
        ]
        notes += [
            f"what {ancestor.name}, from which training started, was trained on is not recorded: it may have seen the scored groups"
            for ancestor in self.ancestors
            if ancestor.groups is None
        ]
        return notes

    def as_ancestors(self, name: str) -> list[Ancestor]:
        """The checkpoint of this record and those before it, for the record of a run that starts from it."""
        return [Ancestor(name, self.of_split(Split.TRAIN)), *self.ancestors]

    def difference(self, other: "RunRecord") -> str | None:
        """How the data, the split or the settings of another run differ from these; None where they do not."""
        for name, mine, its in (
            ("the groups and their splits", _split_text(self.groups), _split_text(other.groups)),
            ("the data files", [_source_key(s) for s in self.sources], [_source_key(s) for s in other.sources]),
        ):
            if mine != its:
                only, new = ([x for x in a if x not in b][:3] for a, b in ((mine, its), (its, mine)))
                return f"{name} differ: recorded {only or 'the same and fewer'}, now {new or 'fewer'}"
        for key in sorted({*self.settings, *other.settings}):
            if self.settings.get(key) != other.settings.get(key):
                return f"{key} differs: recorded {self.settings.get(key)!r}, now {other.settings.get(key)!r}"
        return None

    # Saving and loading

    def to_dict(self) -> dict[str, Any]:
        """All but the arrays, for JSON."""
        return {
            "format": RECORD_FORMAT,
            "control": self.control,
            "groups": _nested(self.groups),
            "learned_controls": [list(place) for place in self.learned_controls],
            "sources": public(self.sources),
            "settings": public(self.settings),
            "notes": self.notes,
            "chosen_on_all": self.chosen_on_all,
            "ancestors": [
                {"name": one.name, "groups": None if one.groups is None else _nested(one.groups)}
                for one in self.ancestors
            ],
            "means": None if self.means is None else [list(key) for key in self.means.groups],
            "all_hashes": self.whole,
            "change_tests": self.change_tests,
            "intervals": None if self.intervals is None else self.intervals.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }

    def save(self, folder: str | os.PathLike):
        """Write `record.json` and `record.safetensors`."""
        arrays = {}
        if self.hashes is not None:
            arrays["cells"] = self.hashes
        if self.means is not None:
            arrays |= {"counts": self.means.counts, "means": self.means.means}
            if self.means.expression is not None:
                arrays["expression"] = self.means.expression
        if self.intervals is not None:
            arrays[_SPREAD] = self.intervals.spread
        with whole_file(Path(folder, RECORD_ARRAYS)) as partial:
            save_file(arrays, partial)
        with whole_file(Path(folder, RECORD_FILE)) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, name: str | os.PathLike, hub: dict | None = None) -> "RunRecord | None":
        """
        The record of a checkpoint; None where it has none.

        Args:
            name: its folder, or a repository on the Hub.
            hub (`dict`, *optional*): arguments of the library that fetches files, such as `revision`.

        Raises:
            ValueError: the record is damaged.
        """
        path = find_file(str(name), RECORD_FILE, hub or {})
        if path is None:
            return None
        arrays_path = find_file(str(name), RECORD_ARRAYS, hub or {})
        content = read_json(path, LARGEST_TABLES)
        try:
            arrays = {} if arrays_path is None else load_file(arrays_path)
            return cls._of(content, arrays)
        except (*DAMAGED, SafetensorError) as error:
            raise ValueError(
                f"{path}: the record of the checkpoint is damaged ({error!r}); copy the checkpoint again"
            ) from error

    @classmethod
    def from_dict(cls, content: dict) -> "RunRecord":
        """
        What [`RunRecord.to_dict`] gave, without the means and the intervals.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is damaged.
        """
        return cls._of({**content, "means": None, "intervals": None}, {})

    @classmethod
    def _of(cls, content: dict, arrays: dict[str, np.ndarray]) -> "RunRecord":
        if content["format"] != RECORD_FORMAT:
            raise ValueError(f"expected format {RECORD_FORMAT}, found {content['format']!r}")
        means = None
        if content["means"] is not None:
            keys = [(str(a), str(b), str(c)) for a, b, c in content["means"]]
            found = arrays["means"]
            for of in (found, arrays.get("expression", found)):
                if of.dtype.kind != "f" or of.shape != found.shape or of.ndim != 2 or len(of) != len(keys):
                    raise ValueError(f"expected {len(keys)} rows of means, found {_described(of)}")
                if not are_finite(of):
                    raise ValueError("expected finite means")
            counts = arrays["counts"]
            if counts.dtype.kind not in "iu" or counts.shape != (len(keys),) or not (counts > 0).all():
                raise ValueError(f"expected {len(keys)} numbers of cells above 0, found {_described(counts)}")
            means = GroupMeans(str(content["control"]), keys, counts, found, arrays.get("expression"))
        hashes = arrays.get("cells")
        if hashes is not None and (
            hashes.dtype != np.uint64 or hashes.ndim != 1 or not (hashes[:-1] <= hashes[1:]).all()
        ):
            raise ValueError(f"expected sorted hashes of cells, found {_described(hashes)}")
        intervals, calibration = content.get("intervals"), content.get("calibration")
        return cls(
            control=str(content["control"]),
            groups=_flat(content["groups"]),
            learned_controls=[(str(a), str(b)) for a, b in content["learned_controls"]],
            sources=[dict(source) for source in content["sources"]],
            settings=dict(content["settings"]),
            notes=[str(note) for note in content["notes"]],
            chosen_on_all=bool(content["chosen_on_all"]),
            ancestors=[
                Ancestor(str(one["name"]), None if one["groups"] is None else _flat(one["groups"]))
                for one in content["ancestors"]
            ],
            means=means,
            hashes=hashes,
            whole=bool(content["all_hashes"]),
            change_tests=read_change_tests(content),
            intervals=None if intervals is None else ChangeIntervals.from_dict(intervals, arrays[_SPREAD]),
            calibration=None if calibration is None else ConfidenceCalibration.from_dict(calibration),
        )


def _described(array: np.ndarray) -> str:
    return f"an array of {array.dtype} and shape {array.shape}"


def recorded_groups(groups: pd.DataFrame) -> list[RecordedGroup]:
    """The groups of a table with `dataset`, `context`, `perturbation`, `split`, `start` and `stop`; batches are put together."""
    sizes = groups.assign(cells=groups["stop"] - groups["start"])
    keys = ["dataset", "context", "perturbation", "split"]
    summed = sizes.groupby(keys, observed=True, sort=True)["cells"].sum()
    return [RecordedGroup(str(a), str(b), str(c), str(d), int(cells)) for (a, b, c, d), cells in summed.items()]


def hashes_of(ids: np.ndarray, perturbation: str) -> np.ndarray:
    """Hashes of cells, unlike those of other perturbations; of cells that are merely numbered, none."""
    ids = ids[~is_number(ids)]
    return mixed(ids ^ np.uint64(name_id(perturbation)))


def lowest(hashes: Iterable[np.ndarray], at_most: int = MAX_HASHES) -> tuple[np.ndarray, bool]:
    """The lowest of some hashes, sorted, and whether these are all."""
    kept, whole = np.zeros(0, dtype=np.uint64), True
    for found in hashes:
        kept = np.unique(np.concatenate([kept, found]))
        whole &= len(kept) <= at_most
        kept = kept[:at_most]
    return kept, whole


def source_of(source: Any) -> dict:
    """What is recorded of a source of cells."""
    return {name: value for name, value in asdict(source).items() if value is not None}


def _nested(groups: list[RecordedGroup]) -> dict:
    nested: dict[str, Any] = {}
    for group in groups:
        of_context = nested.setdefault(group.dataset, {}).setdefault(group.context, {})
        of_context.setdefault(group.split, {})[group.perturbation] = group.cells
    return nested


def _flat(nested: dict) -> list[RecordedGroup]:
    return [
        RecordedGroup(dataset, context, perturbation, split, int(cells))
        for dataset, of_dataset in nested.items()
        for context, of_context in of_dataset.items()
        for split, of_split in of_context.items()
        for perturbation, cells in of_split.items()
    ]


def _split_text(groups: list[RecordedGroup]) -> list[str]:
    return sorted(f"{g.dataset} / {g.context} / {g.perturbation} ({g.split}, {g.cells} cells)" for g in groups)


def _source_key(source: dict) -> str:
    return f"{source['name']} {source.get('sha256') or source.get('commit') or source['what']}"
