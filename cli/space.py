"""`pertstate space`."""

import argparse

from pertstate.base.console import say


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("output", metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument("--model", required=True, metavar="USER/NAME", help="the model's repository on the Hub")
    parser.add_argument("--revision", help="its commit, tag or branch; by default the latest one when the Space starts")
    parser.add_argument(
        "--adata", metavar="FILE.h5ad", help="control cells to put into the Space; they become public with it"
    )
    parser.add_argument("--title", help="title of the Space; by default the name of the model")
    parser.add_argument("--overwrite", action="store_true", help="replace a Space that is there")


def run(args: argparse.Namespace):
    from pertstate.app.space import write_space

    write_space(args.output, args.model, args.revision, args.adata, args.title, args.overwrite)
    say(f"{args.output}: a Space; upload it with: hf upload --repo-type space USER/NAME {args.output} .")
