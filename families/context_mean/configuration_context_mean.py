"""Configuration of the context mean."""

from ...base.configuration_fitted import FittedConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class ContextMeanConfig(FittedConfig):
    r"""
    Configuration of [`ContextMeanForPerturbation`], the mean perturbed cell of a context. The fields of
    [`FittedConfig`]; `num_contexts` is required to build a model.
    """

    model_type = "state-context-mean"


__all__ = ["ContextMeanConfig"]
