"""What energy distance to expect of a prediction, from the loss that the model expects."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


# A line through fewer groups would say nothing.
FEWEST_GROUPS = 5


@dataclass
class ConfidenceCalibration:
    r"""
    The energy distance to expect of a group, from the loss that the model expects for it:

        intercept + slope * loss,   slope >= 0,   within low and high

    by least squares over the validation groups of a run, after training. Test groups take no part. Where larger losses do not go
    with larger distances among these groups, the slope is 0, and the mean distance is expected of every group. No distance is expected that is
    outside of those that were found there.

    Args:
        intercept, slope (`float`): of the line.
        low, high (`float`): the smallest and the largest distance of the validation groups.
        groups (`int`): validation groups that it comes from.
    """

    intercept: float
    slope: float
    low: float
    high: float
    groups: int

    @classmethod
    def of_groups(cls, losses: Sequence[float], distances: Sequence[float]) -> "ConfidenceCalibration | None":
        """
        The calibration on some groups; None if there are fewer than 5.

        Args:
            losses (`Sequence[float]`): that the model expects for each group.
            distances (`Sequence[float]`): energy distances that were found.
        """
        if len(losses) < FEWEST_GROUPS:
            return None
        x, y = np.asarray(losses, dtype=np.float64), np.asarray(distances, dtype=np.float64)
        away = x - x.mean()
        spread = float(away @ away)
        slope = max(0.0, float(away @ y) / spread) if spread > 0 else 0.0
        return cls(float(y.mean() - slope * x.mean()), slope, float(y.min()), float(y.max()), len(x))

    def expected(self, losses: "np.ndarray | float") -> np.ndarray:
        """The energy distance to expect, in the units of the predicted cells."""
        return np.clip(self.intercept + self.slope * np.asarray(losses, dtype=np.float64), self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict) -> "ConfidenceCalibration":
        """
        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        intercept, slope, low, high = (float(content[name]) for name in ("intercept", "slope", "low", "high"))
        found = cls(intercept, slope, low, high, int(content["groups"]))
        if not np.isfinite([intercept, slope, low, high]).all() or found.slope < 0 or found.low > found.high:
            raise ValueError("expected a calibration of finite numbers, with a slope of at least 0 and low below high")
        return found
