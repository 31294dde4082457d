"""Files to cell sentences: splits, cells in memory or in a store, sentences, and a simulated screen."""

from pertstate.data.cells import Cells, load_cells
from pertstate.data.perturbation_features import read_perturbation_features
from pertstate.data.preparation import prepare
from pertstate.data.reading import read_h5ad
from pertstate.data.sentences import SentenceCollator, SentenceDataset
from pertstate.data.simulator import simulate_screen
from pertstate.data.splits import Splits
from pertstate.data.store import CellStore, load_store


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
