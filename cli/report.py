"""`pertstate report`."""

import argparse
from contextlib import ExitStack

from pertstate.base.console import say


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("scores", metavar="RUN_OR_SCORES", help="folder of a run, or of the scores of an evaluation")
    parser.add_argument("-o", "--output", metavar="REPORT.html", help="page to write, whole or not at all")
    parser.add_argument(
        "--plots",
        metavar="FOLDER",
        help="folder to write, whole or not at all: each picture of the page as PNG and PDF",
    )
    parser.add_argument("--title", help="title of the page; by default the name of the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace):
    from pertstate.base.outputs import check_apart, claimed_folder
    from pertstate.evaluation.pictures import FOLDER, save_pictures
    from pertstate.evaluation.plots import check_matplotlib
    from pertstate.evaluation.report import write_report
    from pertstate.evaluation.report_data import find_scores, read_log
    from pertstate.evaluation.scores import Scores

    if args.output is None and args.plots is None:
        raise ValueError("nothing to write: name a page (-o report.html), or a folder of pictures (--plots FOLDER)")
    if args.output is None and args.title is not None:
        raise ValueError("--title is that of a page, so it has no effect without -o")
    check_apart(output=args.output, plots=args.plots)
    with ExitStack() as claims:
        if args.plots is not None:
            check_matplotlib()
            claims.enter_context(claimed_folder(args.plots, FOLDER, args.overwrite))
        if args.output is not None:
            write_report(args.scores, args.output, args.overwrite, args.title)
            say(f"{args.output}: a page for the browser")
        if args.plots is not None:
            names = save_pictures(Scores.load(find_scores(args.scores)), read_log(args.scores), args.plots)
            say(f"{args.plots}: {', '.join(names)}, each as .png and .pdf")
