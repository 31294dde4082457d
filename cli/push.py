"""`pertstate push`."""

import argparse

from pertstate.base.console import say


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("name", metavar="USER/NAME", help="repository on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private repository (refused for a public one)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it does not exist")
    parser.add_argument("--message", help="message of the commit")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace):
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    from pertstate.hub.push import address_of, push_checkpoint

    transformers.utils.logging.disable_progress_bar()  # the bar of reading the weights
    if args.quiet:
        disable_progress_bars()
    commit = push_checkpoint(
        args.folder, args.name, private=args.private or None, revision=args.revision, message=args.message
    )
    say(address_of(commit))
    say(f'load it with revision="{commit.oid}"')
