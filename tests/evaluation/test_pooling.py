"""Scores of several runs together."""

from dataclasses import replace

import numpy as np
from made_scores import made_scores

from pertstate.evaluation.confidence import confidence_worth
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.pooling import pooled_scores


def test_further_figures_and_confidences_are_means_over_seeds_and_their_worth_is_that_of_all_folds():
    folds = []
    for fold in range(2):
        one = made_scores()
        table = one.table.assign(context=f"c{fold}", variance_ratio=0.5, seen="")
        is_model = table["method"] == MODEL
        table.loc[is_model, "confidence"] = np.arange(is_model.sum()) + 10.0 * fold
        other = table.copy()
        other.loc[is_model, ["variance_ratio", "confidence"]] += [0.2, 4.0]
        folds.append([replace(one, table=table, results=[]), replace(one, table=other, results=[])])
    pooled = pooled_scores(folds)
    rows = pooled.table[pooled.table["method"] == MODEL]
    number = len(rows) // 2
    assert rows["variance_ratio"].tolist() == [0.6] * len(rows)
    assert rows["confidence"].tolist() == [float(i + 10 * fold + 2) for fold in range(2) for i in range(number)]
    others = pooled.table[pooled.table["method"] != MODEL]
    assert others["variance_ratio"].eq(0.5).all()
    worth = confidence_worth(pooled.table)
    assert worth.groups == len(rows) and pooled.verdict.endswith(str(worth))
