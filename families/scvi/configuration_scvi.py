"""Configuration of the conditional variational autoencoder on counts."""

from typing import ClassVar, Literal

from ...base.configuration_counts import CountsConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class SCVIConfig(CountsConfig):
    r"""
    Configuration of [`SCVIForPerturbation`], a conditional variational autoencoder on counts. The fields of
    [`CountsConfig`], with the published sizes as defaults, and:

    Args:
        latent_dim (`int`, *optional*, defaults to 84):
            Width of the latent state of a cell.
        num_encoder_layers, num_decoder_layers (`int`, *optional*, defaults to 2):
            Hidden layers of encoder and decoder: linear, batch normalisation, activation, in the encoder dropout.
        context_embedding_dim (`int`, *optional*, defaults to 32), batch_embedding_dim (`int`, *optional*, defaults to 16),
        perturbation_embedding_dim (`int`, *optional*, defaults to 64):
            Widths of the embeddings that the decoder reads beside the latent state.
        kl_warmup_epochs (`float`, *optional*, defaults to 400), kl_warmup_steps (`int`, *optional*):
            Epochs, or optimiser steps, in which the weight of the KL divergence rises from 0 to 1. Set one of them. 0: the
            weight is 1 throughout.

    Example:
    ```python
    >>> SCVIConfig.from_preset("published", input_dim=2000, num_perturbations=25).kl_warmup_epochs
    400
    ```
    """

    model_type = "state-scvi"
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"hidden_size": 64, "latent_dim": 10, "set_size": 32},
        "published": {},
    }
    training_fields: ClassVar[tuple[str, ...]] = (*CountsConfig.training_fields, "kl_warmup_epochs", "kl_warmup_steps")
    training_defaults: ClassVar[dict] = {
        "learning_rate": 5e-4,
        "weight_decay": 4e-7,
        "l2_weight_decay": True,
        "lr_decay_epochs": 25,
    }

    hidden_size: int = 512
    hidden_act: str = "relu"
    likelihood: Literal["nb", "zinb"] = "zinb"
    latent_dim: int = 84
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    context_embedding_dim: int = 32
    batch_embedding_dim: int = 16
    perturbation_embedding_dim: int = 64
    kl_warmup_epochs: float | int | None = None
    kl_warmup_steps: int | None = None

    def __post_init__(self, **kwargs):
        if self.kl_warmup_epochs is None and self.kl_warmup_steps is None:
            self.kl_warmup_epochs = 400
        super().__post_init__(**kwargs)

    @classmethod
    def sizes(cls, processor) -> dict:
        processor.check_counts()
        return super().sizes(processor)

    def validate_scvi(self):
        self._check_at_least(1, "latent_dim", "num_encoder_layers", "num_decoder_layers")
        self._check_at_least(1, "context_embedding_dim", "batch_embedding_dim", "perturbation_embedding_dim")
        if self.kl_warmup_epochs is not None and self.kl_warmup_steps is not None:
            raise ValueError(
                f"set one of kl_warmup_epochs and kl_warmup_steps, found {self.kl_warmup_epochs} and {self.kl_warmup_steps}"
            )
        self._check_range("kl_warmup_epochs" if self.kl_warmup_steps is None else "kl_warmup_steps", 0)


__all__ = ["SCVIConfig"]
