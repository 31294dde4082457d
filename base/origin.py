"""Where a processor was loaded from, and what the record of that checkpoint says of groups of cells."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .bounded_text import DAMAGED
from .checkpoint_files import find_file, read_json
from .public import last_part, public


# What a run leaves in its checkpoint; `pertstate.data.record` writes it.
RECORD_FILE, RECORD_FORMAT = "record.json", 1
NEW = "not in its data"
# The expected share of false ones among the perturbations whose change is called distinguishable from none.
FALSE_DISCOVERIES = 0.05
_SHOWN = 20


@dataclass
class Origin:
    """
    A checkpoint that a processor was loaded from.

    Args:
        name (`str`): the last part of its folder, or its repository with the commit.
        recorded (`bool`): it has a record of its run.
        sources (`list[dict]`): the files, stores and streams that the run read.
        splits (`dict[tuple[str, str], str]`): (context, perturbation) to its split, or its splits.
        before (`list[tuple[str, set]]`): the checkpoints that training started from, the nearest first, with what each was
            trained on.
        change_tests (`dict[str, float]`): perturbation to its adjusted p-value; see [`~pertstate.data.record.RunRecord`].
    """

    name: str
    recorded: bool = False
    sources: list[dict[str, Any]] = field(default_factory=list)
    splits: dict[tuple[str, str], str] = field(default_factory=dict)
    before: list[tuple[str, set[tuple[str, str]]]] = field(default_factory=list)
    change_tests: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str | os.PathLike, hub: dict, commit: str | None) -> "Origin":
        """
        That of a checkpoint.

        Args:
            name: its folder, or a repository on the Hub.
            hub (`dict`): arguments of the library that fetches files.
            commit (`str`, *optional*): of the repository.

        Raises:
            ValueError: its record is damaged.
        """
        origin = cls(last_part(name) if commit is None else f"{name}@{commit}")
        path = find_file(name, RECORD_FILE, hub if commit is None else {**hub, "revision": commit})
        if path is None:
            return origin
        content = read_json(path)
        try:
            origin._read(content)
        except DAMAGED as error:
            raise ValueError(
                f"{path}: the record of the checkpoint is damaged ({error!r}); copy the checkpoint again"
            ) from error
        return origin

    def _read(self, content: dict):
        if content["format"] != RECORD_FORMAT:
            raise ValueError(f"expected format {RECORD_FORMAT}, found {content['format']!r}")
        self.recorded = True
        self.sources = [dict(source) for source in content["sources"]]
        splits: dict[tuple[str, str], set[str]] = {}
        for context, split, perturbation in _groups(content["groups"]):
            splits.setdefault((context, perturbation), set()).add(split)
        self.splits = {group: " and ".join(sorted(of)) for group, of in splits.items()}
        for one in content["ancestors"]:
            groups = {(context, perturbation) for context, _, perturbation in _groups(one["groups"] or {})}
            self.before.append((str(one["name"]), groups))
        self.change_tests = read_change_tests(content)

    def describe(self, groups: list[tuple[str, str]]) -> dict[str, Any]:
        """
        What the record says beside predictions, in words: what the model was trained on, and of each (context, perturbation)
        whether it was. Empty where there is no record.
        """
        if not self.recorded:
            return {}
        read = [_source(source) for source in self.sources]
        more = [f"and {len(read) - _SHOWN} more"] if len(read) > _SHOWN else []
        said: dict[str, Any] = {"training_data": public("; ".join([*read[:_SHOWN], *more]) or "not recorded")}
        if self.before:
            said["started_from"] = public("; ".join(name for name, _ in self.before))
        nested: dict[str, dict[str, str]] = {}
        for context, perturbation in dict.fromkeys(groups):
            nested.setdefault(context, {})[perturbation] = self._of_group((context, perturbation))
        return {**said, "groups": nested}

    def indistinguishable(self, names: Iterable[str], parts: Callable[[str], list[str]]) -> list[str]:
        """
        Those of some perturbations whose change in training is not distinguishable from none, each once; of a combination that
        was not tested, its parts of which this is so.

        Args:
            names (iterable of `str`): canonical names.
            parts (`Callable`): gives the parts of a name.
        """
        found = [part for name in names for part in ([name] if name in self.change_tests else parts(name))]
        return [name for name in dict.fromkeys(found) if self.change_tests.get(name, 0) > FALSE_DISCOVERIES]

    def _of_group(self, group: tuple[str, str]) -> str:
        earlier = [f"trained on by {public(name)}" for name, groups in self.before if group in groups]
        return ", ".join([self.splits.get(group, NEW), *earlier])


def told_from_none(tests: dict[str, float]) -> tuple[list[str], list[str]]:
    """The tested perturbations whose change is distinguishable from none, the clearest first, and the others, sorted."""
    told = sorted((p, name) for name, p in tests.items() if p <= FALSE_DISCOVERIES)
    return [name for _, name in told], sorted(name for name, p in tests.items() if p > FALSE_DISCOVERIES)


def read_change_tests(content: dict) -> dict[str, float]:
    """
    The adjusted p-values in a record; empty where it has none.

    Raises:
        ValueError, TypeError: they are no numbers from 0 to 1.
    """
    found = {str(name): float(p) for name, p in content.get("change_tests", {}).items()}
    if not all(0 <= p <= 1 for p in found.values()):
        raise ValueError("expected adjusted p-values from 0 to 1")
    return found


def _groups(nested: dict) -> list[tuple[str, str, str]]:
    """Context, split and perturbation of each group of a record."""
    return [
        (str(context), str(split), str(perturbation))
        for of_dataset in nested.values()
        for context, of_context in of_dataset.items()
        for split, of_split in of_context.items()
        for perturbation in of_split
    ]


def _source(source: dict) -> str:
    mark = source.get("commit") or source.get("sha256")
    return f"{source['name']}, {source['what']}" + ("" if mark is None else f" ({mark})")


__all__ = ["Origin", "read_change_tests", "told_from_none"]
