"""The config of families whose weights are fitted in one pass over the training cells, without gradients."""

from typing import ClassVar

from .configuration_perturbation import PerturbationConfig, strict_config


@strict_config
class FittedConfig(PerturbationConfig):
    r"""
    The config of families whose weights are fitted in one pass over the training cells, without gradients. The fields of
    [`PerturbationConfig`]. These families predict the features that they read, so they have no gene decoder.
    """

    presets: ClassVar[dict[str, dict]] = {"tiny": {"set_size": 32}, "published": {}}

    def validate_fitted(self):
        if self.gene_dim is not None:
            raise ValueError(
                f"gene_dim={self.gene_dim}: {self.model_type} predicts the features that it reads and has no gene "
                "decoder; leave gene_input out, or read expression itself"
            )
        if self.output_dim != self.input_dim:
            raise ValueError(
                f"{self.model_type} predicts the features that it reads: expected output_dim={self.input_dim}, found "
                f"{self.output_dim}; leave it out"
            )


@strict_config
class MeasuredConfig(FittedConfig):
    r"""
    The config of fitted families with a row for each perturbation and each combination that was measured. The fields of
    [`FittedConfig`], and two that fitting sets:

    Args:
        num_entries (`int`, *optional*, defaults to 1):
            Perturbations and combinations with a row of their own, the control counted.
        entry_width (`int`, *optional*, defaults to 1):
            Perturbations in the largest of these combinations, where perturbations are given by id.
    """

    num_entries: int = 1
    entry_width: int = 1

    def validate_measured(self):
        self._check_at_least(1, "num_entries", "entry_width")


__all__ = ["FittedConfig", "MeasuredConfig"]
