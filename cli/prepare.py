"""`pertstate prepare`."""

import argparse

from pertstate.base.console import say, show
from pertstate.base.messages import counted


class _HelpWithFields(argparse.Action):
    """Show the help of the command, and the fields that may follow as flags. The fields are looked up only for the help."""

    def __call__(self, parser, namespace, values, option_string=None):
        from pertstate.training.run_help import help_of_prepare

        show((parser.format_help() + help_of_prepare()).removesuffix("\n"))
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--config",
        required=True,
        metavar="DATA.yaml",
        help="run configuration: its section `data` says which files are read, `prepare` how the store is laid out; any "
        "field of either may follow as a flag (--genes 2000, --knockdown_filter true)",
    )
    parser.add_argument("--output", required=True, metavar="STORE", help="folder to write, whole or not at all")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")
    parser.add_argument("--num-proc", type=int, default=1, metavar="N", help="how many files are read at a time")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask scheduler whose workers do the work (tcp://HOST:8786, or its scheduler file); they see the files under the same names",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "-h", "--help", action=_HelpWithFields, nargs=0, help="show this help and the fields of both sections"
    )


def run(args: argparse.Namespace):
    from pertstate.data.preparation import prepare
    from pertstate.training.run_config import load_run_config

    config = load_run_config(args.config, args.flags)
    store = prepare(
        config.data,
        args.output,
        config.prepare,
        num_proc=args.num_proc,
        quiet=args.quiet,
        overwrite=args.overwrite,
        scheduler=args.scheduler,
    )
    manifest = store.manifest
    for note in manifest.notes:
        say(note)
    size = sum(shard["bytes"] for shard in manifest.shards)
    say(
        f"{args.output}: {counted(manifest.cells, 'cell')} in {counted(len(store.groups), 'group')}, {counted(len(manifest.genes), 'gene')}, "
        f"{size / 1e6:,.0f} MB; train with --store {args.output}, look at it with pertstate info {args.output}"
    )
