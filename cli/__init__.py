"""The `pertstate` command. Nothing heavy is imported before a command runs."""

import argparse
import os
import sys
from collections.abc import Callable

from pertstate._version import __version__
from pertstate.base.console import printable_console, say
from pertstate.base.input_errors import ERRORS, line_of
from pertstate.base.stopped import StoppedError, stopped_by_signals
from pertstate.cli import (
    app,
    configs,
    convert,
    crossval,
    evaluate,
    info,
    merge,
    predict,
    prepare,
    push,
    report,
    space,
    train,
    tune,
)


COMMANDS = {
    "train": train,
    "crossval": crossval,
    "tune": tune,
    "prepare": prepare,
    "info": info,
    "predict": predict,
    "evaluate": evaluate,
    "report": report,
    "app": app,
    "space": space,
    "push": push,
    "convert": convert,
    "merge": merge,
    "configs": configs,
}
# Fields of a run configuration may follow as flags.
TAKE_FLAGS = ("prepare", "crossval", "tune")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str):
        say(f"{self.prog}: error: {message}; {self.prog} --help lists what it takes", sys.stderr)
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> int:
    """
    Run one command. An error of input is one line on stderr.

    Args:
        argv (`list[str]`, *optional*): the words after `pertstate`; by default those of the process.

    Returns:
        The exit code: 0, 1 after an error, or 128 and the number of the signal that stopped it.
    """
    with printable_console():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        # Its words are fields of the run, which argparse does not know.
        return _reported("train", lambda: train.run(argv[1:]))
    parser = _Parser(prog="pertstate", description="Models of how cells respond to perturbations.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pertstate {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        own_help = name in TAKE_FLAGS  # their help also shows the fields
        command = subparsers.add_parser(
            name, help=module.HELP, description=module.HELP, allow_abbrev=False, add_help=not own_help
        )
        module.add_arguments(command)
    args, flags = parser.parse_known_args(argv)
    if args.command in TAKE_FLAGS:
        args.flags = flags
    elif flags:
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(flags)}")
    return _reported(args.command, lambda: COMMANDS[args.command].run(args))


def _reported(command: str, run: Callable[[], object]) -> int:
    left = "nothing is left of what was being written"
    if command == "train":
        left += "; --resume_from_checkpoint last goes on from the last checkpoint"
    try:
        with stopped_by_signals(left):
            run()
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has closed it, as `head` does. Python would raise again when it writes the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StoppedError as stop:
        say(f"pertstate {command}: {stop}", sys.stderr)
        return stop.exit_code
    except ERRORS as error:
        say(f"pertstate {command}: error: {line_of(error)}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
