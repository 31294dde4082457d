"""Figures of an evaluation in training: predicted sentences, put together group by group and scored beside the baselines."""

import numpy as np
from transformers import EvalPrediction

from pertstate.data.cells import Cells
from pertstate.data.sentences import SentenceDataset
from pertstate.evaluation.metrics import METRICS, MODEL, AsPredicted, MeanChanges, average, score_group
from pertstate.processing import StateProcessor


def scored_cells(cells: Cells, processor: StateProcessor, is_ceiling: bool):
    """
    What predictions are compared with: the features, in the units of the predictions. Of a model that is a ceiling, the
    genes, as it is given the features themselves.
    """
    return cells.genes if is_ceiling else AsPredicted(cells.features, processor)


def learned_changes(cells: Cells, processor: StateProcessor, is_ceiling: bool, clip: bool) -> MeanChanges:
    """The mean change of each perturbation over training cells and their controls; see [`MeanChanges`]."""
    return MeanChanges.fit(scored_cells(cells, processor, is_ceiling), cells.groups, processor.control, clip)


class GroupScores:
    """
    Scores the predictions of a whole dataset: the `compute_metrics` of a `Trainer`.

    Args:
        dataset ([`SentenceDataset`]): of an evaluation, where every perturbed cell stands in one sentence.
        changes ([`MeanChanges`]): what the baselines know.
        is_ceiling (`bool`): whether the model was given the observed cells, and is scored on genes.
    """

    def __init__(self, dataset: SentenceDataset, changes: MeanChanges, is_ceiling: bool):
        self.dataset, self.changes = dataset, changes
        self._cells = scored_cells(dataset.cells, dataset.processor, is_ceiling)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """[`METRICS`] of the model and of each baseline, averaged over (context, perturbation) groups."""
        predictions = np.asarray(prediction.predictions)
        of_group: dict[int, list[int]] = {}
        for i in range(len(self.dataset)):
            of_group.setdefault(self.dataset.rows(i)[0], []).append(i)
        scores = [self._score(index, sentences, predictions) for index, sentences in of_group.items()]
        logged: dict[str, float] = {}
        for method, figures in average(scores).items():
            prefix = "" if method == MODEL else method.replace(" ", "_") + "_"
            logged |= {f"{prefix}{metric}": figures[metric] for metric in METRICS}
        # The change of "no change" has no direction, so it has no correlation.
        return {name: value for name, value in logged.items() if value == value}

    def _score(self, index: int, sentences: list[int], predictions: np.ndarray) -> dict[str, dict[str, float]]:
        rows = [self.dataset.rows(i) for i in sentences]
        perturbation = self.dataset.groups[index].perturbation
        return score_group(
            np.concatenate([predictions[i, : len(targets)] for i, (_, targets, _) in zip(sentences, rows)]),
            self._cells[np.concatenate([targets for _, targets, _ in rows])],
            # The baselines start from the very control cells that the model was given.
            self._cells[np.concatenate([controls for _, _, controls in rows])],
            perturbation,
            self.dataset.processor.split_combination(perturbation),
            self.changes,
        )
