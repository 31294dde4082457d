"""Text that is shown: letters of all scripts stay, what steers a terminal or hides does not."""

import logging
import random
import sys
import unicodedata

import pytest

from pertstate.base.printable import get_logger, joined_lines, printable


STAYS = [
    "",
    "TNF-α + IFNγ, 10 µM",
    "Δ9-THC ≥ 5 Å",
    "遺伝子　阻害剤",
    "한글 ไทย עברית العربية",
    "e\u0301 n\u0303 Z\u0324\u0301",
    "💊🧬",
    "👩\u200d🔬 👍🏽 ❤\ufe0f\u200d🔥",
    "\U0001fae8",  # an emoji that older versions of Unicode lack
    "葛\U000e0100",
    "क्\u200dष نمی\u200cخواهم",
    "C/C=C\\C [13C@@H](N) 'quoted' \"twice\" `ticks` <b> $x$",
    "'=1+1",
]
SHOWN = {
    "\x1b]52;c;cm0gLXJm\x07": "\\x1b]52;c;cm0gLXJm\\x07",
    "\x1b[31mred": "\\x1b[31mred",
    "\x9b31m": "\\x9b31m",
    "a\nb\r\nc\td": "a\\nb\\r\\nc\\td",
    "\x0b\x0c\x1c\x85": "\\x0b\\x0c\\x1c\\x85",
    "\u2028\u2029": "\\u2028\\u2029",
    "a\x00b\x7f": "a\\x00b\\x7f",
    "\u202egnp.exe\u202c": "\\u202egnp.exe\\u202c",
    "\u2066\u2067\u2068\u2069\u200e\u200f\u061c": "\\u2066\\u2067\\u2068\\u2069\\u200e\\u200f\\u061c",
    "TP\u200b53 \ufeff\u00ad\u2060": "TP\\u200b53 \\ufeff\\xad\\u2060",
    "a\u200db": "a\\u200db",
    "a\u200cb\u200d": "a\\u200cb\\u200d",
    "\U000e0041\U000e0001": "\\U000e0041\\U000e0001",
    "\ud83d \udcff": "\\ud83d \\udcff",
    "\ue000\U0010ffff\ufffe": "\\ue000\\U0010ffff\\ufffe",
    "\u3164\u115f\u034f": "\\u3164\\u115f\\u034f",
    "\xa0\u2003": "\\xa0\\u2003",
    "😀\ufe0f\ufe0e\ufe01": "😀\ufe0f\\ufe0e\\ufe01",
    "\ufe0f": "\\ufe0f",
}


@pytest.mark.parametrize("text", STAYS)
def test_writing_stays(text):
    assert printable(text) == text


@pytest.mark.parametrize("text, shown", SHOWN.items())
def test_what_steers_or_hides_is_an_escape(text, shown):
    assert printable(text) == shown


def test_every_character_is_shown_or_an_escape():
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        shown = printable(f"a{character}b")
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            assert shown.isascii() and shown.isprintable(), hex(number)
            assert shown.startswith("a\\") and shown.encode().decode("unicode_escape") == f"a{character}b"
        elif unicodedata.category(character)[0] in "NPS" or unicodedata.category(character) == "Lu":
            assert shown == f"a{character}b"


def test_printable_text_does_not_change_again():
    drawn = random.Random(0)
    kinds = ["a", "é", "\u200d", "👩", "\ufe0f", "\x1b", "\n", "\\", "\u202e", "\u0301", "\ud800", "क", "्"]
    for _ in range(2000):
        text = "".join(drawn.choices(kinds, k=8))
        shown = printable(text)
        assert printable(shown) == shown
        assert not {"\x1b", "\n", "\u202e", "\ud800"} & set(shown)


def test_marks_do_not_pile_up():
    assert printable("e" + "\u0301" * 30) == "e" + "\u0301" * 30
    assert printable("e" + "\u0301" * 32) == "e" + "\u0301" * 30 + "\\u0301" * 2
    assert printable("e\u0301" * 50) == "e\u0301" * 50


def test_a_layout_keeps_its_lines_and_a_name_starts_none():
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert joined_lines(["one\ntwo", 3, ""]) == "one\\ntwo\n3\n"


def test_the_log_of_the_package_is_printable_for_every_handler(caplog):
    with caplog.at_level(logging.INFO):
        get_logger("pertstate.anything").info("a\x1b[2J\nforged: line %s")
    assert caplog.messages == ["a\\x1b[2J\\nforged: line %s"]
