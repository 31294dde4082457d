"""`pertstate evaluate`."""

import argparse
import sys
from contextlib import nullcontext

from pertstate.base.console import say, show
from pertstate.cli.reading import add_reading_arguments, reading_of


HELP = "Score predicted cells against real ones, next to two baselines: no change and the perturbation mean."


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--predicted", required=True, metavar="P.h5ad", help="what `pertstate predict` wrote")
    parser.add_argument("--real", required=True, metavar="R.h5ad", help="real perturbed and control cells")
    parser.add_argument("--train", required=True, metavar="TRAIN.h5ad", help="cells that the baselines learn from")
    parser.add_argument("--output", metavar="TABLE.csv", help="also write the table, .csv or .json")
    parser.add_argument("--overwrite", action="store_true", help="replace a table that is there")
    add_reading_arguments(parser)
    parser.add_argument("--context", help="the context of all real cells, where the files have no such column")
    parser.add_argument("--input", help="where real cells are read: X, layers/NAME or obsm/NAME")
    parser.add_argument(
        "--convert-scale", action="store_true", help="convert log1p values of another total than the model's"
    )
    parser.add_argument(
        "--max-controls",
        type=int,
        metavar="N",
        help="at most N control cells of each context, drawn at random; by default all. Time grows with the square of N",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of this draw")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace):
    from pertstate.evaluation.comparison import claimed_table, evaluate, format_table, write_table

    if args.overwrite and not args.output:
        raise ValueError("--overwrite has no effect without --output")
    # Before there is any work to lose.
    with claimed_table(args.output, args.overwrite) if args.output else nullcontext():
        keys = {**reading_of(args), "context": args.context, "input": args.input}
        table, notes = evaluate(
            args.predicted,
            args.real,
            args.train,
            quiet=args.quiet,
            convert_scale=args.convert_scale,
            max_controls=args.max_controls,
            seed=args.seed,
            **keys,
        )
        for note in notes:
            say(f"note: {note}", sys.stderr)
        show(format_table(table))
        if args.output:
            write_table(table, args.output, args.overwrite)
