"""`pertstate configs`."""

import argparse
from pathlib import Path

from pertstate.base.console import say, show


_FOLDER = Path(__file__).parents[1] / "configs"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one; without a name, all are listed")
    parser.add_argument("--output", metavar="FILE.yaml", help="write it to a file")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace):
    from pertstate.base.files import whole_file
    from pertstate.base.messages import closest
    from pertstate.base.outputs import claimed_file

    found = [*sorted(_FOLDER.glob("*.yaml")), *sorted(_FOLDER.glob("*/*.yaml"))]
    paths = {path.relative_to(_FOLDER).with_suffix("").as_posix(): path for path in found}
    if args.overwrite and args.output is None:
        raise ValueError("--overwrite has no effect without --output")
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
    with claimed_file(args.output, args.overwrite) as place, whole_file(place) as partial:
        partial.write_text(text, encoding="utf-8")
    if "/" in args.name:
        say(
            f"{args.output}: train with accelerate launch --config_file {args.output} -m pertstate.train CELLS|CONFIG.yaml"
        )
    else:
        say(f"{args.output}: train with pertstate train {args.output}")
