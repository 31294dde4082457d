"""Doses, and what a model makes of them."""

import math
import re
from dataclasses import dataclass, field

import numpy as np


@dataclass
class DoseScale:
    r"""
    Turns doses into the weights of perturbations: 0 without a dose, 1 at the largest dose of training.

    Args:
        encoding (`str`): how a weight grows with the dose d, of training doses from `low` to `high`.

            - `"log"`: log(1 + d / low) / log(1 + high / low)
            - `"linear"`: d / high
        trained (`dict[str, list[float]]`): the doses of each perturbation in the training cells.
    """

    encoding: str = "log"
    trained: dict[str, list[float]] = field(default_factory=dict)

    def weight(self, name: str, dose: float | None) -> float:
        """
        The weight of a perturbation at a dose.

        Raises:
            ValueError: there is no dose, or it is not a number above 0.
        """
        if dose is None:
            known = self.trained.get(name, [])
            raise ValueError(
                f"perturbation {name!r}: expected a dose, {name}@DOSE, found none"
                + (f"; training had {', '.join(map(dose_text, known))}" if known else "")
            )
        check_doses([dose])
        every = [of for known in self.trained.values() for of in known] or [1.0]
        if self.encoding == "linear":
            return float(dose / max(every))
        return float(np.log1p(dose / min(every)) / np.log1p(max(every) / min(every)))

    def is_new(self, name: str, dose: float | None) -> bool:
        """Whether no training cell had a perturbation at this dose."""
        return dose not in self.trained.get(name, [])


def check_doses(doses: list[float]):
    """ValueError unless all doses are numbers above 0."""
    for dose in doses:
        if not (isinstance(dose, (int, float, np.number)) and 0 < float(dose) < math.inf):
            raise ValueError(
                f"doses: expected numbers above 0, found {dose!r}; name the control where nothing is applied"
            )


def check_weights(weights: list[float]):
    """ValueError unless all weights are finite numbers that are not negative."""
    for weight in weights:
        if not (isinstance(weight, (int, float, np.number)) and 0 <= float(weight) < math.inf):
            raise ValueError(f"doses: expected finite numbers from 0, found {weight!r}")


def dose_text(dose: float) -> str:
    """A dose as it stands in names: `0.1`, `10`."""
    return re.sub(r"\.0$", "", repr(float(dose)))


__all__ = ["DoseScale", "check_doses", "check_weights", "dose_text"]
