"""Figures of merit, baselines, prediction of whole files and their comparison with real ones."""

from pertstate.evaluation.baselines import Baselines
from pertstate.evaluation.cell_eval import CellEval
from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.metrics import energy_between, pearson_of_change
from pertstate.evaluation.predicted_file import OutputLayout, controls_of
from pertstate.evaluation.prediction import predict
from pertstate.evaluation.scores import Scores, compare_models


__all__ = [
    "Baselines",
    "CellEval",
    "OutputLayout",
    "Scores",
    "compare_models",
    "controls_of",
    "energy_between",
    "evaluate",
    "pearson_of_change",
    "predict",
]
