"""Fitting the anchor of a model: the changes that the training cells show for each perturbation."""

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from pertstate.base.constants import PERTURBATION_DOSES, PERTURBATION_FEATURES, PERTURBATION_IDS
from pertstate.base.modeling_anchor import PSEUDOCOUNT, Anchor
from pertstate.base.modeling_fitted import ridge_weights
from pertstate.data.cells import Cells
from pertstate.data.group_means import GroupMeans
from pertstate.evaluation.baselines import RIDGE
from pertstate.processing import StateProcessor


# Ridge penalties to choose from; without end, the weights are 0 and each change is the mean of all.
_RIDGES = (RIDGE, 10 * RIDGE, 100 * RIDGE, 1000 * RIDGE, np.inf)
# Shares of a change from vectors to choose from: many perturbations change cells less than the mean of all does.
_SHARES = (0.25, 0.5, 0.75, 1.0)
_BLOCK = 4096  # cells that are read at once


def fit_anchor(anchor: Anchor, means: GroupMeans, processor: StateProcessor):
    """
    Give an anchor what training groups show: the mean changes and the log fold changes of [`GroupMeans`].

    Args:
        anchor ([`Anchor`]): of a new model.
        means ([`GroupMeans`]): of the training groups, in the units of the model's features.
        processor ([`StateProcessor`]): of the model.
    """
    found, names = _shown(anchor, means)
    if anchor.by_features:
        vectors = processor.encode(names)[PERTURBATION_FEATURES].astype(np.float64)
        tables: dict[str, np.ndarray] = {}
        ridge, share = chosen_ridge_and_share(vectors, found["change"])
        for name, rows in found.items():
            weight = np.zeros((vectors.shape[1], rows.shape[1]))
            if ridge < np.inf:
                weight = ridge_weights(vectors - vectors.mean(axis=0), rows - rows.mean(axis=0), ridge)
            shared = rows.mean(axis=0) - vectors.mean(axis=0) @ weight
            tables |= {name: share * weight, f"shared_{name}": share * shared}
    else:
        design = _design(processor, names, len(anchor.change))
        tables = {name: rows_of(design, changes) for name, changes in found.items()}
    anchor.set(**tables)


def fit_added(anchor: Anchor, means: GroupMeans, processor: StateProcessor, added: list[str]):
    """
    Give the perturbations that were added to the vocabulary of a checkpoint rows of their own in its anchor; those of the others
    stay as they are.

    Args:
        anchor ([`Anchor`]): of a checkpoint, with perturbations by id.
        means ([`GroupMeans`]), processor ([`StateProcessor`]): as in [`fit_anchor`].
        added (`list[str]`): the perturbations.
    """
    found, names = _shown(anchor, means)
    design = _design(processor, names, len(anchor.change))
    new = np.zeros(len(anchor.change), dtype=bool)
    new[processor.encode(added)[PERTURBATION_IDS][:, 0]] = True
    rows = {name: getattr(anchor, name).detach().cpu().numpy().astype(np.float64) for name in found}
    anchor.set(**{name: added_rows(design, changes, rows[name], new) for name, changes in found.items()})


def _shown(anchor: Anchor, means: GroupMeans) -> tuple[dict[str, np.ndarray], list[str]]:
    """The changes of measured perturbations and combinations, `(entries, features)` by the name of a table, and their names."""
    found = {"change": means.changes()}
    if anchor.expression:
        found["log_fold"] = means.log_folds()
    names = list(found["change"])
    return {table: np.stack([of[name] for name in names]) for table, of in found.items()}, names


def _design(processor: StateProcessor, names: list[str], perturbations: int) -> np.ndarray:
    """The dose of each perturbation in each of some measured entries, `(entries, perturbations)`."""
    encoded = processor.encode(names)
    ids = encoded[PERTURBATION_IDS]
    doses = encoded.get(PERTURBATION_DOSES, np.ones(ids.shape))
    design = np.zeros((len(names), perturbations))
    entries, places = np.nonzero(ids >= 0)
    np.add.at(design, (entries, ids[entries, places]), doses[entries, places])
    return design


def chosen_ridge_and_share(vectors: np.ndarray, changes: np.ndarray) -> tuple[float, float]:
    """
    How changes are predicted best from vectors when each perturbation is left out in turn: the ridge penalty, by squared errors,
    and then the share of the predicted change, by absolute ones. With an intercept that is not penalised, the error of the
    perturbation that is left out is `e / (1 - h)`, e being its residual and h its entry on the diagonal of the hat matrix
    (Allen 1974, PRESS).

    Args:
        vectors (`np.ndarray` of shape `(perturbations, width)`), changes (`np.ndarray` of shape `(perturbations, features)`):
            of the perturbations of training.

    Returns:
        `(float, float)`: the penalty, infinite where the vectors tell nothing, so that the mean of all changes is best; and the
        share, 1 where one perturbation cannot be left out.
    """
    number = len(vectors)
    if number < 2:
        return np.inf, 1.0
    centred = vectors - vectors.mean(axis=0)
    squares, axes = np.linalg.eigh(centred @ centred.T)
    squares = np.maximum(squares, 0)
    errors = []
    for ridge in _RIDGES:
        hat = (axes * (squares / (squares + ridge))) @ axes.T + 1 / number
        residuals = changes - hat @ changes
        errors.append(residuals / np.maximum(1 - np.diag(hat), 1e-9)[:, None])
    best = int(np.argmin([(error**2).sum() for error in errors]))
    predicted = changes - errors[best]
    absolute = [np.abs(share * predicted - changes).mean() for share in _SHARES]
    return _RIDGES[best], _SHARES[int(np.argmin(absolute))]


