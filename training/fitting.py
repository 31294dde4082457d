"""The one pass over the training cells that families without gradients are fitted in."""

import time

from accelerate import Accelerator
from accelerate.utils import gather_object

from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import GroupSums
from pertstate.data.stream_survey import check_controls
from pertstate.data.training_sentences import TrainingSentences
from pertstate.evaluation.group_scores import sums_of


def fit_model(
    model, data: TrainingSentences, accelerator: Accelerator, progress: bool
) -> tuple[GroupSums, dict[str, float]]:
    """
    Compute the weights of a `fitted` model from the training cells.

    Args:
        model ([`FittedPreTrainedModel`]): gets the weights.
        data ([`TrainingSentences`]): has the cells.
        accelerator (`Accelerator`): each of its processes reads a share of the cells.
        progress (`bool`): show a progress bar.

    Returns:
        `(GroupSums, dict[str, float])`: what the model was fitted to, and `fit_cells`, `fit_runtime` in seconds and
        `fit_cells_per_second`.

    Raises:
        ValueError: training cells have no control cells of their dataset and context; see also the model's `fit`.
    """
    start = time.perf_counter()
    sums = gather_sums(data, accelerator, progress)
    model.fit(sums.means(data.processor))
    runtime = time.perf_counter() - start
    metrics = {"fit_cells": sums.num_cells, "fit_runtime": round(runtime, 4)}
    return sums, metrics | {"fit_cells_per_second": round(sums.num_cells / runtime, 1)}


def gather_sums(data: TrainingSentences, accelerator: Accelerator, progress: bool) -> GroupSums:
    """
    Counts and sums of all training cells and of their controls, the same on every process. Of cells in memory or in a
    store each process takes some groups, so several processes give the same bits as one. Of a stream each process reads
    a part, so the sums of several processes agree with those of one to the rounding of float64.

    Raises:
        ValueError: training cells have no control cells of their dataset and context.
    """
    own = data.group_sums(accelerator.process_index, accelerator.num_processes, progress)
    sums = GroupSums.merged(gather_object([own]))
    check_controls(sums.lonely)
    return sums


def gather_means(data: TrainingSentences, decoded: bool, accelerator: Accelerator) -> GroupMeans | None:
    """
    The means of the training groups in the units of predictions, the same on every process; None where there are none, as
    only control cells are trained on or a stream kept no training cells.

    Args:
        decoded (`bool`): whether what is predicted are decoded genes.
    """
    cells = data.training_cells()
    if cells is None:
        return None
    own = sums_of(cells, data.processor, decoded, accelerator.process_index, accelerator.num_processes)
    sums = GroupSums.merged(gather_object([own]))
    return GroupMeans.of_sums(sums) if sums.paired else None
