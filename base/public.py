"""What is written for others holds no place of this machine: of every path in a text, only the last part is kept."""

import os
import re
from pathlib import PurePath
from typing import Any


# What ends a path in a text: quotes, brackets of HTML and Markdown, line breaks; a mark of punctuation before a blank; and a
# blank before another path or a flag.
_END = "\\n\\r\\t\"'`<>|"
_INNER = rf"(?:(?![,;:]\s|\s[~/\\-])[^/{_END}])*(?<!\s)"
_INNER_WINDOWS = rf"(?:(?![,;:]\s|\s[~/\\-])[^/\\{_END}])*(?<!\s)"
_LAST, _LAST_WINDOWS = rf"[^\s/,;:)\]}}{_END}]*", rf"[^\s/\\,;:)\]}}{_END}]*"
# Addresses of the web and names on the Hub are for everybody; files and buckets are not.
_PUBLIC = "https?|hf"

# The folders of people lie in these; the name of such a folder is that of a person.
_OF_PEOPLE = ("home", "homes", "users", "documents and settings")
_HOMES = rf"(?:(?<=-[A-Za-z])|(?<![\w/\\.]))[\\/]+(?i:{'|'.join(_OF_PEOPLE)})[\\/]+[^\s\\/{_END}]"
# In quotes, a path goes as far as they do.
_QUOTED = "|".join(
    rf"(?<={q})(?:/+[^/\s{q}][^/\n{q}]*/|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|(?i:file):/)[^\n{q}]*?(?=\\*{q})"
    for q in "'\"`"
)

_PATH = re.compile(
    # An address of the web: it stays.
    rf"(?P<address>(?:{_PUBLIC})://[^\s{_END}]*)|{_QUOTED}|"
    # file:///home/ada/x, s3://bucket/x
    rf"(?<![\w+.-])(?!(?:{_PUBLIC})://)(?:(?i:file):/+|[A-Za-z][\w+.-]+://)(?:[^\s/]{_INNER}/+)*{_LAST}"
    # C:\Users\ada\x, C:/x
    rf"|(?<![A-Za-z0-9])[A-Za-z]:[\\/]+(?:[^\s/\\]{_INNER_WINDOWS}[\\/]+)*{_LAST_WINDOWS}"
    # \\server\share\x
    rf"|(?<![\w\\])\\\\+(?:[^\s/\\]{_INNER_WINDOWS}[\\/]+)+{_LAST_WINDOWS}"
    # /home/ada/x: two parts at least, as "+/-", "A / B" and "ng /ml" are no paths
    rf"|(?:(?<![\w.+~/\\:%$&)\]}}-])/+|(?<=:)/(?!/))(?:[^\s/]{_INNER}/+)+{_LAST}"
    # ~/x, ~ada/x, ../x
    rf"|(?<![\w./\\~])(?:~(?:[A-Za-z_][\w.-]*)?|\.\.)[\\/]+(?:[^\s/\\]{_INNER_WINDOWS}[\\/]+)*{_LAST_WINDOWS}"
    # A folder of a person behind a flag or a sign: -I/home/ada/x
    rf"|{_HOMES}(?:{_INNER_WINDOWS}[\\/]+(?=[^\s/\\]))*{_LAST_WINDOWS}"
)
_WHOLE = re.compile(
    rf"(?:(?!(?:{_PUBLIC})://)(?:(?i:file):/+|[A-Za-z][\w+.-]+://)|[A-Za-z]:[\\/]|\\\\|/+(?=[^\s/])|(?:~(?:[A-Za-z_][\w.-]*)?|\.\.)[\\/]).*|~[A-Za-z_][\w.-]*"
)
_A_HOME = "~"


def public_text(text: str) -> str:
    r"""
    A text without the places of any machine: absolute paths (`/home/ada/x.h5ad`, `~/x`, `C:\data\x`, `\\server\x`,
    `file:///x`, `s3://bucket/x`) and those that begin with `../`, wherever they stand in it, become their last part. A
    folder of a person becomes `~`. Names on the Hub, addresses of the web and other relative paths stay.
    """
    return _PATH.sub(lambda match: match[0] if match["address"] else _last_part(match[0]), text)


def public(value: Any) -> Any:
    """
    A value as it is written for others: [`public_text`] of every text in it, whatever dictionaries and lists it is in. A
    text that is one path becomes its last part even where folders have names like sentences.
    """
    if isinstance(value, dict):
        return {public(name): public(of) for name, of in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [public(of) for of in value]
    if isinstance(value, PurePath):
        return public(os.fspath(value))
    if not isinstance(value, str):
        return value
    return _last_part(value) if _WHOLE.fullmatch(value) and " / " not in value else public_text(value)


def last_part(path: str | os.PathLike) -> str:
    """The last part of what is known to be a path, whatever blanks and marks its folders have; `~` for a folder of a person."""
    return _last_part(os.path.abspath(path))


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]+", path) if part]
    own = os.path.expanduser("~")
    if not parts:
        return path
    if len(parts) == 1:
        return _A_HOME if parts[0].startswith("~") else parts[0]
    is_home = parts[-2].lower() in _OF_PEOPLE or parts[-1] == os.path.basename(own) or path.rstrip("/") == own
    return _A_HOME if is_home else parts[-1]


__all__ = ["last_part", "public", "public_text"]
