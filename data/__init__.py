"""Files to cell sentences: splits, cells in memory, sentences, and a simulated screen."""

from cellstate.data.cells import Cells, load_cells
from cellstate.data.perturbation_features import read_perturbation_features
from cellstate.data.reading import read_h5ad
from cellstate.data.sentences import SentenceCollator, SentenceDataset
from cellstate.data.simulator import simulate_screen
from cellstate.data.splits import Splits


__all__ = [
    "Cells",
    "SentenceCollator",
    "SentenceDataset",
    "Splits",
    "load_cells",
    "read_h5ad",
    "read_perturbation_features",
    "simulate_screen",
]
