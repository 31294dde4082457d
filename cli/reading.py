"""The flags that tell `predict` and `evaluate` how to read files that were made elsewhere."""

import argparse


# What each flag says about a file. Without the flag, the file is read as the training data were.
READING = {
    "perturbation_key": "obs column with each cell's perturbation",
    "context_key": "obs column with each cell's context (cell type or line)",
    "batch_key": "obs column with each cell's experimental batch",
    "control": "label of the control cells, or a pattern such as 'non-targeting*'",
    "dataset": "dataset of the training data that the file belongs to, if the datasets name batches or controls differently",
}


def add_reading_arguments(parser: argparse.ArgumentParser):
    """Add the flags to a command."""
    for name, about in READING.items():
        suffix = "" if name == "dataset" else ", if not as in the training data"
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{about}{suffix}")


def reading_of(args: argparse.Namespace) -> dict[str, str | None]:
    """The values of the flags by name. None for a flag that was not given."""
    return {name: getattr(args, name) for name in READING}
