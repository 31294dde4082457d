"""Figures of merit, baselines, prediction of whole files and their comparison with real ones."""

from pertstate.evaluation.baselines import Baselines
from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.metrics import energy_between, pearson_of_change
from pertstate.evaluation.prediction import predict
from pertstate.evaluation.scores import Scores


__all__ = ["Baselines", "Scores", "energy_between", "evaluate", "pearson_of_change", "predict"]
