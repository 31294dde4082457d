"""Configuration of the perturbation mean."""

from ...base.configuration_fitted import MeasuredConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class PerturbationMeanConfig(MeasuredConfig):
    r"""
    Configuration of [`PerturbationMeanForPerturbation`], each control cell plus the mean change of its perturbation. The
    fields of [`MeasuredConfig`].
    """

    model_type = "state-perturbation-mean"


__all__ = ["PerturbationMeanConfig"]
