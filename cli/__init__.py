"""The `pertstate` command. Nothing heavy is imported before a command runs."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from pertstate._version import __version__
from pertstate.base.console import printable_console, say
from pertstate.base.input_errors import ERRORS, line_of, one_line
from pertstate.base.stopped import StoppedError, stopped_by_signals


# What each command does. Its module, of the same name, is imported when it is the one that runs.
COMMANDS = {
    "train": "Train a model: pertstate train CONFIG.yaml [--any_field value ...]; --help lists the fields.",
    "crossval": "Train and score every fold of a run, for several seeds and families, and pool the scores: one table, one verdict.",
    "tune": "Choose settings of a run on its training groups: every combination, or what optuna suggests, is trained and scored on inner folds.",
    "prepare": "Turn .h5ad or .zarr files into a cell store: Arrow files that training reads by memory map, whatever their size.",
    "info": "Say what a file, a cell store, a checkpoint or an adapter holds, and what is missing before it can be used.",
    "predict": "Predict perturbed cells from the control cells of an .h5ad.",
    "evaluate": "Score predicted cells, or a model, against real cells, beside the baselines and the ceiling; with a verdict.",
    "report": "Show the scores of a run: a page for the browser in one file, and pictures.",
    "app": "Serve a page for the browser on which a model predicts: cells in, perturbations chosen, changes and cells out.",
    "space": "Write the folder of a Hub Space that shows the page of a model.",
    "push": "Push a checkpoint folder to the Hub: code, config, weights, processor, vocabulary and card, in one commit.",
    "convert": "Turn a training folder of the published research code into a checkpoint folder, without unpickling anything.",
    "merge": "Merge a low-rank adapter into its base model, and write the result as a plain checkpoint.",
    "configs": "List the configurations of runs and of many devices that come with the package, print one, or write it to a file.",
}
# Fields of a run configuration may follow as flags.
TAKE_FLAGS = ("prepare", "crossval", "tune")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str):
        say(f"{self.prog}: error: {one_line(message)}; {self.prog} --help lists what it takes", sys.stderr)
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
        try:
            try:
                return _run(sys.argv[1:] if argv is None else argv)
            finally:
                sys.stdout.flush()
        except OSError as error:
            # The output cannot be written. Python would try again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):  # its reader has closed it, as `head` does
                say(f"pertstate: error: {line_of(error)}", sys.stderr)
            return 1


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        # Its words are fields of the run, which argparse does not know.
        return _reported("train", lambda: _module("train").run(argv[1:]))
    parser = _Parser(prog="pertstate", description="Models of how cells respond to perturbations.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pertstate {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in argv if word in COMMANDS), None)
    for name, what in COMMANDS.items():
        own_help = name in TAKE_FLAGS  # their help also shows the fields
        command = subparsers.add_parser(name, help=what, description=what, allow_abbrev=False, add_help=not own_help)
        if name == named:
            _module(name).add_arguments(command)
    args, flags = parser.parse_known_args(argv)
    if args.command in TAKE_FLAGS:
        args.flags = flags
    elif flags:
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(flags)}")
    return _reported(args.command, lambda: _module(args.command).run(args))


def _module(command: str) -> ModuleType:
    return import_module(f"pertstate.cli.{command}")


def _reported(command: str, run: Callable[[], object]) -> int:
    left = "nothing is left of what was being written"
    if command == "train":
        left += "; --resume_from_checkpoint last goes on from the last checkpoint"
    if command in ("crossval", "tune"):
        left = "the runs that ended are kept, the others as their last checkpoints; the same command, without --overwrite, goes on"
    try:
        with stopped_by_signals(left):
            run()
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except StoppedError as stop:
        say(f"pertstate {command}: {stop}", sys.stderr)
        return stop.exit_code
    except MemoryError as error:
        more = "a cell store, as pertstate prepare makes one, is read block by block"
        say(
            f"pertstate {command}: error: not enough memory ({line_of(error) or 'no size is known'}); {more}",
            sys.stderr,
        )
        return 1
    except ERRORS as error:
        say(f"pertstate {command}: error: {line_of(error)}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
