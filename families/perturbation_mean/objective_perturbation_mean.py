"""What an evaluation of a [`PerturbationMeanForPerturbation`] reports as its loss."""

from pertstate.losses.fitted import FittedObjective


class PerturbationMeanObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
