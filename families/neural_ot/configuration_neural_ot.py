"""Configuration of neural optimal transport."""

from typing import ClassVar, Literal

from ...base.configuration_perturbation import SetTransformerConfig, strict_config


@strict_config
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

    residual: Literal["none", "hidden"] = "hidden"


__all__ = ["NeuralOTConfig"]
