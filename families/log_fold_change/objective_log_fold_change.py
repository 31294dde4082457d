"""The loss that an evaluation of [`LogFoldChangeForPerturbation`] reports."""

from pertstate.losses.fitted import FittedObjective


class LogFoldChangeObjective(FittedObjective):
    """The terms of [`FittedObjective`]."""
