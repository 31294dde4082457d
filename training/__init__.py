"""The Trainer, its arguments, and the objective of each family."""

from pertstate.families import objective_for
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.trainer import StateTrainer


__all__ = ["StateTrainer", "StateTrainingArguments", "objective_for"]
