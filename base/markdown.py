"""Text from data as Markdown: it is shown as it stands, markup and HTML in it have no effect, and it holds no path."""

import re

from .printable import printable
from .public import public


def as_code(text: str) -> str:
    """Any text as one code span of Markdown, on one line."""
    text = printable(public(str(text)))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Markdown drops a blank at the start and one at the end if both are there.
    pad = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def as_text(value: object) -> str:
    """A value as one line of plain text in Markdown: markup in it has no effect."""
    text = printable(" ".join(public(str(value)).split()))
    # Underscores within a word are not markup.
    return re.sub(r"[^\w\s,;:.+/'()%=-]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"&#{ord(match[0])};", text)


def as_block(text: str, language: str) -> str:
    """Any text as a fenced block; fences within the text do not end it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
