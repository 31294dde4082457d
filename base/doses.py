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
        encoding (`str`): how a weight grows with the dose d, of doses from `low` to `high`.

            - `"log"`: log(1 + d / low) / log(1 + high / low)
            - `"linear"`: d / high
        trained (`dict[str, list[float]]`): the doses of each perturbation in the training cells.
        span (`list[float]`, *optional*): `low` and `high`. By default the smallest and the largest of all `trained`. A
            checkpoint that is trained further keeps its own, as its weights were learned with them.
    """

    encoding: str = "log"
    trained: dict[str, list[float]] = field(default_factory=dict)
    span: list[float] | None = None

    def __post_init__(self) -> None:
        every = [dose for known in self.trained.values() for dose in known]
        if self.span is None and every:
            self.span = [min(every), max(every)]

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
        low, high = self.span or (1.0, 1.0)
        if self.encoding == "linear":
            return float(dose / high)
        return float(np.log1p(dose / low) / np.log1p(high / low))

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
