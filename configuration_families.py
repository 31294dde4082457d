"""Configurations of the families beside the State transition model."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_state import EncoderConfig, GeneDecoderConfig, SetTransformerConfig


@strict
class EmbedSumConfig(EncoderConfig):
    r"""
    Configuration of [`EmbedSumForPerturbation`], the sum of a cell's and a perturbation's encoding, read by an MLP. The
    fields of [`EncoderConfig`], with the published sizes as defaults.

    Example:
    ```python
    >>> EmbedSumConfig.from_preset("published", input_dim=2000, num_perturbations=25).hidden_size
    512
    ```
    """

    model_type = "state-embed-sum"
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "set_size": 32},
        "published": {},
    }

    hidden_size: int = 512
    hidden_dropout: float | int = 0.0
    num_encoder_layers: int = 3
    num_decoder_layers: int = 3


_RESIDUAL = {"residual": ("none", "hidden")}


@strict
class NeuralOTConfig(SetTransformerConfig):
    r"""
    Configuration of [`NeuralOTForPerturbation`], a transformer over three tokens of one cell: the perturbation, the
    control cell and an empty one that becomes the prediction. The fields of [`SetTransformerConfig`], and:

    Args:
        residual (`str`, *optional*, defaults to `"hidden"`) [predict_residual]:
            What the third token is added to before the output head.

            - `"none"`: nothing
            - `"hidden"`: the encoded control cell
    """

    model_type = "state-neural-ot"
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {**SetTransformerConfig._choices, **_RESIDUAL}
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "set_size": 32,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
        },
        "published": {},
    }

    residual: str = "hidden"


@strict
class PseudobulkConfig(SetTransformerConfig):
    r"""
    Configuration of [`PseudobulkForPerturbation`], a transformer over one token, the mean of the encoded cells of a
    sentence, whose output every cell is given. The fields of [`SetTransformerConfig`], and:

    Args:
        batch_encoder (`bool`, *optional*, defaults to False):
            Add an encoding (an MLP of `num_encoder_layers`) of each cell's experimental batch.
        residual (`str`, *optional*, defaults to `"hidden"`) [predict_residual]:
            What the token is added to before the output head.

            - `"none"`: nothing: all cells of a sentence are predicted alike
            - `"hidden"`: the encoded control cell
    """

    model_type = "state-pseudobulk"
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {**SetTransformerConfig._choices, **_RESIDUAL}
    presets: ClassVar[dict[str, dict]] = NeuralOTConfig.presets

    batch_encoder: bool = False
    residual: str = "hidden"
    decoder_weight: float | int = 0.1

    @property
    def embeds_batches(self) -> bool:
        return self.batch_encoder

    def _check(self):
        super()._check()
        if self.batch_encoder and self.num_batches is None:
            raise ValueError("batch_encoder=True needs num_batches, found None")


@strict
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


for _config in (EmbedSumConfig, NeuralOTConfig, PseudobulkConfig, DecoderOnlyConfig):
    _config.register_for_auto_class()

__all__ = ["DecoderOnlyConfig", "EmbedSumConfig", "NeuralOTConfig", "PseudobulkConfig"]
