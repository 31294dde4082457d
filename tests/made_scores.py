"""Scores of a made-up evaluation, of any size."""

import numpy as np
import pandas as pd

from pertstate.data.record import RecordedGroup, RunRecord
from pertstate.evaluation.metrics import METRICS
from pertstate.evaluation.scores import Scores


METHODS = ("model", "no change", "perturbation mean", "log fold change", "ceiling")
FIGURES = {"model": 0.8, "no change": np.nan, "perturbation mean": 0.6, "log fold change": 0.7, "ceiling": 0.95}


def made_scores(
    contexts: int = 2, perturbations: int = 3, genes: int = 30, cells: int = 12, seed: int = 0, name=lambda of: of
) -> Scores:
    """
    Scores of groups of `cells` cells of each kind. Gene i changes most under perturbation i, and the prediction is 0.8 of
    the observed change. Group 0 was seen in training, and its `log fold change` has no figures.

    Args:
        name: a function that changes each name.
    """
    generator = np.random.default_rng(seed)
    groups = [("screen", name(f"type_{c}"), name(f"pert_{p}")) for c in range(contexts) for p in range(perturbations)]
    control = np.repeat(generator.gamma(2.0, 0.5, (contexts, genes)).astype(np.float32), perturbations, axis=0)
    change = generator.normal(0, 0.1, (len(groups), genes)).astype(np.float32)
    change[np.arange(len(groups)), np.arange(len(groups)) % perturbations % genes] = 2
    means = {"control": control, "observed": control + change, "predicted": control + 0.8 * change}
    kept = {}
    for kind, mean in means.items():
        kept[kind] = np.repeat(mean, cells, axis=0)
        kept[kind] = (kept[kind] + generator.normal(0, 0.3, kept[kind].shape)).astype(np.float32)
        kept[f"{kind}_group"] = np.repeat(np.arange(len(groups)), cells)
    rows = []
    for number, (dataset, context, perturbation) in enumerate(groups):
        for method in METHODS:
            lacks = number == 0 and method == "log fold change"
            figure = np.nan if lacks else FIGURES[method] - 0.01 * number
            rows.append(
                {
                    "dataset": dataset,
                    "context": context,
                    "perturbation": perturbation,
                    "method": method,
                    "pearson": figure,
                    "mae": 0.05 + 0.001 * number,
                    "energy": 0.1 + 0.01 * number,
                    "reason": "it has no training cells" if lacks else "",
                    "seen": "by the model" if number == 0 and method == "model" else "",
                    "predicted_cells": cells,
                    "real_cells": cells,
                    "control_cells": cells,
                    "confidence": 0.2 + 0.02 * number if method == "model" else np.nan,
                }
            )
    averages = [
        {
            "method": method,
            "metric": metric,
            "value": FIGURES[method] if metric == "pearson" else 0.1,
            "low": FIGURES[method] - 0.05 if metric == "pearson" else np.nan,
            "high": FIGURES[method] + 0.05 if metric == "pearson" else np.nan,
            "groups": len(groups) - 1,
            "share": 0.4 if method == "model" and metric == "pearson" else np.nan,
        }
        for method in METHODS
        for metric in METRICS
    ]
    return Scores(
        table=pd.DataFrame(rows),
        averages=pd.DataFrame(averages),
        verdict=name("better than every baseline in pearson"),
        notes=[name("1 group was seen in training")],
        genes=[name(f"gene_{i}") for i in range(genes)],
        groups=groups,
        changes=means,
        cells=kept,
        settings={"seed": 0, "cells": 2000},
        record=RunRecord(
            control="control",
            groups=[
                RecordedGroup(name("screen"), name("type_1"), name("pert_0"), "train", 20),
                RecordedGroup(name("screen"), name("type_0"), name("pert_0"), "test", 10),
            ],
            notes=[name("a note")],
            change_tests={name("pert_0"): 0.001, name("pert_1"): 0.4},
        ).to_dict(),
    )


LOG = [
    {"step": 10, "epoch": 1.0, "loss": 2.0, "learning_rate": 0.1},
    {"step": 10, "epoch": 1.0, "eval_loss": 2.5, "eval_pearson": 0.5},
    {"step": 20, "epoch": 2.0, "loss": 1.0, "learning_rate": 0.05},
    {"step": 20, "epoch": 2.0, "eval_loss": 1.5, "eval_pearson": 0.6},
    {"step": 20, "epoch": 2.0, "train_loss": 1.5, "total_flos": 0},
]