def control_tables(
    means: GroupMeans, cells: Cells, processor: StateProcessor, accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """
    What the control cells of each training context express, and how much cells of a context differ: the tables that
    [`~pertstate.base.modeling_anchor.Anchor.correction`] needs, the same on every process.

    Args:
        means ([`GroupMeans`]): of the training groups, with expression.
        cells ([`Cells`]): with the control cells.
        processor ([`StateProcessor`]): numbers the contexts.
        accelerator (`Accelerator`): each of its processes reads some of the cells.
    """
    own = [key for key in means.groups if key[2] == processor.control][
        accelerator.process_index :: accelerator.num_processes
    ]
    spans: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for *key, start, stop in cells.groups[["dataset", "context", "perturbation", "start", "stop"]].to_numpy():
        spans.setdefault((str(key[0]), str(key[1]), str(key[2])), []).append((start, stop))
    moments = {}
    for key in own:
        total = squares = np.zeros(processor.feature_dim)
        count = 0
        for start, stop in spans[key]:
            for first in range(start, stop, _BLOCK):
                expression = np.expm1(cells.features[first : min(first + _BLOCK, stop)].astype(np.float64))
                total, squares = total + expression.sum(axis=0), squares + (expression**2).sum(axis=0)
                count += len(expression)
        moments[key] = (count, total, squares)
    contexts = len(processor.vocabulary.contexts)
    counts, sums = np.zeros(contexts), np.zeros((contexts, processor.feature_dim))
    variations = []
    for of_process in gather_object([moments]):
        for (_, context, _), (count, total, squares) in sorted(of_process.items()):
            row = processor.encode_contexts([context])[0]
            counts[row], sums[row] = counts[row] + count, sums[row] + total
            if count > 1:
                variance = np.maximum(squares - total**2 / count, 0) / (count - 1)
                variations.append(variance / (total / count + PSEUDOCOUNT) ** 2)
    return {
        "control_counts": counts,
        "control_expression": sums / np.maximum(counts, 1)[:, None],
        "control_variation": np.mean(variations, axis=0) if variations else np.zeros(processor.feature_dim),
    }


def rows_of(design: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """
    The change of each perturbation, from those of measured perturbations and combinations.

    - Measured alone: the least squares fit of `dose * row` to its own changes; with one dose of 1, its change.
    - Measured in combinations alone: the least squares fit, of least norm, to what the other parts leave.
    - Not measured: the mean of those that are measured alone, or of all that are known where none is.

    Args:
        design (`np.ndarray` of shape `(entries, perturbations)`): the dose of each perturbation in each measured entry, 0 where
            it takes no part.
        changes (`np.ndarray` of shape `(entries, features)`): of each entry.

    Returns:
        `np.ndarray` of shape `(perturbations, features)`, float64.
    """
    rows = np.zeros((design.shape[1], changes.shape[1]))
    single = (design != 0).sum(axis=1) == 1
    alone = design[single]
    weight = (alone**2).sum(axis=0)
    measured = weight > 0
    rows[measured] = (alone.T @ changes[single])[measured] / weight[measured, None]
    others = (design != 0).any(axis=0) & ~measured
    if others.any():
        having = design[:, others].any(axis=1)
        left = changes[having] - design[having] @ rows
        rows[others] = np.linalg.lstsq(design[having][:, others], left, rcond=None)[0]
    known = measured if measured.any() else others
    rows[~(measured | others)] = rows[known].mean(axis=0)
    return rows


def added_rows(design: np.ndarray, changes: np.ndarray, rows: np.ndarray, new: np.ndarray) -> np.ndarray:
    """
    The rows of an anchor with those of new perturbations as in [`rows_of`]: of one that was measured in combinations alone, what
    the other parts leave, by their rows. A new one that was not measured keeps its row.

    Args:
        design (`np.ndarray` of shape `(entries, perturbations)`), changes (`np.ndarray` of shape `(entries, features)`): as in
            [`rows_of`].
        rows (`np.ndarray` of shape `(perturbations, features)`): of the anchor.
        new (`np.ndarray` of shape `(perturbations,)`): whether a perturbation is new.

    Returns:
        `np.ndarray` of shape `(perturbations, features)`.
    """
    rows = rows.copy()
    single = (design != 0).sum(axis=1) == 1
    alone = new & (design[single] != 0).any(axis=0)
    rows[alone] = rows_of(design, changes)[alone]
    others = new & ~alone & (design != 0).any(axis=0)
    if others.any():
        having = design[:, others].any(axis=1)
        left = changes[having] - design[having][:, ~others] @ rows[~others]
        rows[others] = np.linalg.lstsq(design[having][:, others], left, rcond=None)[0]
    return rows
