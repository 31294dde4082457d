"""Configuration of the ceiling of a gene decoder."""

from typing import ClassVar

from ...base.configuration_perturbation import GeneDecoderConfig, strict_config


@strict_config
class DecoderOnlyConfig(GeneDecoderConfig):
    r"""
    Configuration of [`DecoderOnlyForPerturbation`], which decodes the *observed* embeddings of perturbed cells: the
    ceiling of what a model with such a gene decoder can reach, not a predictor. The fields of [`GeneDecoderConfig`]
    that concern the decoder; `gene_dim` is required.
    """

    model_type = "state-decoder-only"
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"decoder_hidden_sizes": [64, 64], "set_size": 32},
        "published": {},
    }


__all__ = ["DecoderOnlyConfig"]
