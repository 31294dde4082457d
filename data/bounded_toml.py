"""Reading TOML files of sections, names and words in a time that is proportional to their size."""

import os
import re
import tomllib
from typing import Any

from pertstate.base.bounded_text import LARGEST_SETTINGS, read_text


# A dotted key with so many parts is refused: the time that Python takes grows with the square of their number (a minute for 40 kB).
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){50}""")


def load_toml(path: str | os.PathLike) -> dict[str, Any]:
    """
    The content of a TOML file.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is larger than what a person writes, no TOML, or nested deeper than anything that is known.
    """
    text = read_text(path, LARGEST_SETTINGS)
    if (long := _LONG_KEY.search(text)) is not None:
        line = text.count("\n", 0, long.start()) + 1
        raise ValueError(f"{path} is not valid TOML: line {line} has a name of more than 50 parts")
    try:
        return tomllib.loads(text)
    # Numbers of more digits than Python reads are no TOMLDecodeError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
