"""Configuration of the sum of a cell's and a perturbation's encoding."""

from typing import ClassVar

from ...base.configuration_perturbation import EncoderConfig, strict_config


@strict_config
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


__all__ = ["EmbedSumConfig"]
