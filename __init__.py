"""
Models of how cells respond to perturbations, trained, shared and loaded the Hugging Face way.

Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pertstate._version import __version__ as __version__
from pertstate.families import FAMILIES as FAMILIES
from pertstate.families import auto_classes, public_classes
from pertstate.families import objective_for as objective_for


# Public name to the module that has it.
_PLACES: dict[str, str] = {
    **dict(public_classes()),
    "PerturbationFeatures": "pertstate.base.vocabulary",
    "PerturbationOutput": "pertstate.base.modeling_perturbation",
    "SentenceDataset": "pertstate.data.sentences",
    "Splits": "pertstate.data.splits",
    "StateProcessor": "pertstate.processing",
    "StateTrainer": "pertstate.training.trainer",
    "StateTrainingArguments": "pertstate.training.arguments",
    "TrainedModel": "pertstate.hub.trained",
    "evaluate": "pertstate.evaluation.comparison",
    "fit": "pertstate.training.fit",
    "load": "pertstate.hub.trained",
    "predict": "pertstate.evaluation.prediction",
}

if TYPE_CHECKING:
    # The same names once more, for checkers and editors, which do not run `__getattr__`.
    from pertstate.base.modeling_perturbation import PerturbationOutput as PerturbationOutput
    from pertstate.base.vocabulary import PerturbationFeatures as PerturbationFeatures
    from pertstate.configuration_state import StateConfig as StateConfig
    from pertstate.data.sentences import SentenceDataset as SentenceDataset
    from pertstate.data.splits import Splits as Splits
    from pertstate.evaluation.comparison import evaluate as evaluate
    from pertstate.evaluation.prediction import predict as predict
    from pertstate.families.additive.configuration_additive import AdditiveConfig as AdditiveConfig
    from pertstate.families.additive.modeling_additive import AdditiveForPerturbation as AdditiveForPerturbation
    from pertstate.families.context_mean.configuration_context_mean import ContextMeanConfig as ContextMeanConfig
    from pertstate.families.context_mean.modeling_context_mean import (
        ContextMeanForPerturbation as ContextMeanForPerturbation,
    )
    from pertstate.families.cpa.configuration_cpa import CPAConfig as CPAConfig
    from pertstate.families.cpa.modeling_cpa import CPAForPerturbation as CPAForPerturbation
    from pertstate.families.decoder_only.configuration_decoder_only import DecoderOnlyConfig as DecoderOnlyConfig
    from pertstate.families.decoder_only.modeling_decoder_only import (
        DecoderOnlyForPerturbation as DecoderOnlyForPerturbation,
    )
    from pertstate.families.embed_sum.configuration_embed_sum import EmbedSumConfig as EmbedSumConfig
    from pertstate.families.embed_sum.modeling_embed_sum import EmbedSumForPerturbation as EmbedSumForPerturbation
    from pertstate.families.linear.configuration_linear import LinearConfig as LinearConfig
    from pertstate.families.linear.modeling_linear import LinearForPerturbation as LinearForPerturbation
    from pertstate.families.log_fold_change.configuration_log_fold_change import (
        LogFoldChangeConfig as LogFoldChangeConfig,
    )
    from pertstate.families.log_fold_change.modeling_log_fold_change import (
        LogFoldChangeForPerturbation as LogFoldChangeForPerturbation,
    )
    from pertstate.families.neural_ot.configuration_neural_ot import NeuralOTConfig as NeuralOTConfig
    from pertstate.families.neural_ot.modeling_neural_ot import NeuralOTForPerturbation as NeuralOTForPerturbation
    from pertstate.families.perturbation_mean.configuration_perturbation_mean import (
        PerturbationMeanConfig as PerturbationMeanConfig,
    )
    from pertstate.families.perturbation_mean.modeling_perturbation_mean import (
        PerturbationMeanForPerturbation as PerturbationMeanForPerturbation,
    )
    from pertstate.families.pseudobulk.configuration_pseudobulk import PseudobulkConfig as PseudobulkConfig
    from pertstate.families.pseudobulk.modeling_pseudobulk import PseudobulkForPerturbation as PseudobulkForPerturbation
    from pertstate.families.scgpt.configuration_scgpt import ScGPTConfig as ScGPTConfig
    from pertstate.families.scgpt.modeling_scgpt import ScGPTForPerturbation as ScGPTForPerturbation
    from pertstate.families.scvi.configuration_scvi import SCVIConfig as SCVIConfig
    from pertstate.families.scvi.modeling_scvi import SCVIForPerturbation as SCVIForPerturbation
    from pertstate.hub.trained import TrainedModel as TrainedModel
    from pertstate.hub.trained import load as load
    from pertstate.modeling_state import StateForPerturbation as StateForPerturbation
    from pertstate.processing import StateProcessor as StateProcessor
    from pertstate.training.arguments import StateTrainingArguments as StateTrainingArguments
    from pertstate.training.fit import fit as fit
    from pertstate.training.trainer import StateTrainer as StateTrainer
else:
    __all__ = ["FAMILIES", "__version__", "objective_for", *_PLACES]

    def __getattr__(name: str):
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_PLACES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


auto_classes.register()
