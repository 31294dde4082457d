"""The loss that an evaluation of [`PerturbationMeanForPerturbation`] reports."""

from pertstate.losses.fitted import FittedObjective


class PerturbationMeanObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
