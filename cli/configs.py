"""`pertstate configs`."""

import argparse
from pathlib import Path

from pertstate.base.console import say, show


HELP = "List the run configurations that come with the package, print one, or write it to a file."
_FOLDER = Path(__file__).parents[1] / "configs"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one; without a name, all are listed")
    parser.add_argument("--output", metavar="FILE.yaml", help="write it to a file, which must not exist yet")


def run(args: argparse.Namespace):
    from pertstate.base.messages import closest

    paths = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
    if args.name is None:
        if args.output is not None:
            raise ValueError("--output writes one configuration: name it")
        width = max(map(len, paths))
        for name, path in paths.items():
            # The first line of each says what it is.
            title = path.read_text(encoding="utf-8").splitlines()[0]
            say(f"{name:{width}}  {title.removeprefix('# ').removesuffix('.')}")
        return
    if args.name not in paths:
        raise ValueError(f"there is no configuration {args.name!r}; {closest(args.name, paths)}")
    text = paths[args.name].read_text(encoding="utf-8")
    if args.output is None:
        show(text.removesuffix("\n"))
        return
    try:
        with open(args.output, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise FileExistsError(f"{args.output} exists; name a file that does not") from error
    say(f"{args.output}: train with pertstate train {args.output}")
