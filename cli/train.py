"""`pertstate train`."""

import argparse
import gc


HELP = "Train a model: pertstate train CONFIG.yaml [--any_field value ...]; --help lists the fields."


def add_arguments(parser: argparse.ArgumentParser):
    """None: the words of this command are fields of a run, which `run` reads by itself."""


def run(words: list[str]):
    # None of the thousands of objects that imports make is garbage; looking for some takes a sixth of the start-up.
    gc.disable()
    from pertstate.train import main

    gc.freeze()
    gc.enable()
    main(words)
