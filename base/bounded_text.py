"""Text files of others: only files are opened, only of a size that such files have, and JSON in which nothing stands twice."""

import json
import os
import stat
from pathlib import Path
from typing import Any


# Bytes: names of some million genes or perturbations; the groups of cells of a large store; what a person writes by hand.
LARGEST_JSON, LARGEST_TABLES, LARGEST_SETTINGS = 1 << 26, 1 << 28, 1_000_000

# What Python raises where a part of a JSON file is of another kind than expected: absent, of another type, no number, or a number that
# is infinite or too large for an array.
DAMAGED = (AttributeError, ArithmeticError, LookupError, TypeError, ValueError)


def check_regular(path: Path):
    """
    Check that a path is a file or a folder: reading a pipe waits for ever, and a device has no end.

    Raises:
        ValueError: it is something else.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path}: expected a file, found {kind_of(mode)}; write what it gives to a file first")


def kind_of(mode: int) -> str:
    """In words, what is neither a file nor a folder."""
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((name for test, name in kinds.items() if test(mode)), "no regular file")


def read_text(path: str | os.PathLike, largest: int = LARGEST_JSON) -> str:
    """
    The text of a file.

    Args:
        largest (`int`): bytes. A file with more is not read.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is larger, no regular file, or no text in UTF-8.
    """
    content = _read(Path(path), largest)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); copy or write it again") from error


def load_json(path: str | os.PathLike, largest: int = LARGEST_JSON, advice: str = "copy it again") -> Any:
    """
    The content of a JSON file.

    Args:
        largest (`int`): bytes. A file with more is not read.
        advice (`str`): what to do where it is damaged.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is larger, no regular file, or not whole; see [`parse_json`].
    """
    content = _read(Path(path), largest)
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a whole JSON file ({error}); {advice}") from error


def _read(path: Path, largest: int) -> bytes:
    check_regular(path)
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {largest:,}; copy or write it again")
    return path.read_bytes()


def parse_json(text: str) -> Any:
    """
    The content of a JSON text.

    Raises:
        ValueError: it is not whole, says something twice, is nested deeper or has longer numbers than Python reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} stands in it twice")
    return found


__all__ = [
    "DAMAGED",
    "LARGEST_JSON",
    "LARGEST_SETTINGS",
    "LARGEST_TABLES",
    "check_regular",
    "kind_of",
    "load_json",
    "parse_json",
    "read_text",
]
