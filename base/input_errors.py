"""Errors that say that the input is wrong, as one line."""

import errno
import re


# Any other error is a mistake of the program, and keeps its traceback.
ERRORS = (ValueError, KeyError, OSError, ImportError, FloatingPointError)

# A word with more characters is shown without its middle, a path for instance; so is a line.
_LONGEST_WORD, _LONGEST_LINE = 400, 4000
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")

# What to do about errors of the system that do not say it themselves.
_ADVICE = {
    errno.EACCES: "this user may not read it, or may not write to it: ls -ld shows its rights; change them, or name another",
    errno.ELOOP: "links lead in a circle; name what they should lead to",
    errno.ENAMETOOLONG: "the system takes no such name; name another",
    errno.ENOENT: "look at how it is written, or name another",
    errno.EISDIR: "expected a file, found a folder; name a file",
    errno.ENOTDIR: "expected a folder, found a file on the way; name another",
}
_ADVICE[errno.EPERM] = _ADVICE[errno.EACCES]


def line_of(error: BaseException) -> str:
    """What an error says, see [`one_line`]."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        advice = _ADVICE.get(error.errno or 0)
        message = f"{error.filename}: {error.strerror}" + (f"; {advice}" if advice else "")
    else:
        # KeyError shows the repr of its message.
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return one_line(message)


def one_line(message: str) -> str:
    """A message on one line. Of a word or a line that is very long, the middle is left out."""
    line = " ".join(line.strip() for line in message.splitlines())
    return _without_middle(_LONG_WORD.sub(lambda word: _without_middle(word[0], _LONGEST_WORD), line), _LONGEST_LINE)


def _without_middle(text: str, most: int) -> str:
    """A text of more than `most` characters as its beginning, how many characters are left out, and its end."""
    if len(text) <= most:
        return text
    start, end = most // 2, most // 4
    return f"{text[:start]} [{len(text) - start - end:,} characters] {text[-end:]}"


__all__ = ["ERRORS", "line_of", "one_line"]
