"""Configuration of ridge regression."""

from ...base.configuration_fitted import FittedConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class LinearConfig(FittedConfig):
    r"""
    Configuration of [`LinearForPerturbation`], ridge regression of the mean change on the perturbation. The fields of
    [`FittedConfig`], and:

    Args:
        ridge (`float`, *optional*, defaults to 0.1):
            Weight of the squared weights beside the squared errors, above 0. The default is that of Ahlmann-Eltze, Huber
            & Anders (2025); features should have a variance near 1.
        rank (`int`, *optional*):
            Regress on this many principal components of the mean changes instead of on all features.
        intercept (`bool`, *optional*, defaults to False):
            Add a change that all perturbations share, which is not shrunk. It helps with perturbation features: a
            perturbation unlike all others then changes what the average one does. Without it the effects of perturbations
            applied together add up, and an unknown perturbation id changes nothing.
    """

    model_type = "state-linear"

    ridge: float | int = 0.1
    rank: int | None = None
    intercept: bool = False

    def validate_linear(self):
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, found {self.ridge}")
        if self.rank is not None and not 1 <= self.rank <= self.output_dim:
            raise ValueError(f"rank must lie between 1 and output_dim={self.output_dim}, found {self.rank}")


__all__ = ["LinearConfig"]
