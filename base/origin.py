"""Where a processor was loaded from, and what the record of that checkpoint says of groups of cells."""

import os
from dataclasses import dataclass, field
from typing import Any

from .checkpoint_files import find_file, read_json
from .public import last_part, public


# What a run leaves in its checkpoint; `pertstate.data.record` writes it.
RECORD_FILE, RECORD_FORMAT = "record.json", 1
NEW = "not in its data"
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
    """

    name: str
    recorded: bool = False
    sources: list[dict[str, Any]] = field(default_factory=list)
    splits: dict[tuple[str, str], str] = field(default_factory=dict)
    before: list[tuple[str, set[tuple[str, str]]]] = field(default_factory=list)

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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
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

    def _of_group(self, group: tuple[str, str]) -> str:
        earlier = [f"trained on by {public(name)}" for name, groups in self.before if group in groups]
        return ", ".join([self.splits.get(group, NEW), *earlier])


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


__all__ = ["Origin"]
