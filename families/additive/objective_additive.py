"""The loss that an evaluation of [`AdditiveForPerturbation`] reports."""

from pertstate.losses.fitted import FittedObjective


class AdditiveObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
