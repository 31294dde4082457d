"""`pertstate train`."""

import argparse
import gc


def add_arguments(parser: argparse.ArgumentParser):
    """Add nothing: the words of this command are fields of a run, which `run` reads by itself."""


def run(words: list[str]):
    # Imports make thousands of objects, and none of them is garbage. Looking for garbage takes a sixth of the start-up.
    gc.disable()
    from pertstate.train import main

    gc.freeze()
    gc.enable()
    main(words)
