"""Names in messages: the nearest of them, or the first few."""

import difflib


def closest(name: str, known) -> str:
    """A hint `did you mean 'x'?` for the nearest of `known` names, or the list of them where none is near."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(repr(k) for k in known[:10])
    return f"expected one of {shown}" + (f" and {len(known) - 10} more" if len(known) > 10 else "")


def some(names, count: int = 10) -> str:
    """The first few of some names, and how many there are."""
    names = [str(name) for name in names]
    return f"{names[:count]}" + (f" and {len(names) - count} more" if len(names) > count else "")
