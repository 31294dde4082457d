"""What an evaluation of a [`ContextMeanForPerturbation`] reports as its loss."""

from pertstate.losses.fitted import FittedObjective


class ContextMeanObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
