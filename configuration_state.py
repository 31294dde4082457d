"""Configuration of the State transition model."""

from typing import ClassVar, Literal

from .base.configuration_perturbation import SetTransformerConfig, strict_config


@strict_config
class StateConfig(SetTransformerConfig):
    r"""
    Configuration of the State transition model, [`StateForPerturbation`]. The fields of [`SetTransformerConfig`], and
    the following; names in brackets are those of published checkpoints.

    Args:
        basal_encoder (`str`, *optional*, defaults to `"linear"`) [use_basal_projection]:
            How a control cell is encoded.

            - `"linear"`: one linear layer
            - `"mlp"`: `num_encoder_layers` layers
        attention (`str`, *optional*, defaults to `"bidirectional"`) [bidirectional_attention, mask_attn]:
            Which cells a cell sees.

            - `"bidirectional"`: all cells of its sentence: the model is a function of sets
            - `"causal"`: itself and the cells before it; only to run checkpoints that were trained so
            - `"none"`: itself alone, the ablation
        positions (`str`, *optional*, defaults to `"none"`):
            Position information.

            - `"none"`: none, cells of a sentence have no order
            - `"rope"`: rotary positions; only to run checkpoints that were trained so
        residual (`str`, *optional*, defaults to `"output"`) [predict_residual]:
            What the output head's result is added to. T: backbone output, e_c: encoded control cell, x: control cell.

            - `"none"`: nothing, `MLP(T)`
            - `"hidden"`: the encoded cell before the head, `MLP(T + e_c)`, as published checkpoints do
            - `"output"`: the control cell after it, `MLP(T) + x`: a new model predicts exactly "no change"
            - `"anchor"`: after it, the control cell as the training means change it, `MLP(T) + anchor(x)`, see [`Anchor`]: a
              new model predicts exactly what a simple baseline does
        output_adapter (`bool`, *optional*, defaults to False) [output_space "all"]:
            Pass the result (published: with `residual="output"`) through a bottleneck of width `output_dim // 8`.
        batch_encoder (`bool`, *optional*, defaults to False):
            Add a learned embedding of each cell's experimental batch.
        batch_token (`bool`, *optional*, defaults to False) [use_batch_token]:
            Put a learned token before the cells and classify the batch from it.
        confidence_token (`bool`, *optional*, defaults to False):
            Put a learned token after the cells and predict the sentence's loss from it.
        l1_weight (`float`, *optional*, defaults to 0.0) [regularization]:
            Weight of the mean absolute change from control to prediction.
        confidence_weight (`float`, *optional*, defaults to 0.01):
            Weight of the confidence head's squared error.
        confidence_target_scale (`float`, *optional*, defaults to 10.0):
            The confidence head predicts this times the sentence's loss.
        batch_token_weight (`float`, *optional*, defaults to 0.1):
            Weight of the batch classification.

    Example:
    ```python
    >>> config = StateConfig.from_preset("tiny", input_dim=2000, num_perturbations=25)
    >>> config.hidden_size
    64
    ```
    """

    model_type = "state"
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
        "mini": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "set_size": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
        },
        "small": {
            "hidden_size": 672,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "head_dim": 84,
            "intermediate_size": 2688,
            "set_size": 128,
        },
        "base": {
            "hidden_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "head_dim": 64,
            "intermediate_size": 3072,
            "set_size": 512,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
        },
        "large": {
            "hidden_size": 1488,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "head_dim": 124,
            "intermediate_size": 5952,
            "set_size": 512,
        },
        "gpt2": {
            "backbone": "gpt2",
            "hidden_size": 328,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "set_size": 512,
        },
    }

    training_fields: ClassVar[tuple[str, ...]] = (
        *SetTransformerConfig.training_fields,
        "l1_weight",
        "confidence_weight",
        "confidence_target_scale",
        "batch_token_weight",
    )

    basal_encoder: Literal["linear", "mlp"] = "linear"
    attention: Literal["bidirectional", "causal", "none"] = "bidirectional"
    positions: Literal["none", "rope"] = "none"
    residual: Literal["none", "hidden", "output", "anchor"] = "output"
    output_adapter: bool = False
    batch_encoder: bool = False
    batch_token: bool = False
    confidence_token: bool = False
    l1_weight: float | int = 0.0
    confidence_weight: float | int = 0.01
    confidence_target_scale: float | int = 10.0
    batch_token_weight: float | int = 0.1

    @property
    def embeds_batches(self) -> bool:
        return self.batch_encoder or self.batch_token

    def validate_state(self):
        for name in ("l1_weight", "confidence_weight", "confidence_target_scale", "batch_token_weight"):
            self._check_range(name, 0)
        same = self.input_dim == self.output_dim
        for option, active in (
            (f"residual={self.residual!r}", self.residual in ("output", "anchor")),
            ("l1_weight > 0", self.l1_weight > 0),
        ):
            if active and not same:
                raise ValueError(
                    f"{option} adds to or compares with the control cell and needs output_dim == input_dim, found "
                    f"{self.output_dim} and {self.input_dim}; use residual='hidden' without an adapter and L1 instead"
                )
        if self.output_adapter and self.output_dim < 8:
            raise ValueError(f"output_adapter needs output_dim of at least 8, found {self.output_dim}")
        for option in ("batch_encoder", "batch_token"):
            if getattr(self, option) and self.num_batches is None:
                raise ValueError(f"{option}=True needs num_batches, found None")
        for option in ("batch_token", "confidence_token"):
            if getattr(self, option) and self.attention == "none":
                raise ValueError(f"{option}=True contradicts attention='none': the token would see no cell")
        if self.batch_token and self.attention == "causal":
            raise ValueError("batch_token=True contradicts attention='causal': the token stands first and sees no cell")
        if self.positions == "rope" and self.backbone == "gpt2":
            raise ValueError("positions='rope' exists for backbone='llama' alone; use positions='none' with gpt2")
        if self.positions == "rope" and self.attention == "none":
            raise ValueError("positions='rope' has no effect with attention='none': use positions='none'")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"positions='rope' needs an even head_dim, found {self.head_dim}")


__all__ = ["StateConfig"]
