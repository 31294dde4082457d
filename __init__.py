"""Models of how cells respond to perturbations, trained, shared and loaded the Hugging Face way."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from cellstate._version import __version__
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
from cellstate.configuration_state import StateConfig
from cellstate.modeling_additive import AdditiveForPerturbation
from cellstate.modeling_context_mean import ContextMeanForPerturbation
from cellstate.modeling_cpa import CPAForPerturbation
from cellstate.modeling_decoder_only import DecoderOnlyForPerturbation
from cellstate.modeling_embed_sum import EmbedSumForPerturbation
from cellstate.modeling_linear import LinearForPerturbation
from cellstate.modeling_neural_ot import NeuralOTForPerturbation
from cellstate.modeling_perturbation import PerturbationOutput, PerturbationPreTrainedModel
from cellstate.modeling_perturbation_mean import PerturbationMeanForPerturbation
from cellstate.modeling_pseudobulk import PseudobulkForPerturbation
from cellstate.modeling_scgpt import ScGPTForPerturbation
from cellstate.modeling_scvi import SCVIForPerturbation
from cellstate.modeling_state import StateForPerturbation
from cellstate.processing import StateProcessor


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
