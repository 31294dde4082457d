"""Files to cell sentences: splits, cells in memory or in a store, sentences, and a simulated screen."""

from cellstate.data.cells import Cells, load_cells
from cellstate.data.perturbation_features import read_perturbation_features
from cellstate.data.preparation import prepare
from cellstate.data.reading import read_h5ad
from cellstate.data.sentences import SentenceCollator, SentenceDataset
from cellstate.data.simulator import simulate_screen
from cellstate.data.splits import Splits
from cellstate.data.store import CellStore, load_store


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
