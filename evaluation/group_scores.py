"""Figures of an evaluation in training: predicted sentences, put together group by group and scored beside the baselines."""

import numpy as np
import torch
from transformers import EvalPrediction

from pertstate.base.constants import PERTURBATION_FEATURES, Split, Values
from pertstate.data.cells import Cells
from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import GroupSums
from pertstate.data.sentences import SentenceDataset
from pertstate.evaluation.baselines import ADDITIVE, NO_CHANGE, PERTURBATION_MEAN, Baselines
from pertstate.evaluation.metrics import CHEAP, METRICS, MODEL, AsPredicted
from pertstate.evaluation.scoring import ControlCells, Group, GroupResult, Predicted, RealCells, score_group
from pertstate.processing import StateProcessor


# The methods that are logged in training. The scores of the test split have all methods.
LOGGED = (MODEL, NO_CHANGE, PERTURBATION_MEAN, ADDITIVE)


def scored_cells(cells: Cells, processor: StateProcessor, decoded: bool):
    """The cells that predictions are compared with: features in the units of predictions, or genes if they are decoded."""
    return cells.genes if decoded else AsPredicted(cells.features, processor)


def is_log1p(processor: StateProcessor, decoded: bool) -> bool:
    """Whether what is scored is log1p expression."""
    return decoded or (processor.predicts or processor.values) == Values.LOG1P


def sums_of(cells: Cells, processor: StateProcessor, decoded: bool, part: int = 0, parts: int = 1) -> GroupSums:
    """Sums of training cells and their controls, in the units of predictions; see [`GroupSums.of_cells`]."""
    features, log1p = scored_cells(cells, processor, decoded), is_log1p(processor, decoded)
    return GroupSums.of_cells(features, cells.groups, processor.control, part, parts, log1p=log1p)


def baselines_of(
    means: GroupMeans | None, processor: StateProcessor, clip: bool, methods: tuple[str, ...] | None = None
) -> Baselines:
    """The baselines that learned from some training groups."""
    features = processor.perturbation_features

    def vectors(names: list[str]) -> np.ndarray | None:
        parts = {part for name in names for part in processor.split_combination(name)}
        known = set(features.names) if features is not None else set()
        return processor.encode(names)[PERTURBATION_FEATURES] if parts <= known else None

    return Baselines(means, processor.split_combination, clip, None if features is None else vectors, methods)


def real_cells_of(cells: Cells, processor: StateProcessor, decoded: bool) -> RealCells:
    """The cells of a run, as the real cells of an evaluation."""
    rows_of: dict[Group, list[np.ndarray]] = {}
    for dataset, context, perturbation, start, stop in cells.groups[
        ["dataset", "context", "perturbation", "start", "stop"]
    ].itertuples(index=False):
        rows_of.setdefault((str(dataset), str(context), str(perturbation)), []).append(np.arange(start, stop))
    scored = scored_cells(cells, processor, decoded)
    return RealCells(
        {group: np.concatenate(rows) for group, rows in rows_of.items()},
        cells.ids,
        lambda rows: scored[rows],
        lambda rows: cells.features[rows],
        cells.batch_names if "batch" in cells.groups else None,
    )


def groups_of(cells: Cells, split: str = Split.TEST) -> list[Group]:
    """The groups of a split, sorted."""
    own = cells.groups[cells.groups["split"] == split]
    return sorted({(str(a), str(b), str(c)) for a, b, c in own[["dataset", "context", "perturbation"]].to_numpy()})


class GroupScores:
    """
    Scores the predictions of a dataset batch by batch: the `compute_metrics` of a `Trainer` with `batch_eval_metrics`. A group
    is scored when its last sentence has come, and its cells are forgotten. Where the sentences of a group stand beside one another
    (`shuffle=False`), the cells of one group and one batch are kept.

    Args:
        dataset ([`SentenceDataset`]): the dataset of an evaluation, in which every perturbed cell stands in one sentence.
        baselines ([`Baselines`]): the baselines, which have learned from the training groups.
        decoded (`bool`): whether predictions are decoded genes.

    Attributes:
        results (`list[GroupResult]`): of the groups that were scored last.
    """

    def __init__(self, dataset: SentenceDataset, baselines: Baselines, decoded: bool):
        self.dataset, self.baselines = dataset, baselines
        self._cells = scored_cells(dataset.cells, dataset.processor, decoded)
        # How many sentences of each group are to come.
        groups, self._sizes = dataset.group_numbers, dataset.sizes()
        self._groups, self._missing = groups, np.bincount(groups)
        _, first = np.unique(groups, return_index=True)
        self._order = {int(groups[place]): rank for rank, place in enumerate(np.sort(first))}
        self._seen = 0
        self._waiting: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._results: dict[int, GroupResult] = {}
        self.results: list[GroupResult] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """
        Take in the predictions of the next sentences.

        Args:
            prediction (`EvalPrediction`): `predictions`, a tensor of shape `(sentences, set_size, features)`.
            compute_result (`bool`): these are the last ones.

        Returns:
            With the last ones, [`METRICS`] of the model and of some baselines, averaged over (context, perturbation) groups.
        """
        for predicted in prediction.predictions:
            number, size = int(self._groups[self._seen]), int(self._sizes[self._seen])
            waiting = self._waiting.setdefault(number, [])
            waiting.append((self._seen, torch.as_tensor(predicted[:size]).float().cpu().numpy()))
            self._seen += 1
            if len(waiting) == self._missing[number]:
                self._results[number] = self._score(number, self._waiting.pop(number))
        if not compute_result:
            return {}
        self.results = [self._results[number] for number in sorted(self._results, key=self._order.__getitem__)]
        return logged_figures(self.results)

    def _score(self, number: int, sentences: list[tuple[int, np.ndarray]]) -> GroupResult:
        rows, group = [self.dataset.rows(i) for i, _ in sentences], self.dataset.groups[number]
        # The baselines start from the same control cells as the model.
        controls = self._cells[np.concatenate([controls for _, _, controls in rows])]
        return score_group(
            (group.dataset, group.context, group.perturbation),
            Predicted(np.concatenate([cells for _, cells in sentences]), of_controls=True),
            self._cells[np.concatenate([targets for _, targets, _ in rows])],
            ControlCells(controls, (group.dataset, group.context), draws=0),
            self.baselines,
        )


def logged_figures(results: list[GroupResult], methods: tuple[str, ...] = LOGGED) -> dict[str, float]:
    """
    The unweighted mean over groups of each method's figures, without undefined ones: `pearson`, .. of the model, also the further
    figures that cost little, and `no_change_pearson`, .. of a baseline.
    """
    logged: dict[str, float] = {}
    for method in methods:
        prefix = "" if method == MODEL else method.replace(" ", "_") + "_"
        for metric in (*METRICS, *CHEAP) if method == MODEL else METRICS:
            found = [result.of(method, metric) for result in results]
            defined = [float(of[0]) for of in found if of is not None and np.isfinite(of[0])]
            if defined:
                logged[f"{prefix}{metric}"] = float(np.mean(defined))
    return logged
