"""Configuration of the perturbation mean."""

from ...base.configuration_fitted import FittedConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class PerturbationMeanConfig(FittedConfig):
    r"""
    Configuration of [`PerturbationMeanForPerturbation`], each control cell plus the mean change of its perturbation. The
    fields of [`FittedConfig`], and two that fitting sets:

    Args:
        num_entries (`int`, *optional*, defaults to 1):
            Perturbations and combinations with a change of their own, the control counted.
        entry_width (`int`, *optional*, defaults to 1):
            Perturbations in the largest of these combinations, where perturbations are given by id.
    """

    model_type = "state-perturbation-mean"

    num_entries: int = 1
    entry_width: int = 1

    def validate_perturbation_mean(self):
        self._check_at_least(1, "num_entries", "entry_width")


__all__ = ["PerturbationMeanConfig"]
