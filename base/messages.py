"""Parts of messages: the nearest of some names, the first few of them, counted nouns, or that a value is missing."""

import shlex
from typing import TypeVar


_Value = TypeVar("_Value")


def closest(name: str, known) -> str:
    """A hint for an error about an unknown name: see [`nearest`], or a list of the `known` names if none is near."""
    known = [str(k) for k in known]
    shown = ", ".join(repr(k) for k in known[:10])
    listed = f"expected one of {shown}" + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    return nearest(name, known) or listed


def nearest(name: str, known) -> str:
    """
    `did you mean 'x'?` with the nearest of some known names; empty if none is near. If `name` is several known names joined by
    commas, it says how to write a list.
    """
    import difflib  # takes longer to load than the rest that `pertstate --help` needs of this module

    known = [str(k) for k in known]
    several = [part.strip() for part in str(name).split(",") if part.strip()]
    if len(several) > 1 and set(several) & set(known):
        words = " ".join(shlex.quote(part) for part in several)
        return f"write several names apart, with spaces between ({words}); in YAML, as a list [{', '.join(several)}]"
    # The names of genes of two species, and of columns, often differ in their case alone.
    folded: dict[str, list[str]] = {}
    for one in known:
        folded.setdefault(one.casefold(), []).append(one)
    near = difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.6)
    near = [one for of in near for one in folded[of]][:3]
    return "did you mean " + " or ".join(repr(n) for n in near) + "?" if near else ""


def instead(name: str, known) -> str:
    """What there is instead of an unknown name: the first few of the `known` names, and those that are near."""
    near = nearest(name, known)
    return f"found {some(known)}" + (f"; {near}" if near else "")


def some(names, count: int = 10) -> str:
    """The first few of some names, and how many there are."""
    names = [str(name) for name in names]
    return f"{names[:count]}" + (f" and {len(names) - count} more" if len(names) > count else "")


def counted(number: int, noun: str) -> str:
    """
    A number and a noun: `1 context`, `2 contexts`, `1,000 batches`.

    Args:
        noun (`str`): in the singular; its plural ends in s, or in es after ch.
    """
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"


def given(name: str, value: _Value | None) -> _Value:
    """
    The value, where it must not be None.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"expected {name}, found None")
    return value
