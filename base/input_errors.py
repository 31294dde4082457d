"""Errors that say that the input is wrong, as one line."""

# Any other error is a mistake of the program, and keeps its traceback.
ERRORS = (ValueError, KeyError, OSError, ImportError, FloatingPointError)


def line_of(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return (
            f"{error.filename}: {error.strerror}; this user may not read it, or may not write to it: ls -ld shows its rights; change "
            "them, or name another"
        )
    # KeyError shows the repr of its message.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(line.strip() for line in message.splitlines())


__all__ = ["ERRORS", "line_of"]
