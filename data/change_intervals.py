"""Intervals of predicted mean changes, from how far the changes of held-out training groups were from their predictions."""

from dataclasses import dataclass
from typing import Any

import numpy as np


LEVEL = 0.9
# Candidates for the part of the spread of control cells that stands for the error of a gene whose predicted change is 0.
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


@dataclass
class ChangeIntervals:
    r"""
    Intervals of the mean change of a group that was not trained on, gene by gene:

        change +- factor (|change| + floor_g)

    By split conformal prediction (Vovk, Gammerman & Shafer 2005; Lei et al. 2018) with the score
    `|observed - predicted| / (|predicted| + floor_g)`, the factor is the quantile of the scores of groups that were held out while
    the number of steps was chosen, over all of their genes. The interval is one of the change that would be measured, which has
    the noise of its cells. It holds for groups that are as new to the training groups as those that were held out.

    Args:
        level (`float`): the share of measured changes that it is to cover.
        factor (`float`): see above.
        floor (`np.ndarray` of shape `(features,)`): a part of the standard deviation of each feature among control cells,
            float32, in the units of predictions.
        groups (`int`): held-out groups that it comes from.
    """

    level: float
    factor: float
    floor: np.ndarray
    groups: int

    @classmethod
    def of_held_out(cls, predicted: np.ndarray, observed: np.ndarray, spread: np.ndarray) -> "ChangeIntervals":
        """
        The intervals that cover [`LEVEL`] of some changes. Of several shares of the spread, the one with the narrowest
        intervals is taken.

        Args:
            predicted, observed (`np.ndarray` of shape `(groups, features)`): mean changes of held-out groups.
            spread (`np.ndarray` of shape `(features,)`): the standard deviation of each feature among control cells.
        """
        # A gene that no control cell expresses still has an error.
        spread = np.maximum(spread, 0.01 * max(float(spread.max()), 1e-6))
        found = []
        for share in _SHARES:
            scale = np.abs(predicted) + share * spread
            scores = np.sort((np.abs(observed - predicted) / scale).ravel())
            place = min(len(scores) - 1, int(np.ceil((len(scores) + 1) * LEVEL)) - 1)
            found.append((float((scores[place] * scale).mean()), share, float(scores[place])))
        _, share, factor = min(found)
        return cls(LEVEL, factor, (share * spread).astype(np.float32), len(predicted))

    def around(self, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper ends around predicted mean changes `(.., features)`."""
        half = self.factor * (np.abs(change) + self.floor)
        return change - half, change + half

    def to_dict(self) -> dict[str, Any]:
        """All but the floor, for JSON."""
        return {"level": self.level, "factor": self.factor, "groups": self.groups}

    @classmethod
    def from_dict(cls, content: dict, floor: np.ndarray) -> "ChangeIntervals":
        """
        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        found = cls(float(content["level"]), float(content["factor"]), floor, int(content["groups"]))
        if not 0 < found.level < 1 or not 0 <= found.factor < np.inf or floor.ndim != 1 or not np.isfinite(floor).all():
            raise ValueError(
                "expected intervals with a level from 0 to 1, a finite factor and a finite floor of each feature"
            )
        return found
