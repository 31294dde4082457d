"""Intervals of predicted mean changes, from how far the changes of held-out training groups were from their predictions."""

import dataclasses
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq


LEVEL = 0.9
# Candidates for the part of the spread of control cells that stands for the error of a gene whose predicted change is 0.
_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# The share of genes whose predicted changes are large.
_LARGE = 0.1


@dataclass
class ChangeIntervals:
    r"""
    Intervals of the mean change of a group that was not trained on, as it would be measured with some cells, gene by gene:

        change +- sqrt(error_g^2 + noise_g^2),  error_g = factor (|change| + share spread_g),
                                                noise_g = z spread_g sqrt(1 / cells + 1 / controls)

    `noise_g` is that of the measurement: of the means of `cells` perturbed cells and of `controls` control cells, with the quantile
    `z` of the normal distribution. `error_g` is that of the model. Its factor comes from groups that were held out while the number
    of steps was chosen, by split conformal prediction (Vovk, Gammerman & Shafer 2005; Lei et al. 2018): it is the quantile, over
    all of their genes, of the factor that the interval of each measured change needs, or that over the tenth of each group's genes
    with the largest predicted changes, if that is more. The interval holds for groups that are as new to the training groups as
    those that were held out.

    Args:
        level (`float`): the share of measured changes that it is to cover.
        factor (`float`), share (`float`): see above.
        spread (`np.ndarray` of shape `(features,)`): the standard deviation of each feature among control cells of a context,
            float32, in the units of predictions.
        groups (`int`): held-out groups that it comes from.
        deviation (`float`): the standard deviation of the error of the model, in units of `|change| + share spread_g`, by which the
            mean absolute error of the held-out groups is what [`ChangeIntervals.expected_mae`] says; 0 where their noise explains it.
    """

    level: float
    factor: float
    share: float
    spread: np.ndarray
    groups: int
    deviation: float

    @classmethod
    def of_held_out(
        cls, predicted: np.ndarray, observed: np.ndarray, cells: np.ndarray, controls: np.ndarray, spread: np.ndarray
    ) -> "ChangeIntervals":
        """
        The intervals that cover [`LEVEL`] of some changes. Of several shares of the spread, the one with the narrowest
        intervals is taken.

        Args:
            predicted, observed (`np.ndarray` of shape `(groups, features)`): mean changes of held-out groups.
            cells, controls (`np.ndarray` of shape `(groups,)`): how many cells, and control cells, the observed changes are of.
            spread (`np.ndarray` of shape `(features,)`): the standard deviation of each feature among control cells.
        """
        # A gene that no control cell expresses still has an error.
        spread = np.maximum(spread, 0.01 * max(float(spread.max()), 1e-6))
        deviation = _deviation(spread, cells, controls)
        noise, errors, sizes = _z(LEVEL) * deviation, np.abs(observed - predicted), np.abs(predicted)
        left = np.sqrt(np.maximum(errors**2 - noise**2, 0))
        large = sizes >= np.quantile(sizes, 1 - _LARGE, axis=1, keepdims=True)
        found = []
        for share in _SHARES:
            scale = sizes + share * spread
            needed = left / scale
            factor = max(_quantile(needed.ravel()), _quantile(needed[large]))
            found.append((float(np.sqrt((factor * scale) ** 2 + noise**2).mean()), share, factor))
        _, share, factor = min(found)
        scale, mae = sizes + share * spread, float(errors.mean())

        def excess(of_model: float) -> float:
            return float(_mean_size(np.sqrt(deviation**2 + (of_model * scale) ** 2)).mean()) - mae

        of_model = 0.0 if excess(0) >= 0 else brentq(excess, 0, 2 * mae / float(_mean_size(scale).mean()))
        return cls(LEVEL, factor, share, spread.astype(np.float32), len(predicted), float(of_model))

    def around(self, change: np.ndarray, cells: ArrayLike, controls: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """
        The lower and the upper ends around predicted mean changes.

        Args:
            change (`np.ndarray` of shape `(.., features)`): the predicted changes.
            cells, controls (`int`, or arrays of shape `(..)`): how many cells, and control cells, the change would be measured with.
        """
        noise = _z(self.level) * _deviation(self.spread, cells, controls)
        half = np.sqrt((self.factor * self._scale(change)) ** 2 + noise**2)
        return change - half, change + half

    def expected_mae(self, change: np.ndarray, cells: ArrayLike, controls: ArrayLike) -> np.ndarray:
        r"""
        The mean absolute error over features `(..)` that is to be expected of predicted mean changes, the mean of

            sqrt(2 / pi) sqrt(spread_g^2 (1 / cells + 1 / controls) + (deviation (|change| + share spread_g))^2),

        the mean absolute value of a normal error. Arguments as of [`ChangeIntervals.around`].
        """
        deviation = _deviation(self.spread, cells, controls)
        return _mean_size(np.sqrt(deviation**2 + (self.deviation * self._scale(change)) ** 2)).mean(axis=-1)

    def of_features(self, chosen: np.ndarray) -> "ChangeIntervals":
        """The intervals of some features, by their places."""
        return dataclasses.replace(self, spread=self.spread[chosen])

    def _scale(self, change: np.ndarray) -> np.ndarray:
        return np.abs(change) + self.share * self.spread

    def to_dict(self) -> dict[str, Any]:
        """All but the spread, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "spread"}

    @classmethod
    def from_dict(cls, content: dict, spread: np.ndarray) -> "ChangeIntervals":
        """
        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        level, *numbers = (float(content[name]) for name in ("level", "factor", "share", "deviation"))
        if not 0 < level < 1 or not all(0 <= number < np.inf for number in numbers):
            raise ValueError("expected intervals with a level from 0 to 1 and a finite factor, share and deviation")
        if spread.ndim != 1 or not np.isfinite(spread).all():
            raise ValueError("expected intervals with a finite spread of each feature")
        factor, share, deviation = numbers
        return cls(level, factor, share, spread, int(content["groups"]), deviation)


def _deviation(spread: np.ndarray, cells: ArrayLike, controls: ArrayLike) -> np.ndarray:
    """The standard deviations of the noise of a measured change, `(.., features)`."""
    of_cells, of_controls = np.asarray(cells, dtype=np.float64), np.asarray(controls, dtype=np.float64)
    return spread * np.sqrt(1 / of_cells + 1 / of_controls)[..., None]


def _z(level: float) -> float:
    """Half the width, in standard deviations, of the interval that covers a share of the normal distribution."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _mean_size(deviation: np.ndarray) -> np.ndarray:
    """The mean absolute value of normal errors."""
    return np.sqrt(2 / np.pi) * deviation


def _quantile(needed: np.ndarray) -> float:
    """The smallest of some numbers that [`LEVEL`] of them, and of a further one, are at most."""
    return float(np.sort(needed)[min(len(needed) - 1, int(np.ceil((len(needed) + 1) * LEVEL)) - 1)])
