"""`pertstate report`."""

import argparse

from pertstate.base.console import say


HELP = "Show the scores of a run: a page for the browser in one file, and pictures."


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("scores", metavar="RUN_OR_SCORES", help="folder of a run, or of the scores of an evaluation")
    parser.add_argument("-o", "--output", metavar="REPORT.html", help="page to write, whole or not at all")
    parser.add_argument("--title", help="title of the page; by default the name of the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace):
    from pertstate.evaluation.report import write_report

    if args.output is None:
        raise ValueError("nothing to write: name a page (-o report.html)")
    write_report(args.scores, args.output, args.overwrite, args.title)
    say(f"{args.output}: a page for the browser")
