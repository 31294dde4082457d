"""The loss that an evaluation of [`ContextMeanForPerturbation`] reports."""

from pertstate.losses.fitted import FittedObjective


class ContextMeanObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
