"""`pertstate crossval`."""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pertstate.base.console import say, show
from pertstate.base.messages import counted


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "run", metavar="CELLS|CONFIG.yaml", help="what `pertstate train` takes; its flags may follow, too"
    )
    parser.add_argument(
        "--over",
        required=True,
        metavar="contexts|perturbations|seeds|FIELD=a,b,c",
        help="hold out each context in turn, or perturbations in parts, or what the run itself holds out, or give a field of the run "
        "each value in turn",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each fold (default: 3)")
    parser.add_argument(
        "--families",
        metavar="A,B,..|FILE.yaml",
        help="values of model_type, or a file with what each sets; by default that of the run",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--parts", type=int, default=5, metavar="N", help="folds over perturbations (default: 5)")
    parser.add_argument(
        "--report", metavar="REPORT.html", help="also write a page for the browser, one for each family"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a cross-validation")
    parser.add_argument("-h", "--help", action="help", help="show this help; pertstate train --help lists the flags")


def run(args: argparse.Namespace):
    from pertstate.evaluation.metrics import METRICS
    from pertstate.evaluation.report import check_plotly, write_report
    from pertstate.evaluation.report_data import SCORES_FOLDER
    from pertstate.evaluation.scores import format_averages
    from pertstate.training.crossval import crossval
    from pertstate.training.family_settings import read_families

    if args.report:
        check_plotly()
    families = None if args.families is None else read_families(args.families)
    words = [args.run, *args.flags]
    with _claimed_pages(args, families):
        found = crossval(words, args.over, args.output, families, args.seeds, args.jobs, args.parts, args.overwrite)
        for family, scores in found.items():
            seeds = counted(scores.settings["runs of each fold"], "seed")
            show(
                f"{family}: mean of {seeds}\n\n{format_averages(scores.averages, list(METRICS))}\n\n{scores.verdict}\n"
            )
        say(f"{args.output}: results.md, results.csv, results.json, and the runs")
        if args.report:
            for family, page in zip(found, _pages(args.report, list(found)), strict=True):
                write_report(Path(args.output) / SCORES_FOLDER / family, page, overwrite=True, title=family)
                say(f"{page}: a page for the browser")


def _pages(report: str, families: list[str]) -> list[Path]:
    """The page of each family."""
    page = Path(report)
    return [page] if len(families) < 2 else [page.with_name(f"{page.stem}-{name}{page.suffix}") for name in families]


@contextmanager
def _claimed_pages(args: argparse.Namespace, families: dict | None) -> Iterator[None]:
    """
    In this block nobody else writes the pages of the reports. What is wrong with their names is said before there is any work to
    lose. The folder of the runs may be made later.
    """
    from pertstate.base.outputs import claimed_file

    runs = os.path.realpath(args.output)
    with ExitStack() as claims:
        for page in _pages(args.report, list(families or ())) if args.report else ():
            # --overwrite would begin the runs anew, too.
            if page.exists() and not args.overwrite:
                raise FileExistsError(f"--report {page} exists; move it away, or name another page")
            if page.parent.is_dir() or not Path(os.path.realpath(page)).is_relative_to(runs):
                claims.enter_context(claimed_file(page, overwrite=True))
        yield
