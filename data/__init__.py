"""Files to cell sentences: splits, cells in memory or in a store, sentences, and a simulated screen."""

from cellstate.data.cells import Cells, load_cells
from cellstate.data.perturbation_features import read_perturbation_features
from cellstate.data.reading import read_h5ad
from cellstate.data.sentences import SentenceCollator, SentenceDataset
from cellstate.data.simulator import simulate_screen
from cellstate.data.splits import Splits


# Those that need Arrow are imported where they are used: runs from files do not wait for it.
_STORES = {"CellStore": "store", "load_store": "store", "prepare": "preparation"}


def __getattr__(name: str):
    if name in _STORES:
        from importlib import import_module

        return getattr(import_module(f"cellstate.data.{_STORES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CellStore",
    "Cells",
    "SentenceCollator",
    "SentenceDataset",
    "Splits",
    "load_cells",
    "load_store",
    "prepare",
    "read_h5ad",
    "read_perturbation_features",
    "simulate_screen",
]
