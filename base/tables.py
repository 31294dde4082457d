"""Tables as text and as CSV files, whatever characters their names hold."""

import os
import re
from typing import TextIO

import numpy as np
import pandas as pd

from .files import whole_file
from .printable import code_of, escaped, printable


# What spreadsheets take for the start of a formula, also behind blanks, and as Chinese and Japanese keyboards write it.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
# Spreadsheets take what stands behind this mark as text, and do not show the mark.
_AS_TEXT = "'"
_HEX_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


def table_text(frame: pd.DataFrame, index: bool = False) -> str:
    """
    A table as aligned text. Every name in it is [`printable`], so a name is one line, and columns stay in their places.

    Args:
        index (`bool`): also show the names of the rows.
    """
    return _with_names(frame, printable).to_string(index=index)


def write_csv(frame: pd.DataFrame, path: str | os.PathLike):
    r"""
    Write a table, without the names of its rows, as a CSV file; whole or not at all.

    A spreadsheet takes every name as text: one that begins like a formula gets a `'` before it. Characters that cannot be
    shown are escapes, `\x1b`. [`name_of_cell`] undoes both. Numbers are numbers; an undefined one is an empty cell.

    Raises:
        FloatingPointError: see [`check_table`].
    """
    check_table(frame)
    with whole_file(path) as partial:
        _with_names(frame, cell_of_name).to_csv(partial, index=False)


def append_csv(frame: pd.DataFrame, file: TextIO):
    """
    Write more rows of a table, as [`write_csv`] does, to an open file; the first ones with the names of the columns.

    Raises:
        FloatingPointError: see [`check_table`].
    """
    check_table(frame)
    _with_names(frame, cell_of_name).to_csv(file, index=False, header=file.tell() == 0)


def check_table(frame: pd.DataFrame):
    """FloatingPointError that names column and row of the first number that is infinite. Undefined ones may be NaN."""
    for name in frame.columns[[kind == "f" for kind in frame.dtypes.map(lambda dtype: dtype.kind)]]:
        rows = np.flatnonzero(np.isinf(frame[name]))
        if len(rows):
            names = [value for value in frame.iloc[rows[0]] if isinstance(value, str)]
            raise FloatingPointError(
                f"{name} of {names} is {frame[name].iloc[rows[0]]}, expected a finite number; nothing is written"
            )


def read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """A table that [`write_csv`] wrote, with its names as they were before; or any other CSV file with a header."""
    return _with_names(pd.read_csv(path), name_of_cell)


def cell_of_name(name: str) -> str:
    """A name as it stands in a cell of a CSV file; see [`write_csv`]."""
    name = _HEX_ESCAPE.sub(lambda match: "\\x5c" + match[0][1:], name)
    return (_AS_TEXT if _begins_a_formula(name) else "") + escaped(name, code_of)


def name_of_cell(cell: str) -> str:
    """The name that [`cell_of_name`] made a cell of. A cell that needed no change is its own name."""
    name = _HEX_ESCAPE.sub(_character, cell)
    return name[1:] if name.startswith(_AS_TEXT) and _begins_a_formula(name[1:]) else name


def _begins_a_formula(name: str) -> bool:
    # A name that already begins with such marks before a formula gets one more, so that reading it back leaves its own.
    bare = name.lstrip(_AS_TEXT)
    return _FORMULA.match(bare) is not None and (bare != name or _NUMBER.fullmatch(name) is None)


def _character(match: re.Match) -> str:
    number = int(match[1] or match[2] or match[3], 16)
    return chr(number) if number <= 0x10FFFF else match[0]


def _with_names(frame: pd.DataFrame, change) -> pd.DataFrame:
    """The table with every text in it changed, names of rows and columns too."""

    def changed(value):
        return change(value) if isinstance(value, str) else value

    columns = [column if column.dtype.kind in "biuf" else column.map(changed) for _, column in frame.items()]
    shown = pd.concat(columns, axis=1) if columns else frame.copy()
    shown.index, shown.columns = frame.index.map(changed), [changed(name) for name in frame.columns]
    return shown
