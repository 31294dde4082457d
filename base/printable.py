"""Text that others wrote, made safe to show: what would steer a terminal, or stand there unseen, is written as an escape."""

import logging
import unicodedata
from collections.abc import Callable, Iterable


_JOINER, _NON_JOINER, _WIDE_SPACE = "\u200d", "\u200c", "\u3000"
# Letters and marks that have no shape of their own. The other characters without a shape are of a category that is escaped.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# So many marks above and below one letter, as in Unicode's Stream-Safe Text Format; more would cover the lines around it.
_MOST_MARKS = 30
_VIRAMA = 9  # the combining class of the signs that join two letters of the scripts of India


def printable(text: object, keep: str = "") -> str:
    r"""
    A text as it can be printed, logged and tabulated: letters of all scripts, marks, numbers, signs, emoji and blanks stay. All
    else is written as an escape, `\x1b` or `\u202e`: control characters, line breaks and tabs, characters that change the
    direction of text or cannot be seen, lone surrogates, and code points that are unassigned or for private use.

    `printable` changes nothing in a text that it has returned.

    Args:
        text (`object`): the text; of another object, its `str`.
        keep (`str`): control characters that stay, the line breaks of a layout for instance.
    """
    return escaped(str(text), lambda c: _NAMED.get(c) or code_of(c), keep)


def code_of(character: str) -> str:
    r"""A character as a hexadecimal escape of Python: `\x1b`, `\u202e` or `\U000e0001`."""
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def escaped(text: str, escape: Callable[[str], str], keep: str = "") -> str:
    """The text, with `escape(c)` for each character c that is not [`printable`]; the characters of `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for place, character in enumerate(text):
        marks = marks + 1 if unicodedata.category(character).startswith("M") else 0
        stays = character in keep or (marks <= _MOST_MARKS and _is_shown(text, place))
        shown.append(character if stays else escape(character))
    return "".join(shown)


def joined_lines(lines: Iterable[object]) -> str:
    """Lines, each made [`printable`], as one text: a line break within a name starts no line."""
    return "\n".join(map(printable, lines))


def _is_shown(text: str, place: int) -> bool:
    character = text[place]
    if character.isprintable():
        if _is_selector(character):
            # It chooses a shape of the character before it. Several in a row hide a message.
            return place > 0 and not _is_selector(text[place - 1]) and _is_shown(text, place - 1)
        return character not in _INVISIBLE
    if character == _WIDE_SPACE:
        return True
    if character in (_JOINER, _NON_JOINER):
        return 0 < place < len(text) - 1 and _joins(text, place)
    return unicodedata.category(character) == "Cn" and _may_be_new(ord(character))


def _is_selector(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def _may_be_new(number: int) -> bool:
    """Whether an unassigned code point lies where later versions of Unicode may have emoji or Chinese characters."""
    return (0x1F000 <= number <= 0x1FAFF or 0x20000 <= number <= 0x3FFFF) and number & 0xFFFE != 0xFFFE


def _joins(text: str, place: int) -> bool:
    """Whether a joiner stands where writing needs one: in an emoji of several, after a virama, or between Arabic letters."""
    before, after = text[place - 1], text[place + 1]
    if unicodedata.combining(before) == _VIRAMA:
        return True
    if text[place] == _NON_JOINER:
        return unicodedata.bidirectional(before) == unicodedata.bidirectional(after) == "AL"
    if _is_selector(before) and place > 1:
        before = text[place - 2]
    return _is_picture(before) and _is_picture(after)


def _is_picture(character: str) -> bool:
    return unicodedata.category(character) in ("So", "Sk") or _may_be_new(ord(character))


# Logs


class PrintableLogger(logging.LoggerAdapter):
    """A logger whose messages are one [`printable`] line each, whoever handles them."""

    def process(self, msg, kwargs):
        return printable(msg), kwargs


def get_logger(name: str) -> PrintableLogger:
    """The logger of a module. Its messages are whole texts, not patterns with arguments."""
    return PrintableLogger(logging.getLogger(name), {})


__all__ = ["PrintableLogger", "code_of", "escaped", "get_logger", "joined_lines", "printable"]
