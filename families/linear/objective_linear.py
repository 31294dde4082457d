"""What an evaluation of a [`LinearForPerturbation`] reports as its loss."""

from pertstate.losses.fitted import FittedObjective


class LinearObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
