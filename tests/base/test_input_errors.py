import errno
import os

import pytest

from pertstate.base.input_errors import line_of
from pertstate.cli import main


@pytest.mark.parametrize(
    "number", [errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EACCES]
)
def test_an_error_of_the_system_names_the_file_and_says_what_to_do(number):
    line = line_of(OSError(number, os.strerror(number), "cells.h5ad"))

    assert line.startswith(f"cells.h5ad: {os.strerror(number)}; ")
    assert "name" in line and "Errno" not in line


def test_a_very_long_name_is_shown_without_its_middle():
    path = "x/" * 4000 + "y.h5ad"
    line = line_of(ValueError(f"{path}: expected a file, found none; name another"))

    assert len(line) < 500
    assert line.startswith("x/x/x/") and line.endswith("y.h5ad: expected a file, found none; name another")
    assert "7,7" in line and "characters]" in line


def test_a_very_long_line_keeps_its_beginning_and_its_end():
    line = line_of(ValueError("begin " + "word " * 100_000 + "end"))

    assert len(line) < 4000 and line.startswith("begin word") and line.endswith("word end")


@pytest.mark.parametrize("name", ["n" * 300, "x/" * 4000 + "y", "y" * 8000 + ".h5ad"])
@pytest.mark.parametrize("words", [["info"], ["report", "-o=r.html"], [], ["info", "a", "b"]])
def test_no_command_repeats_a_very_long_name(name, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*words, name])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err

    assert code == 1 and len(error.splitlines()) == 1
    assert len(error) < 1500 and "Errno" not in error
