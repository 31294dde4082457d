"""Models of how cells respond to perturbations, trained, shared and loaded the Hugging Face way."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from cellstate._version import __version__
from cellstate.configuration_state import StateConfig
from cellstate.modeling_perturbation import PerturbationOutput
from cellstate.modeling_state import StateForPerturbation
from cellstate.processing import StateProcessor


AutoConfig.register(StateConfig.model_type, StateConfig)
AutoModel.register(StateConfig, StateForPerturbation)
AutoProcessor.register(StateConfig, StateProcessor)

__all__ = ["PerturbationOutput", "StateConfig", "StateForPerturbation", "StateProcessor", "__version__"]
