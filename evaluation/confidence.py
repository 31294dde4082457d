"""What the confidence of a model is worth: does it expect larger losses where its predictions are worse?"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.evaluation.bootstrap import LEVEL, correlation
from pertstate.evaluation.metrics import MODEL


# With fewer groups, an interval of a rank correlation says nothing.
FEWEST_GROUPS = 5
_RESAMPLINGS = 1000


def calibration(table: pd.DataFrame) -> tuple[pd.DataFrame, float] | None:
    """
    The confidence of a model beside its error: the loss that it expects and the energy distance that was found.

    Args:
        table (`pandas.DataFrame`): that of [`~pertstate.evaluation.Scores`].

    Returns:
        The rows of the model's groups that have both, and Spearman's rank correlation of the two, NaN if it is not defined. Groups
        that were trained on are left out, unless there are no others. None if the model has no confidence.
    """
    if "confidence" not in table:
        return None
    rows = table[(table["method"] == MODEL) & table["confidence"].notna() & table["energy"].notna()]
    unseen = rows[rows["seen"] == ""]
    rows = unseen if len(unseen) else rows
    if not len(rows):
        return None
    return rows, ranked(rows["confidence"], rows["energy"])[0]


@dataclass
class ConfidenceWorth:
    """
    Spearman's rank correlation of the loss that a model expects with the energy distance that was found, over held-out groups.

    Args:
        rank_correlation (`float`, *optional*): None if it is not defined.
        low, high (`float`, *optional*): its 95 % interval by the bootstrap over groups; None with fewer than 5 groups.
        groups (`int`): how many groups it is taken over.
        error (`float`, *optional*): the mean absolute difference between the energy distance that is expected, by the calibration on
            validation groups, and the one that was found; None if the confidence is not calibrated.
        energy (`float`, *optional*): the mean energy distance that was found, in the same units.
    """

    rank_correlation: float | None
    low: float | None
    high: float | None
    groups: int
    error: float | None = None
    energy: float | None = None

    def __str__(self) -> str:
        return f"{self._of_ranks} {self._of_calibration}"

    @property
    def _of_calibration(self) -> str:
        if self.error is None:
            return "It is not calibrated: there were no validation groups to expect energy distances from, or fewer than 5."
        return (
            f"Calibrated on validation groups, the energy distance that it expects is off by {self.error:.4g} on average, where "
            f"{self.energy:.4g} was found."
        )

    @property
    def _of_ranks(self) -> str:
        start = "Confidence:"
        if self.rank_correlation is None:
            return f"{start} its rank correlation with the energy distance is not defined, as {self._number} do not differ in both."
        figure = f"{start} its rank correlation with the energy distance is {self.rank_correlation:.2f}"
        if self.low is None or self.high is None:
            return f"{figure} over {self._number}, too few to say what it is worth."
        figure += f" (95 % interval {self.low:.2f} to {self.high:.2f}, {self._number})"
        if self.low > 0:
            return f"{figure}: where the model expects a larger loss, its predictions are worse."
        if self.high < 0:
            return f"{figure}: it misleads, as predictions are better where the model expects a larger loss."
        return f"{figure}: it does not tell good from bad predictions, as far as these groups show."

    @property
    def _number(self) -> str:
        return f"{self.groups} group{'s' if self.groups != 1 else ''}"

    def to_dict(self) -> dict[str, float | None]:
        """The fields, for JSON."""
        return asdict(self)


def confidence_worth(table: pd.DataFrame, seed: int = 0) -> ConfidenceWorth | None:
    """
    What the confidence of a model is worth on the groups that it was not trained on.

    Args:
        table (`pandas.DataFrame`): that of [`~pertstate.evaluation.Scores`].
        seed (`int`): of the resampling of groups.

    Returns:
        [`ConfidenceWorth`]; None if the model has no confidence, or no group was held out.
    """
    found = calibration(table)
    if found is None or (found[0]["seen"] != "").any():
        return None
    rows, figure = found
    energy, error = rows["energy"].to_numpy(dtype=np.float64), None
    # Of pooled runs, all have to be calibrated.
    if "expected_energy" in rows and rows["expected_energy"].notna().all():
        error = float(np.abs(rows["expected_energy"].to_numpy(dtype=np.float64) - energy).mean())
    calibrated = {"error": error, "energy": float(energy.mean())}
    return ConfidenceWorth(*worth_of_ranks(rows["confidence"], energy, seed), len(rows), **calibrated)


def expectations(loss: float, calibration: ConfidenceCalibration | None) -> dict[str, float]:
    """What a model expects of a group: `expected_loss`, in the units of the training loss, and `expected_energy`, where that was calibrated."""
    figures = {"expected_loss": loss}
    return figures if calibration is None else {**figures, "expected_energy": float(calibration.expected(loss))}


def confidence_text(expected: dict[tuple[str, str], float], calibration: ConfidenceCalibration | None) -> str:
    """
    What an output says of the confidence of its groups, JSON: `calibration`, and for each context and perturbation `expected_loss`,
    in the units of the training loss, and `expected_energy`, where that was calibrated.

    Args:
        expected (`dict[tuple[str, str], float]`): the loss that the model expects for each (context, perturbation).
        calibration ([`ConfidenceCalibration`], *optional*): that of the model's record.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (context, perturbation), loss in expected.items():
        found.setdefault(context, {})[perturbation] = expectations(loss, calibration)
    how = "not calibrated" if calibration is None else f"energy distance from {calibration.groups} validation groups"
    return json.dumps({"calibration": how, "groups": found})


def worth_of_ranks(expected: ArrayLike, found: ArrayLike, seed: int) -> tuple[float | None, float | None, float | None]:
    """
    Spearman's rank correlation of two figures of groups with its 95 % interval by the bootstrap over groups: None where it is not
    defined, without an interval where there are fewer than 5 groups.
    """
    figure, number = ranked(expected, found)[0], len(np.asarray(found))
    if not np.isfinite(figure):
        return None, None, None
    if number < FEWEST_GROUPS:
        return figure, None, None
    chosen = np.random.default_rng([seed, 2]).integers(0, number, (_RESAMPLINGS, number))
    low, high = np.nanquantile(ranked(expected, found, chosen), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return figure, float(low), float(high)


def ranked(expected: ArrayLike, found: ArrayLike, chosen: np.ndarray | None = None) -> list[float]:
    """Spearman's rank correlation of two figures for each choice of groups, by default all; NaN if all of a choice have the same rank."""
    from scipy.stats import rankdata

    figures = [np.asarray(of, dtype=np.float64) for of in (expected, found)]
    places = np.arange(len(figures[0]))[None] if chosen is None else chosen
    return correlation(*(rankdata(of[places], axis=1) for of in figures)).tolist()
