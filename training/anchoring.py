"""What the training cells show of each perturbation, for a model that starts from it."""

import numpy as np

from pertstate.base.constants import PERTURBATION_DOSES, PERTURBATION_FEATURES, PERTURBATION_IDS
from pertstate.base.modeling_fitted import ridge_weights
from pertstate.data.group_means import GroupMeans
from pertstate.evaluation.baselines import RIDGE
from pertstate.processing import StateProcessor


def fit_anchor(model, means: GroupMeans, processor: StateProcessor):
    """
    Give the [`~pertstate.base.modeling_anchor.Anchor`] of a model what training groups show: the mean changes and the log fold
    changes of [`GroupMeans`].

    Args:
        model ([`StateForPerturbation`]): with `residual="anchor"`.
        means ([`GroupMeans`]): of the training groups, in the units of the model's features.
        processor ([`StateProcessor`]): of the model.
    """
    found = {"change": means.changes()}
    if model.anchor.expression:
        found["log_fold"] = means.log_folds()
    names = list(found["change"])
    encoded = processor.encode(names)
    if model.anchor.by_features:
        vectors = encoded[PERTURBATION_FEATURES].astype(np.float64)
        tables = {}
        for name, changes in found.items():
            rows = np.stack([changes[of] for of in names])
            weight = ridge_weights(vectors - vectors.mean(axis=0), rows - rows.mean(axis=0), RIDGE)
            tables |= {name: weight, f"shared_{name}": rows.mean(axis=0) - vectors.mean(axis=0) @ weight}
    else:
        ids = encoded[PERTURBATION_IDS]
        doses = encoded.get(PERTURBATION_DOSES, np.ones(ids.shape))
        design = np.zeros((len(names), model.config.perturbation_width))
        entries, places = np.nonzero(ids >= 0)
        np.add.at(design, (entries, ids[entries, places]), doses[entries, places])
        tables = {name: rows_of(design, np.stack([of[n] for n in names])) for name, of in found.items()}
    model.anchor.set(**tables)


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
