"""Configuration of the pseudobulk transformer."""

from typing import ClassVar, Literal

from ...base.configuration_perturbation import SetTransformerConfig, strict_config


@strict_config
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

    batch_encoder: bool = False
    residual: Literal["none", "hidden"] = "hidden"
    decoder_weight: float | int = 0.1

    @property
    def embeds_batches(self) -> bool:
        return self.batch_encoder

    def validate_pseudobulk(self):
        if self.batch_encoder and self.num_batches is None:
            raise ValueError("batch_encoder=True needs num_batches, found None")


__all__ = ["PseudobulkConfig"]
