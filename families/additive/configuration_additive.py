"""Configuration of the additive model."""

from ...base.configuration_fitted import FittedConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class AdditiveConfig(FittedConfig):
    r"""
    Configuration of [`AdditiveForPerturbation`], each control cell plus the changes of the single perturbations. The
    fields of [`FittedConfig`]; perturbations are given by id.
    """

    model_type = "state-additive"

    def validate_additive(self):
        if self.perturbation_dim is not None:
            raise ValueError(
                "state-additive adds up the changes of perturbations that are given by id, found perturbation_dim="
                f"{self.perturbation_dim}; leave perturbation_features out, or use state-linear, which adds up their effects"
            )


__all__ = ["AdditiveConfig"]
