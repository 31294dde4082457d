"""Objectives, the Trainer and its arguments."""

from cellstate.training.arguments import StateTrainingArguments
from cellstate.training.objectives import objective_for
from cellstate.training.trainer import StateTrainer


__all__ = ["StateTrainer", "StateTrainingArguments", "objective_for"]
