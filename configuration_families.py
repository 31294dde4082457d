"""Configurations of the families beside the State transition model."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_state import (
    EncoderConfig,
    GeneDecoderConfig,
    NetworkConfig,
    PerturbationConfig,
    SetTransformerConfig,
)


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


@strict
class FittedConfig(PerturbationConfig):
    r"""
    What the families share that are fitted in one pass over the training cells, without gradients. The fields of
    [`PerturbationConfig`]; they predict the features that they read, so there is no gene decoder.
    """

    presets: ClassVar[dict[str, dict]] = {"tiny": {"set_size": 32}, "published": {}}

    def _check(self):
        super()._check()
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


@strict
class PerturbationMeanConfig(FittedConfig):
    r"""
    Configuration of [`PerturbationMeanForPerturbation`], each control cell plus the mean change of its perturbation. The
    fields of [`FittedConfig`], and two that fitting sets:

    Args:
        num_entries (`int`, *optional*, defaults to 1):
            Perturbations and combinations with a change of their own, the control counted.
        entry_width (`int`, *optional*, defaults to 1):
            Perturbations of the largest of these combinations, where perturbations are told by id.
    """

    model_type = "state-perturbation-mean"

    num_entries: int = 1
    entry_width: int = 1

    def _check(self):
        super()._check()
        self._check_at_least(1, "num_entries", "entry_width")


@strict
class ContextMeanConfig(FittedConfig):
    r"""
    Configuration of [`ContextMeanForPerturbation`], the mean perturbed cell of a context. The fields of
    [`FittedConfig`]; `num_contexts` is required to build a model.
    """

    model_type = "state-context-mean"


@strict
class LinearConfig(FittedConfig):
    r"""
    Configuration of [`LinearForPerturbation`], ridge regression of the mean change on the perturbation. The fields of
    [`FittedConfig`], and:

    Args:
        ridge (`float`, *optional*, defaults to 0.1):
            Weight of the squared weights beside the squared errors, above 0. The default is that of Ahlmann-Eltze, Huber
            & Anders (2025); features should have a variance near 1.
        rank (`int`, *optional*):
            Regress on this many principal components of the mean changes instead of on all features.
        intercept (`bool`, *optional*, defaults to False):
            Add a change that every perturbation shares, which is not shrunk. Of use with perturbation features, where a
            perturbation like no other then changes what the average one does; without it effects that are applied
            together add up, and an unknown perturbation id changes nothing.
    """

    model_type = "state-linear"

    ridge: float | int = 0.1
    rank: int | None = None
    intercept: bool = False

    def _check(self):
        super()._check()
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, found {self.ridge}")
        if self.rank is not None and not 1 <= self.rank <= self.output_dim:
            raise ValueError(f"rank must lie between 1 and output_dim={self.output_dim}, found {self.rank}")


@strict
class AdditiveConfig(FittedConfig):
    r"""
    Configuration of [`AdditiveForPerturbation`], each control cell plus the changes of the single perturbations. The
    fields of [`FittedConfig`]; perturbations are told by id.
    """

    model_type = "state-additive"

    def _check(self):
        super()._check()
        if self.perturbation_dim is not None:
            raise ValueError(
                "state-additive adds up the changes of perturbations that are told by id, found perturbation_dim="
                f"{self.perturbation_dim}; leave perturbation_features out, or use state-linear, which adds up their effects"
            )


@strict
class SCVIConfig(NetworkConfig):
    r"""
    Configuration of [`SCVIForPerturbation`], a conditional variational autoencoder on counts. The fields of
    [`NetworkConfig`], with the published sizes as defaults, and:

    Args:
        latent_dim (`int`, *optional*, defaults to 84):
            Width of the latent state of a cell.
        num_encoder_layers, num_decoder_layers (`int`, *optional*, defaults to 2):
            Hidden layers of encoder and decoder: linear, batch normalisation, activation, in the encoder dropout.
        context_embedding_dim (`int`, *optional*, defaults to 32), batch_embedding_dim (`int`, *optional*, defaults to 16),
        perturbation_embedding_dim (`int`, *optional*, defaults to 64):
            Widths of what the decoder is told beside the latent state.
        likelihood (`str`, *optional*, defaults to `"zinb"`):
            Distribution of a count.

            - `"nb"`: negative binomial, with one inverse dispersion for each gene
            - `"zinb"`: the same, with additional zeros
        prediction (`str`, *optional*, defaults to `"mean_log1p"`):
            What `predictions` are, of the distribution of counts of a cell with as many counts as the control cell.

            - `"mean_log1p"`: the mean of its log1p expression, what the mean of observed cells estimates
            - `"log1p_mean"`: log1p of its mean expression, as published. Above the former, most where counts are few:
              figures of observed log1p cells are then far from its own
        library_size (`float`, *optional*, defaults to 10,000):
            Counts of a cell, over the model's genes, that expression is scaled to before log1p. None: it is not scaled.
        kl_warmup_epochs (`float`, *optional*, defaults to 400), kl_warmup_steps (`int`, *optional*):
            The KL divergence's weight rises from 0 to 1 in so many epochs, or optimiser steps; one of them is set. 0: it
            is 1 throughout.

    Example:
    ```python
    >>> SCVIConfig.from_preset("published", input_dim=2000, num_perturbations=25).kl_warmup_epochs
    400
    ```
    """

    model_type = "state-scvi"
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "likelihood": ("nb", "zinb"),
        "prediction": ("mean_log1p", "log1p_mean"),
    }
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"hidden_size": 64, "latent_dim": 10, "set_size": 32},
        "published": {},
    }
    training_defaults: ClassVar[dict] = {
        "learning_rate": 5e-4,
        "weight_decay": 4e-7,
        "lr_decay_epochs": 25,
        "lr_decay_factor": 0.9,
    }

    hidden_size: int = 512
    hidden_act: str = "relu"
    latent_dim: int = 84
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    context_embedding_dim: int = 32
    batch_embedding_dim: int = 16
    perturbation_embedding_dim: int = 64
    likelihood: str = "zinb"
    prediction: str = "mean_log1p"
    library_size: float | int | None = 10_000
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

    @property
    def reads_counts(self) -> bool:
        return True

    def _check(self):
        super()._check()
        self._check_at_least(1, "latent_dim", "num_encoder_layers", "num_decoder_layers")
        self._check_at_least(1, "context_embedding_dim", "batch_embedding_dim", "perturbation_embedding_dim")
        if self.library_size is not None and not 0 < self.library_size < float("inf"):
            raise ValueError(f"library_size must be a number above 0, or None, found {self.library_size}")
        if self.kl_warmup_epochs is not None and self.kl_warmup_steps is not None:
            raise ValueError(
                f"set one of kl_warmup_epochs and kl_warmup_steps, found {self.kl_warmup_epochs} and {self.kl_warmup_steps}"
            )
        self._check_range("kl_warmup_epochs" if self.kl_warmup_steps is None else "kl_warmup_steps", 0)
        if self.output_dim != self.input_dim or self.gene_dim is not None or not self.nonnegative_output:
            raise ValueError(
                "this model reads counts of genes and predicts log1p expression of the same genes: expected output_dim == "
                f"input_dim, no gene_dim and nonnegative_output, found output_dim={self.output_dim}, input_dim="
                f"{self.input_dim}, gene_dim={self.gene_dim}, nonnegative_output={self.nonnegative_output}; leave them out"
            )


for _config in (
    EmbedSumConfig,
    NeuralOTConfig,
    PseudobulkConfig,
    DecoderOnlyConfig,
    PerturbationMeanConfig,
    ContextMeanConfig,
    LinearConfig,
    AdditiveConfig,
    SCVIConfig,
):
    _config.register_for_auto_class()

__all__ = [
    "AdditiveConfig",
    "ContextMeanConfig",
    "DecoderOnlyConfig",
    "EmbedSumConfig",
    "FittedConfig",
    "LinearConfig",
    "NeuralOTConfig",
    "PerturbationMeanConfig",
    "PseudobulkConfig",
    "SCVIConfig",
]
