"""Distances between predicted and observed cells, one a file, and what objectives share."""

from pertstate.losses.distributional import DistributionalObjective
from pertstate.losses.energy import EnergyLoss, energy_distance
from pertstate.losses.fitted import FittedObjective
from pertstate.losses.mse import MSELoss
from pertstate.losses.objective import Objective
from pertstate.losses.sinkhorn import SinkhornLoss, sinkhorn_divergence


__all__ = [
    "DistributionalObjective",
    "EnergyLoss",
    "FittedObjective",
    "MSELoss",
    "Objective",
    "SinkhornLoss",
    "energy_distance",
    "sinkhorn_divergence",
]
