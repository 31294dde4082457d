"""Models of how cells respond to perturbations, trained, shared and loaded the Hugging Face way."""

from transformers import AutoConfig, AutoModel

from cellstate._version import __version__
from cellstate.configuration_state import StateConfig
from cellstate.modeling_perturbation import PerturbationOutput
from cellstate.modeling_state import StateForPerturbation


AutoConfig.register(StateConfig.model_type, StateConfig)
AutoModel.register(StateConfig, StateForPerturbation)

__all__ = ["PerturbationOutput", "StateConfig", "StateForPerturbation", "__version__"]
