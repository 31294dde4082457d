"""The objective of neural optimal transport."""

from pertstate.losses.distributional import DistributionalObjective


class NeuralOTObjective(DistributionalObjective):
    """The terms of [`DistributionalObjective`], as the config of a [`NeuralOTForPerturbation`] asks for them."""
