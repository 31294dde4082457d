"""Doses, and what a model makes of them."""

import re
from dataclasses import dataclass, field

import numpy as np

from .finite import REACH, within_reach


_LIMITS = f" (a model can compute with {1 / REACH:.0e} to {REACH:.0e})"


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
            ValueError: there is no dose, it is not a number above 0, or it is so large that no model can compute with it.
        """
        if dose is None:
            known = self.trained.get(name, [])
            raise ValueError(
                f"perturbation {name!r}: expected a dose, {name}@DOSE, found none"
                + (f"; training had {', '.join(map(dose_text, known))}" if known else "")
            )
        check_doses([dose], name)
        low, high = self.span or (1.0, 1.0)
        weight = dose / high if self.encoding == "linear" else np.log1p(dose / low) / np.log1p(high / low)
        if not weight < REACH:
            raise ValueError(
                f"perturbation {name!r} at the dose {dose_text(dose)}: a weight of {weight:g} is too large to compute with; "
                f"training had doses up to {dose_text(high)}"
            )
        return float(weight)

    def is_new(self, name: str, dose: float | None) -> bool:
        """Whether no training cell had a perturbation at this dose."""
        return dose not in self.trained.get(name, [])


def check_doses(doses: list[float], name: str | None = None):
    """ValueError unless all doses, of a perturbation of this name, are numbers above 0 that a model can compute with."""
    for dose in doses:
        if not within_reach(dose):
            of = "doses" if name is None else f"the dose of {name!r}"
            raise ValueError(
                f"{of}: expected numbers above 0, found {dose!r}{_LIMITS}; name the control where nothing is applied"
            )


def check_weights(weights: list[float]):
    """ValueError unless all weights are finite numbers that are not negative, and not too large to compute with."""
    for weight in weights:
        if not within_reach(weight) and weight != 0:
            raise ValueError(f"doses: expected finite numbers from 0, found {weight!r}{_LIMITS}")


def dose_text(dose: float) -> str:
    """A dose as it stands in names: `0.1`, `10`, `1e20`, without the "+" that joins names."""
    return re.sub(r"\.0$", "", repr(float(dose))).replace("e+", "e")


__all__ = ["DoseScale", "check_doses", "check_weights", "dose_text"]
