"""The record of a checkpoint in words, for a page: what it was trained on, and what was held out."""

import json
from typing import Any

from pertstate.base.constants import Split
from pertstate.base.origin import told_from_none


# Lists that are longer are folded.
_LONG_LIST = 12


def in_short(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its parts for programs, with counts in place of the groups of each context and split."""
    short: dict[str, Any] = {
        name.replace("_", " "): held
        for name, held in record.items()
        if name not in ("format", "means", "all_hashes", "change_tests", "intervals")
    }
    if record.get("change_tests"):
        told, other = told_from_none(record["change_tests"])
        short["change in training"] = {"distinguishable from none": told, "not distinguishable from none": other}
    if isinstance(record.get("groups"), dict):
        short["groups"] = {
            dataset: {
                context: "; ".join(
                    f"{split}: {sum(of.values()):,} cells"
                    + (f" of {len(of):,} perturbations" if split != Split.CONTROL else "")
                    for split, of in of_context.items()
                )
                for context, of_context in of_dataset.items()
            }
            for dataset, of_dataset in record["groups"].items()
        }
    if "sources" in record:
        short["sources"] = [", ".join(f"{name} {value}" for name, value in of.items()) for of in record["sources"]]
    if "ancestors" in record:
        short["ancestors"] = [
            f"{one['name']}: " + ("not recorded" if one["groups"] is None else f"trained on {_contexts(one['groups'])}")
            for one in record["ancestors"]
        ]
    return short


def _contexts(groups: dict[str, dict]) -> str:
    return ", ".join(context for of_dataset in groups.values() for context in of_dataset)


def entries_of(value: Any) -> list[dict[str, Any]]:
    """A record as a list of entries: a name with a text, with a list, or with entries of its own."""
    found = []
    for name, held in value.items():
        entry: dict[str, Any] = {"name": str(name), "text": None, "items": None, "entries": None}
        if isinstance(held, dict):
            entry["entries"] = entries_of(held)
        elif isinstance(held, list | tuple):
            entry["items"] = [_text(item) for item in held]
            entry["long"] = len(held) > _LONG_LIST
        else:
            entry["text"] = _text(held)
        found.append(entry)
    return found


def _text(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list | tuple):
        return " / ".join(map(_text, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
