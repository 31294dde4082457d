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


__all__ = ["FittedConfig"]
