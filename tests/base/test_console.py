"""What a command writes to its streams."""

import io
import logging
import subprocess
import sys

import pytest
from launches import run
from tqdm import tqdm

from pertstate.base.console import PrintableStream, log_to_console, printable_console, say, show


HOSTILE = "\x1b]52;c;eA==\x07\u202e\x9b2J\r"


def written(text: str, encoding: str = "utf-8") -> str:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    stream = PrintableStream(raw)
    assert stream.write(text) == len(text)
    stream.flush()
    return raw.buffer.getvalue().decode(encoding)


def test_a_stream_keeps_the_layout_and_nothing_that_steers():
    assert written("a\n\tα 💊\n") == "a\n\tα 💊\n"
    assert written("a\x1b[31mb\u202e\x07") == "a\\x1b[31mb\\u202e\\x07"
    assert written("a\rb\r\n") == "a\\rb\n"
    assert written("\ud800") == "\\ud800"
    assert written("α µ", "ascii") == "\\u03b1 \\xb5" and written("µ", "latin-1") == "µ"


def test_progress_bars_move_as_they_do():
    texts = []
    for wrap in (lambda raw: raw, PrintableStream):
        raw = io.StringIO()
        with tqdm(total=3, file=wrap(raw), desc="outer", mininterval=0) as outer:
            for _ in range(3):
                for _ in tqdm(
                    range(2),
                    file=wrap(raw),
                    desc="inner",
                    mininterval=0,
                    leave=False,
                    ncols=60,
                    bar_format="{desc} {n}",
                ):
                    pass
                outer.bar_format = "{desc} {n}"
                outer.update()
        texts.append(raw.getvalue().partition("inner")[2])
    assert texts[0] == texts[1] and "\x1b[A" in texts[0]


def test_all_that_a_process_says_is_printable(capsys):
    with printable_console():
        print(HOSTILE)
        sys.stderr.writelines([HOSTILE, "\n"])
        say(f"{HOSTILE}\nforged")
        show(f"{HOSTILE}\nline", sys.stderr)
    out, err = capsys.readouterr()
    assert not set("\x1b\u202e\x9b\x07") & set(out + err)
    assert out == "\\x1b]52;c;eA==\\x07\\u202e\\x9b2J\r\n" + "\\x1b]52;c;eA==\\x07\\u202e\\x9b2J\\r\\nforged\n"
    assert err.endswith("\\x9b2J\\r\nline\n")
    print("\x1b")
    assert capsys.readouterr().out == "\x1b\n"


def test_the_log_is_printable_wherever_it_comes_from(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    log_to_console(logging.INFO, "said: %(message)s")
    try:
        logging.getLogger("somebody").info("%s\nnext", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("somebody").exception("failed")
    finally:
        root.handlers.clear()
    err = capsys.readouterr().err
    assert err.startswith("said: \\x1b]52;c;eA==\\x07\\u202e\\x9b2J\\r\nnext\nsaid: failed\nTraceback")
    assert not set("\x1b\u202e\x9b\x07") & set(err)


def test_the_log_of_a_library_that_was_there_before(capsys):
    handler, logger = logging.StreamHandler(), logging.getLogger("somebody.else")
    logger.addHandler(handler)
    logger.propagate = False
    stream = handler.stream
    with printable_console():
        logger.warning(HOSTILE)
    assert handler.stream is stream
    logger.removeHandler(handler)
    assert capsys.readouterr().err == "\\x1b]52;c;eA==\\x07\\u202e\\x9b2J\n"


def test_warnings_and_worker_processes_are_printable():
    code = (
        "import warnings\nfrom pertstate.base.console import guard_this_process, printable_console\n"
        "with printable_console():\n    warnings.warn('of \\x1b[2J\\nforged')\n"
        "guard_this_process()\nwarnings.warn('again \\x1b[2J\\nforged')\nprint('\\x1b')\nraise SystemError('\\x1b')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserWarning: of \\x1b[2J\\nforged\n" in done.stderr and "again \\x1b[2J\\nforged\n" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout and done.stdout == "\\x1b\n"
    assert done.stderr.endswith("SystemError: \\x1b\n")


@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError"])
def test_errors_and_tracebacks_are_printable(tmp_path, kind):
    """An error of input is one line; a mistake of the program keeps its traceback."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pertstate import cli\nfrom pertstate.cli import configs\n"
        f"def fails(args):\n    raise {kind}('name \\x1b[2J\\u202e\\nforged line')\n"
        "configs.run = fails\nsys.exit(cli.main(['configs']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and not set("\x1b\u202e") & set(done.stderr)
    if kind == "ValueError":
        assert done.stderr == "pertstate configs: error: name \\x1b[2J\\u202e forged line\n"
    else:
        assert done.stderr.startswith("Traceback") and "RuntimeError: name \\x1b[2J\\u202e" in done.stderr


def test_memory_that_is_not_there_is_one_line():
    code = (
        "import sys\nimport numpy as np\nfrom pertstate import cli\nfrom pertstate.cli import configs\n"
        "configs.run = lambda args: np.empty(1 << 59, dtype=np.uint8)\nsys.exit(cli.main(['configs']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "pertstate configs: error: not enough memory (Unable to allocate 512. PiB for an array"
    )
    assert "pertstate prepare" in done.stderr


def test_arguments_are_printable_and_any_encoding_will_do():
    done = run(["-m", "pertstate.cli", "info", "/nowhere/\x1b[2J\u202e.h5ad"])
    assert done.returncode == 1 and "/nowhere/\\x1b[2J\\u202e.h5ad" in done.stderr and "\x1b" not in done.stderr
    done = run(["-m", "pertstate.cli", "configs", "--\x1b[2J"])
    assert done.returncode == 1 and "--\\x1b[2J" in done.stderr and "\x1b" not in done.stderr
