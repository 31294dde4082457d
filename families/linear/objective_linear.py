"""The loss that an evaluation of [`LinearForPerturbation`] reports."""

from pertstate.losses.fitted import FittedObjective


class LinearObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
