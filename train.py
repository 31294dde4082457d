"""
Train a perturbation model: `pertstate train CONFIG.yaml [--any_field value ...]`.

Many devices: `accelerate launch -m pertstate.train CONFIG.yaml ..`, or, in a clone, `accelerate launch train.py CONFIG.yaml ..`.
"""

import sys


if __name__ == "__main__":
    # The command says what goes wrong in one line, and imports this module by its name.
    from pertstate.cli import main as command

    raise SystemExit(command(["train", *sys.argv[1:]]))

from pertstate.base.console import show
from pertstate.training.run import check_further, read_run
from pertstate.training.run_folder import run_folder
from pertstate.training.run_help import help_of_train
from pertstate.training.whole_run import train_run


def main(argv: list[str] | None = None) -> dict[str, float]:
    """
    Run a training.

    Args:
        argv (`list[str]`, *optional*): the words after `pertstate train`; by default those of the process.

    Returns:
        The figures of the test split; empty where there is none.

    Raises:
        ValueError, KeyError, OSError, ImportError: the run cannot be; the message says what to do.
        FloatingPointError: the training diverged.
        StoppedError: a signal stopped it, see [`Stop`].
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & {*argv}:
        show(help_of_train(argv))
        raise SystemExit(0 if argv else 2)

    # What is asked for, and the data: a contradiction is found before anything is computed.
    run = read_run(argv)
    check_further(run)
    with run_folder(run) as resume:
        metrics, _ = train_run(run, resume)
    return metrics
