"""Figures of merit, baselines, prediction of whole files and their comparison with real ones."""

from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.metrics import (
    MeanChanges,
    energy_between,
    pearson_of_change,
    score_group,
)
from pertstate.evaluation.prediction import predict


__all__ = ["MeanChanges", "energy_between", "evaluate", "pearson_of_change", "predict", "score_group"]
