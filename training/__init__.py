"""Objectives and the Trainer."""

from cellstate.training.objectives import objective_for


__all__ = ["objective_for"]
