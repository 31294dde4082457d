"""`pertstate merge`."""

import argparse

from pertstate.base.console import say


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub repository of the adapter")
    parser.add_argument("output", metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument("--revision", help="revision of the adapter's Hub repository")
    parser.add_argument("--base", metavar="FOLDER", help="base model; by default the one that the adapter names")
    parser.add_argument("--base-revision", help="revision of the base model's Hub repository")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that OUT holds")


def run(args: argparse.Namespace):
    import transformers

    from pertstate.hub.checkpoints import check_name
    from pertstate.hub.merging import merge_adapter

    if args.base is None and args.base_revision is not None:
        raise ValueError(f"--base-revision {args.base_revision} is a revision of --base; give both, or neither")
    check_name(args.adapter, "ADAPTER")
    if args.base is not None:
        check_name(args.base, "--base")
    transformers.utils.logging.disable_progress_bar()
    merge_adapter(args.adapter, args.output, args.revision, args.base, args.base_revision, args.overwrite)
    say(f"{args.output}: a checkpoint without adapters")
