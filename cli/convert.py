"""`pertstate convert`."""

import argparse

from pertstate.base.console import log_to_console, say
from pertstate.base.messages import counted


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "folder", metavar="LEGACY_FOLDER", help="holds config.yaml, var_dims.pkl, pert_onehot_map.pt .."
    )
    parser.add_argument("output", metavar="OUT", help="checkpoint folder to write, whole or not at all")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME.ckpt",
        help="file in checkpoints/; by default final.ckpt, last.ckpt or the only one",
    )
    parser.add_argument(
        "--attention",
        choices=("bidirectional", "causal", "none"),
        help="which cells a cell saw in training; by default what the folder recorded, or causal if it recorded nothing",
    )
    parser.add_argument(
        "--genes",
        metavar="FILE",
        help="names of the genes, one on a line in the order of the training, if the folder has none",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="how long it may take; by default a minute, and a second for each 10 MB of files",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that OUT holds")


def run(args: argparse.Namespace):
    import logging
    from pathlib import Path

    import transformers

    from pertstate.data.arguments import read_names
    from pertstate.legacy.conversion import convert

    log_to_console(logging.WARNING, "warning: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    genes = read_names(Path(args.genes)) if args.genes else None
    made = convert(args.folder, args.output, args.checkpoint, args.attention, genes, args.overwrite, args.seconds)
    vocabulary = made.processor.vocabulary
    say(
        f"{args.output}: {made.config.model_type}, {counted(len(vocabulary.perturbations), 'perturbation')}, "
        f"{counted(len(vocabulary.contexts), 'context')}, {counted(len(vocabulary.genes), 'named gene')}"
    )
    if made.attention:
        say(f"attention: {made.attention}")
    say(f"predict with: pertstate predict --model {args.output} --adata CELLS.h5ad --output OUT.h5ad")
