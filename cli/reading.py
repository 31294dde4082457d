"""The flags by which `predict` and `evaluate` read files that were made elsewhere."""

import argparse


# What each says of a file; by default all is as in the training data.
READING = {
    "perturbation_key": "obs column with each cell's perturbation",
    "context_key": "obs column with each cell's context (cell type or line)",
    "batch_key": "obs column with each cell's experimental batch",
    "control": "label of the control cells, or a pattern such as 'non-targeting*'",
    "dataset": "which of the datasets of the training data the file is of, where these name batches or controls differently",
}


def add_reading_arguments(parser: argparse.ArgumentParser):
    """Add the flags to a command."""
    for name, about in READING.items():
        suffix = "" if name == "dataset" else ", if not as in the training data"
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{about}{suffix}")


def reading_of(args: argparse.Namespace) -> dict[str, str | None]:
    """What the flags say."""
    return {name: getattr(args, name) for name in READING}
