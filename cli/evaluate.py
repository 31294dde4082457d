"""`pertstate evaluate`."""

import argparse
import sys


HELP = "Score predicted cells against real ones, next to two baselines: no change and the perturbation mean."


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--predicted", required=True, metavar="P.h5ad", help="what `pertstate predict` wrote")
    parser.add_argument("--real", required=True, metavar="R.h5ad", help="real perturbed and control cells")
    parser.add_argument("--train", required=True, metavar="TRAIN.h5ad", help="cells that the baselines learn from")
    parser.add_argument("--output", metavar="TABLE.csv", help="also write the table, .csv or .json")
    parser.add_argument("--perturbation-key", help="obs column, if the predicted file does not record it")
    parser.add_argument("--context-key", help="obs column, if the predicted file does not record it")
    parser.add_argument("--control", help="label of control cells, if the predicted file does not record it")
    parser.add_argument("--input", help="where real cells are read: X, layers/NAME or obsm/NAME")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace):
    from pertstate.evaluation.comparison import (
        check_table_path,
        evaluate,
        format_table,
        write_table,
    )

    if args.output:
        check_table_path(args.output)
    keys = {name: getattr(args, name) for name in ("perturbation_key", "context_key", "control", "input")}
    table, notes = evaluate(args.predicted, args.real, args.train, quiet=args.quiet, **keys)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(format_table(table))
    if args.output:
        write_table(table, args.output)
