"""What a command prints, logs and warns of: all of it goes through here, so that no text steers the terminal."""

import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from .printable import printable


# What progress bars write beside their text: to go up, down, and to the start of the line.
_MOVES = re.compile(r"(?:[\r\n]|\x1b\[A)+")
_LAYOUT = "\n\t"


class PrintableStream:
    """
    A text stream that writes only [`printable`] text, line breaks, tabs, and the cursor moves of progress bars (a text may
    begin or end with carriage returns). Characters that its encoding lacks are written as escapes.

    It guards against what libraries and Python itself write. Names are made printable before they are put into a text: in
    the text, a line break in a name cannot be told from one between lines.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(self._shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]):
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _shown(self, text: str) -> str:
        if _MOVES.fullmatch(text):
            return text
        inner = text.strip("\r")
        start, end = text[: len(text) - len(text.lstrip("\r"))], text[len(text.rstrip("\r")) :]
        text = start + printable(inner.replace("\r\n", "\n"), _LAYOUT) + end
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def printable_console() -> Iterator[None]:
    """
    Within this block, what this process writes to its standard streams is printable, and so are warnings. Tracebacks stay
    printable after the block, because Python shows them when the block has ended.
    """
    sys.excepthook = _show_traceback
    formatted, out, err = warnings.formatwarning, PrintableStream(sys.stdout), PrintableStream(sys.stderr)
    warnings.formatwarning = _one_line(formatted)
    handlers = _handlers_of(sys.stderr)
    try:
        for handler in handlers:
            handler.setStream(err)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
            yield
    finally:
        for handler in handlers:
            handler.setStream(sys.stderr)
        warnings.formatwarning = formatted


def guard_this_process():
    """As [`printable_console`], for the whole life of a worker process."""
    out, err = PrintableStream(sys.stdout), PrintableStream(sys.stderr)
    sys.excepthook, warnings.formatwarning = _show_traceback, _one_line(warnings.formatwarning)
    for handler in _handlers_of(sys.stderr):
        handler.setStream(err)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]


def _handlers_of(stream: TextIO) -> list[logging.StreamHandler]:
    """The handlers that libraries imported so far have set up to write their logs to this stream."""
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    found = {handler: None for logger in loggers for handler in logger.handlers}
    return [of for of in found if type(of) is logging.StreamHandler and of.stream is stream]


def _one_line(formatted: Callable[..., str]) -> Callable[..., str]:
    return lambda message, *args, **kwargs: formatted(printable(message), *args, **kwargs)


def _show_traceback(kind, error, trace):
    text = "".join(traceback.format_exception(kind, error, trace))
    PrintableStream(sys.stderr).write(text)


def say(line: object, file: TextIO | None = None):
    """Print one line, whatever the names in it hold."""
    show(printable(line), file)


def show(text: str, file: TextIO | None = None):
    """Print a text that is laid out in lines already; see [`joined_lines`] and [`table_text`]."""
    print(printable(text, _LAYOUT), file=file)


def log_to_console(level: int, style: str = "%(message)s"):
    """Write the log of this process to its standard error, one printable line for each message of this package."""
    handler = _ConsoleHandler()
    handler.setFormatter(_Printable(style))
    logging.basicConfig(level=level, handlers=[handler])


class _ConsoleHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is when a message is logged."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]
        return sys.stderr


class _Printable(logging.Formatter):
    """
    Makes messages printable and keeps their line breaks: those of other packages may have several lines. Those of this
    package are single lines before they come here.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), _LAYOUT)


__all__ = ["PrintableStream", "guard_this_process", "log_to_console", "printable_console", "say", "show"]
