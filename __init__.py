"""Models of how cells respond to perturbations, trained, shared and loaded the Hugging Face way."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from pertstate._version import __version__
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
from pertstate.configuration_state import StateConfig
from pertstate.modeling_additive import AdditiveForPerturbation
from pertstate.modeling_context_mean import ContextMeanForPerturbation
from pertstate.modeling_cpa import CPAForPerturbation
from pertstate.modeling_decoder_only import DecoderOnlyForPerturbation
from pertstate.modeling_embed_sum import EmbedSumForPerturbation
from pertstate.modeling_linear import LinearForPerturbation
from pertstate.modeling_neural_ot import NeuralOTForPerturbation
from pertstate.modeling_perturbation import PerturbationOutput, PerturbationPreTrainedModel
from pertstate.modeling_perturbation_mean import PerturbationMeanForPerturbation
from pertstate.modeling_pseudobulk import PseudobulkForPerturbation
from pertstate.modeling_scgpt import ScGPTForPerturbation
from pertstate.modeling_scvi import SCVIForPerturbation
from pertstate.modeling_state import StateForPerturbation
from pertstate.processing import StateProcessor


# Every family of models, by the `model_type` of its config.
FAMILIES: dict[str, type[PerturbationPreTrainedModel]] = {
    model.config_class.model_type: model
    for model in (
        StateForPerturbation,
        EmbedSumForPerturbation,
        NeuralOTForPerturbation,
        PseudobulkForPerturbation,
        DecoderOnlyForPerturbation,
        CPAForPerturbation,
        SCVIForPerturbation,
        PerturbationMeanForPerturbation,
        ContextMeanForPerturbation,
        LinearForPerturbation,
        AdditiveForPerturbation,
        ScGPTForPerturbation,
    )
}

for _model_type, _model in FAMILIES.items():
    AutoConfig.register(_model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model)
    AutoProcessor.register(_model.config_class, StateProcessor)

__all__ = [
    "FAMILIES",
    "AdditiveConfig",
    "AdditiveForPerturbation",
    "ContextMeanConfig",
    "ContextMeanForPerturbation",
    "CPAConfig",
    "CPAForPerturbation",
    "DecoderOnlyConfig",
    "DecoderOnlyForPerturbation",
    "EmbedSumConfig",
    "EmbedSumForPerturbation",
    "LinearConfig",
    "LinearForPerturbation",
    "NeuralOTConfig",
    "NeuralOTForPerturbation",
    "PerturbationMeanConfig",
    "PerturbationMeanForPerturbation",
    "PerturbationOutput",
    "PseudobulkConfig",
    "PseudobulkForPerturbation",
    "SCVIConfig",
    "SCVIForPerturbation",
    "ScGPTConfig",
    "ScGPTForPerturbation",
    "StateConfig",
    "StateForPerturbation",
    "StateProcessor",
    "__version__",
]
