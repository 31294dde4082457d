"""Tables: names stay in their cells, spreadsheets take them as text, and come back as they were."""

import csv
import random

import numpy as np
import pandas as pd
import pytest

from pertstate.base.tables import cell_of_name, check_table, name_of_cell, read_csv, table_text, write_csv


FORMULAS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+A1",
    "-A1",
    "@SUM(A1)",
    "-1+cmd",
    "- item",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "\xa0=1",
    "＝1",
    "'=1",
    "''=1",
    "'-5",
]
PLAIN = ["A", "-5", "-0.5", "+1e-3", "1", "'5", "'quoted'", "TNF-α", "A+B", "C/C=C\\C", "C\\n1", "a,b", 'say "so"', ""]
HOSTILE = ["\x1b[2J", "\u202egnp", "a\nb", "\\x1b", "\\x5cx1b", "\\\x1b", "\\U00110000", "\ud800", "\u200b=1", "\x00"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_text(name):
    cell = cell_of_name(name)
    assert cell.startswith("'") and cell.isprintable()
    assert name_of_cell(cell) == name


@pytest.mark.parametrize("name", PLAIN)
def test_a_name_that_is_not_a_formula_stays_as_it_is(name):
    assert cell_of_name(name) == name == name_of_cell(name)


def test_every_name_comes_back():
    drawn = random.Random(1)
    alphabet = [
        "=",
        "-",
        "'",
        "\\",
        "x",
        "1",
        "b",
        "5",
        "c",
        "\x1b",
        "\t",
        "\n",
        "u",
        "202e",
        "\u202e",
        " ",
        "α",
        ",",
        '"',
    ]
    names = [*FORMULAS, *PLAIN, *HOSTILE] + ["".join(drawn.choices(alphabet, k=7)) for _ in range(20_000)]
    for name in names:
        cell = cell_of_name(name)
        assert name_of_cell(cell) == name
        assert cell.lstrip()[:1] not in ("=", "@", "＝") and "\x1b" not in cell and "\n" not in cell


def test_a_file_holds_names_as_text_and_numbers_as_numbers(tmp_path):
    names = [name for name in (*FORMULAS, *HOSTILE, "A,B") if name != "\ud800"]
    table = pd.DataFrame({"context": names, "=score": -0.5, "cells": range(len(names))})
    table.loc[3, "=score"] = np.nan
    write_csv(table, tmp_path / "table.csv")
    text = (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert set("\x1b\u202e\x00\t") & set(text) == set() and text.count("\n") == len(names) + 1
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["context", "'=score", "cells"]
    assert [row[1] for row in rows] == ["-0.5"] * 3 + [""] + ["-0.5"] * (len(names) - 4)
    assert [row[0] for row in rows] == [cell_of_name(name) for name in names]
    pd.testing.assert_frame_equal(read_csv(tmp_path / "table.csv"), table)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_table_is_aligned_and_its_names_are_one_line_each():
    table = pd.DataFrame({"name": ["a\nb", "\x1b[31m"], "a\tb": [1, 2]}, index=["\u202ex", "y"])
    assert table_text(table) == "    name  a\\tb\n    a\\nb     1\n\\x1b[31m     2"
    assert table_text(table, index=True).splitlines()[1].startswith("\\u202ex")
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert table_text(twice) == " a  a\n 1  2"


def test_no_infinite_number_is_written(tmp_path):
    table = pd.DataFrame({"context": ["NK", "B"], "mae": [0.5, np.inf]})
    for write in (lambda: check_table(table), lambda: write_csv(table, tmp_path / "t.csv")):
        with pytest.raises(FloatingPointError, match=r"mae of \['B'\] is inf, expected a finite number"):
            write()
    assert not any(tmp_path.iterdir())
