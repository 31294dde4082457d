"""The objective of the pseudobulk transformer."""

from pertstate.losses.distributional import DistributionalObjective


class PseudobulkObjective(DistributionalObjective):
    """The terms of [`DistributionalObjective`], as the config of a [`PseudobulkForPerturbation`] asks for them."""
