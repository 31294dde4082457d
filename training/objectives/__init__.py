"""Losses: one a file, each an `nn.Module`; [`objective_for`] picks a model's."""

from cellstate.configuration_autoencoders import CPAConfig, SCVIConfig
from cellstate.configuration_families import (
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
from cellstate.configuration_state import PerturbationConfig, StateConfig
from cellstate.training.objectives.base import Objective
from cellstate.training.objectives.cpa import CPAObjective
from cellstate.training.objectives.decoder_only import DecoderOnlyObjective
from cellstate.training.objectives.distributional import DistributionalObjective
from cellstate.training.objectives.embed_sum import EmbedSumObjective
from cellstate.training.objectives.energy import EnergyLoss, energy_distance
from cellstate.training.objectives.fitted import FittedObjective
from cellstate.training.objectives.mse import MSELoss
from cellstate.training.objectives.scgpt import ScGPTObjective
from cellstate.training.objectives.scvi import SCVIObjective
from cellstate.training.objectives.sinkhorn import SinkhornLoss
from cellstate.training.objectives.state import StateObjective


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
