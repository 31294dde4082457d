"""What an evaluation of a [`AdditiveForPerturbation`] reports as its loss."""

from pertstate.losses.fitted import FittedObjective


class AdditiveObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
