"""`pertstate app`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("model", metavar="MODEL", help="folder or Hub repository of a checkpoint or an adapter")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub repository")
    parser.add_argument("--adata", metavar="FILE.h5ad", help="control cells that everybody who opens the page may use")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; by default the page is reached from this machine alone",
    )
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument(
        "--max-upload", type=int, default=500, metavar="MB", help="the largest file that somebody may upload"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ..; by default an accelerator if there is one")


def run(args: argparse.Namespace):
    import transformers

    from pertstate.app.serving import serve

    transformers.utils.logging.disable_progress_bar()
    serve(args.model, args.adata, args.revision, args.host, args.port, args.max_upload, args.device)
