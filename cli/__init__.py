"""The `pertstate` command. Nothing heavy is imported before a command runs."""

import argparse
import sys

from pertstate.cli import convert, evaluate, info, merge, predict, prepare, push


COMMANDS = {
    "prepare": prepare,
    "info": info,
    "predict": predict,
    "evaluate": evaluate,
    "push": push,
    "convert": convert,
    "merge": merge,
}
# Fields of a run configuration may follow as flags.
TAKE_FLAGS = ("prepare",)


def main(argv: list[str] | None = None) -> int:
    """Run one command; an error of input is one clear sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="pertstate",
        description="Models of how cells respond to perturbations. Training: accelerate launch train.py --config CONFIG",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
    args, flags = parser.parse_known_args(argv)
    if args.command in TAKE_FLAGS:
        args.flags = flags
    elif flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        COMMANDS[args.command].run(args)
    except (ValueError, KeyError, OSError, ImportError) as error:
        # KeyError shows the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"pertstate {args.command}: error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
