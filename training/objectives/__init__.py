"""Losses: one a file, each an `nn.Module`; [`objective_for`] picks a model's."""

from pertstate.configuration_autoencoders import CPAConfig, SCVIConfig
from pertstate.configuration_families import (
    AdditiveConfig,
    ContextMeanConfig,
    DecoderOnlyConfig,
    EmbedSumConfig,
    LinearConfig,
    NeuralOTConfig,
    PerturbationMeanConfig,
    PseudobulkConfig,
    ScGPTConfig,
)
from pertstate.configuration_state import PerturbationConfig, StateConfig
from pertstate.training.objectives.base import Objective
from pertstate.training.objectives.cpa import CPAObjective
from pertstate.training.objectives.decoder_only import DecoderOnlyObjective
from pertstate.training.objectives.distributional import DistributionalObjective
from pertstate.training.objectives.embed_sum import EmbedSumObjective
from pertstate.training.objectives.energy import EnergyLoss, energy_distance
from pertstate.training.objectives.fitted import FittedObjective
from pertstate.training.objectives.mse import MSELoss
from pertstate.training.objectives.scgpt import ScGPTObjective
from pertstate.training.objectives.scvi import SCVIObjective
from pertstate.training.objectives.sinkhorn import SinkhornLoss
from pertstate.training.objectives.state import StateObjective


_OBJECTIVES = {
    StateConfig.model_type: StateObjective,
    EmbedSumConfig.model_type: EmbedSumObjective,
    NeuralOTConfig.model_type: DistributionalObjective,
    PseudobulkConfig.model_type: DistributionalObjective,
    DecoderOnlyConfig.model_type: DecoderOnlyObjective,
    CPAConfig.model_type: CPAObjective,
    SCVIConfig.model_type: SCVIObjective,
    PerturbationMeanConfig.model_type: FittedObjective,
    ContextMeanConfig.model_type: FittedObjective,
    LinearConfig.model_type: FittedObjective,
    AdditiveConfig.model_type: FittedObjective,
    ScGPTConfig.model_type: ScGPTObjective,
}


def objective_for(config: PerturbationConfig) -> Objective:
    """The objective that trains a model of this config.

    `objective(outputs, batch)` returns named scalar terms; `"loss"` is their weighted sum.

    Raises:
        ValueError: no objective trains this `model_type`.
    """
    if config.model_type not in _OBJECTIVES:
        raise ValueError(f"no objective trains model_type {config.model_type!r}; expected one of {list(_OBJECTIVES)}")
    return _OBJECTIVES[config.model_type](config)


__all__ = [
    "DistributionalObjective",
    "EnergyLoss",
    "MSELoss",
    "Objective",
    "ScGPTObjective",
    "SinkhornLoss",
    "StateObjective",
    "energy_distance",
    "objective_for",
]
