"""Tables that a script writes into a page of the docs, between two marks."""

from pathlib import Path


def write_between_marks(page: Path, name: str, found: str):
    """
    Replace what lies between `<!-- NAME: start -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: the page has no such lines.
    """
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->\n"
    head, marks, rest = page.read_text(encoding="utf-8").partition(start)
    _, more, tail = rest.partition(end)
    if not (marks and more):
        raise ValueError(f"expected a page with the lines {start!r} and {end!r}, found none to write between")
    page.write_text(f"{head}{start}{found}\n{end}{tail}", encoding="utf-8")
