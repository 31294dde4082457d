"""Scores of several runs together: folds that hold out different groups, each trained with several seeds."""

import numpy as np
import pandas as pd

from pertstate.evaluation.confidence import confidence_worth
from pertstate.evaluation.expected_error import expected_error_worth
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.report_data import metrics_of
from pertstate.evaluation.scores import Scores
from pertstate.evaluation.scoring import GroupResult
from pertstate.evaluation.verdict import averages_of, verdict_of


def over_seeds(several: list[list[GroupResult]]) -> list[GroupResult]:
    """
    Each group with the mean of the model's figures over runs, resampling by resampling.

    Args:
        several (`list[list[GroupResult]]`): the same groups in the same order, of each run.
    """
    pooled = []
    for results in zip(*several, strict=True):
        figures = dict(results[0].figures)
        figures[MODEL] = np.mean([result.figures[MODEL] for result in results], axis=0)
        first = results[0]
        pooled.append(GroupResult(first.group, figures, first.reasons, first.numbers, first.means))
    return pooled


def pooled_scores(folds: list[list[Scores]], name: str = "the model") -> Scores:
    """
    The scores of a method of training: each fold's groups with the mean figures of its seeds, averaged over all groups of all
    folds.

    Args:
        folds (`list[list[Scores]]`): for each fold the scores of each seed, with `results`.
        name (`str`): what the verdict calls the model.

    Returns:
        [`Scores`]: the table has the mean figures over seeds, and the mean confidence and expected error, whose worth the verdict says over all folds; changes and cells are those of each fold's first seed, in the genes
        that all folds have.
    """
    results = [result for seeds in folds for result in over_seeds([scores.results for scores in seeds])]
    firsts = [seeds[0] for seeds in folds]
    genes = [gene for gene in firsts[0].genes if all(gene in set(scores.genes) for scores in firsts[1:])]
    columns = [pd.Index(scores.genes).get_indexer(genes) for scores in firsts]
    kinds = [kind for kind in firsts[0].changes if all(kind in scores.changes for scores in firsts)]
    changes = {
        kind: np.concatenate([scores.changes[kind][:, at] for scores, at in zip(firsts, columns)]) for kind in kinds
    }
    starts = np.cumsum([0, *(len(scores.groups) for scores in firsts)])
    cells = {}
    for kind in ("control", "observed", "predicted"):
        if all(kind in scores.cells for scores in firsts):
            cells[kind] = np.concatenate([scores.cells[kind][:, at] for scores, at in zip(firsts, columns)])
            numbers = [scores.cells[f"{kind}_group"] + start for scores, start in zip(firsts, starts)]
            cells[f"{kind}_group"] = np.concatenate(numbers)
    table = pd.concat([_mean_table([scores.table for scores in seeds]) for seeds in folds], ignore_index=True)
    worth = [found for found in (confidence_worth(table), expected_error_worth(table)) if found is not None]
    return Scores(
        table=table,
        averages=averages_of(results),
        verdict=" ".join([verdict_of(results, name), *map(str, worth)]),
        notes=list(dict.fromkeys(note for scores in firsts for note in scores.notes)),
        genes=genes,
        groups=[group for scores in firsts for group in scores.groups],
        changes=changes,
        cells=cells,
        settings={"seed": 0, "folds": len(folds), "runs of each fold": len(folds[0])},
        results=results,
    )


def _mean_table(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The table of a fold with the mean of the model's figures over its seeds, further ones and the confidence too."""
    mean = tables[0].copy()
    is_model = (mean["method"] == MODEL).to_numpy()
    expected = ("expected_energy", "expected_mae")
    partly = [name for name in expected if not all(name in table for table in tables)]
    mean = mean.drop(columns=partly, errors="ignore")
    names = (*metrics_of(mean), "confidence", *expected)
    own = [name for name in names if all(name in table for table in (mean, *tables))]
    figures = np.stack([table.loc[is_model, own].to_numpy(dtype=float) for table in tables])
    mean.loc[is_model, own] = figures.mean(axis=0)
    return mean
