"""`pertstate info`."""

import argparse

from pertstate.base.console import say, show


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "path",
        metavar="STORE|FILE.h5ad|CHECKPOINT",
        help="cell store, .h5ad, .zarr, or folder of a checkpoint or an adapter",
    )
    for name, what in (
        ("--perturbation-key", "perturbation of each cell"),
        ("--context-key", "context (cell type or line)"),
        ("--batch-key", "experimental batch"),
    ):
        parser.add_argument(name, metavar="COLUMN", help=f"obs column of a file with the {what}; guessed by default")
    parser.add_argument("--control", metavar="NAME", help="label of unperturbed cells in a file; guessed by default")
    parser.add_argument("--verify", action="store_true", help="read all files of a store and compare their SHA-256")
    parser.add_argument("--input", default="X", help="X, layers/NAME or obsm/NAME of a file")


def run(args: argparse.Namespace):
    from pertstate.data.info import describe
    from pertstate.data.stores import open_store
    from pertstate.hub.info import describe_checkpoint, is_checkpoint
    from pertstate.hub.unfinished import read_model_folder

    if args.verify:
        open_store(args.path).verify()
    keys = {"perturbation_key": args.perturbation_key, "context_key": args.context_key, "batch_key": args.batch_key}
    about, _ = read_model_folder(args.path, lambda place: describe_checkpoint(place) if is_checkpoint(place) else None)
    if about is not None:
        show(about)
    else:
        show(describe(args.path, control=args.control, input=args.input, **keys))
    if args.verify:
        say("verified: every file is what was written")
