"""`pertstate tune`."""

import argparse
import shlex

from pertstate.base.console import say, show


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "run", metavar="CELLS|CONFIG.yaml", help="what `pertstate train` takes; its flags may follow, too"
    )
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="FIELD=a,b,c",
        help="values to try; may be given several times; with --trials also FIELD=LOW..HIGH or FIELD=LOW..HIGH:log",
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="try N settings that optuna suggests, and not every combination"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder of the runs and results")
    parser.add_argument(
        "--metric", choices=("pearson", "mae", "energy"), default="energy", help="what is best (default: energy)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each fold (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--parts", type=int, default=5, metavar="N", help="folds over perturbations (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a search")
    parser.add_argument("-h", "--help", action="help", help="show this help; pertstate train --help lists the flags")


def run(args: argparse.Namespace):
    from pertstate.base.tables import table_text
    from pertstate.training.tuning import tune

    words = [args.run, *args.flags]
    found = tune(
        words, args.grid, args.output, args.metric, args.seeds, args.jobs, args.parts, args.overwrite, args.trials
    )
    fields = [one.partition("=")[0] for one in args.grid]
    shown = found.table[fields].copy()
    for metric in ("pearson", "mae", "energy"):
        of = found.table[[metric, f"{metric}_low", f"{metric}_high"]].itertuples(index=False)
        shown[metric] = [f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in of]
    show(table_text(shown))
    say(f"{args.output}: results.csv, results.json, and the runs; the mean over held-out training groups")
    show(shlex.join(["pertstate", "train", *words, *found.flags]))
