"""Configs that families share: one of all models, and those of networks, gene decoders, encoders and set transformers."""

import json
import re
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .constants import TASK
from .finite import within_reach
from .messages import closest, nearest
from .public import public
from .travelling import Travelling, is_installed


# Kinds of the numbers of a model.
_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Keywords that transformers itself hands to a config when it loads or saves one.
_LIBRARY_KEYWORDS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "processor_class",
        "torch_dtype",
        "use_cache",
    }
)


# What a checkpoint says of the pipeline that travels with it.
PIPELINES = {
    TASK: {"impl": "pipeline_perturbation.PerturbationPredictionPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}

_Config = TypeVar("_Config", bound=PreTrainedConfig)


def strict_config(config_class: type[_Config]) -> type[_Config]:
    """
    [`strict`] for a config. The type of a field, or its `Literal` options, is checked whenever the field is set; the
    `validate_..` methods run once all fields are set. An error is a ValueError of one line, which names the nearest option.
    """
    # `strict` adds attributes that a checker cannot see.
    cls: Any = strict(config_class)
    # What all configs share is checked first: a family's own checks rely on it.
    lineage = [base.__name__ for base in reversed(cls.__mro__)]
    cls.__class_validators__.sort(key=lambda validator: lineage.index(validator.__qualname__.partition(".")[0]))
    set_field, validate = cls.__setattr__, cls.validate

    @wraps(set_field)
    def set_checked(self, name, value):
        try:
            set_field(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(_wrong_value(cls, name, value)) from error

    @wraps(validate)
    def validate_all(self):
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            raise error.__cause__ from None

    cls.__setattr__, cls.validate = set_checked, validate_all
    return cls


def _wrong_value(cls, name: str, value) -> str:
    kind = next(field.type for field in fields(cls) if field.name == name)
    if get_origin(kind) is Literal:
        options = get_args(kind)
        near = nearest(value, options)
        return f"{name}={value!r} is not an option of {cls.__name__}: expected one of {list(options)}" + (
            f"; {near}" if near else ""
        )
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    return f"{name}: expected {expected}, found {value!r} ({type(value).__name__}); correct it in {cls.__name__}"


@strict_config
class PerturbationConfig(Travelling, PreTrainedConfig):
    r"""
    What every perturbation model is told about its data. Names in brackets are those of published checkpoints.

    Args:
        input_dim (`int`, *optional*, defaults to 2000):
            Features of a control cell: genes (log1p expression) or dimensions of an embedding.
        output_dim (`int`, *optional*, defaults to `input_dim`):
            Features of a predicted cell.
        num_perturbations (`int`, *optional*) [pert_dim]:
            Perturbations in the vocabulary, the control not counted: the model takes `perturbation_ids`
            (or one-hot/multi-hot `perturbation_features` of this width).
        perturbation_dim (`int`, *optional*):
            Width of a perturbation's feature vector where features (ESM2, fingerprints) are given instead of ids.
            Exactly one of `num_perturbations` and `perturbation_dim` must be set to build a model.
        num_contexts (`int`, *optional*):
            Contexts (cell types or lines) in the vocabulary. The State model reads the context from the control
            cells themselves; families with a context embedding size it by this.
        num_batches (`int`, *optional*) [batch_dim]:
            Experimental batches in the vocabulary.
        gene_dim (`int`, *optional*):
            Genes that the gene decoder predicts. Set it where the model works on embeddings and should also predict
            expression; None builds no decoder.
        set_size (`int`, *optional*, defaults to 128) [cell_set_len]:
            Cells of one sentence in training and prediction. No weight depends on it: any other number works.
        nonnegative_output (`bool`, *optional*):
            Clamp predictions at 0. Right for expression, wrong for an embedding. Defaults to True exactly where
            `gene_dim` is None, that is where the model predicts expression itself; set it to False for a model on
            embeddings without a gene decoder.
    """

    model_type = "perturbation"
    loaded_by = "AutoConfig"
    # Named configurations of the family, by field.
    presets: ClassVar[dict[str, dict]] = {}
    # Fields of a preset that are computed anew when its `hidden_size` or number of heads is overridden.
    _derived: ClassVar[tuple[str, ...]] = ()
    # Fields that say how a model is trained or fed. They may change when a checkpoint is trained further.
    training_fields: ClassVar[tuple[str, ...]] = ("set_size",)
    # The family's own defaults of training arguments; a run may set others.
    training_defaults: ClassVar[dict] = {}

    input_dim: int = 2000
    if TYPE_CHECKING:
        # Never None once the config is made: `__post_init__` fills it in.
        output_dim: int = 2000
    else:
        output_dim: int | None = None
    num_perturbations: int | None = None
    perturbation_dim: int | None = None
    num_contexts: int | None = None
    num_batches: int | None = None
    gene_dim: int | None = None
    set_size: int = 128
    if TYPE_CHECKING:
        nonnegative_output: bool = True
    else:
        nonnegative_output: bool | None = None

    if TYPE_CHECKING:

        def validate(self) -> None:
            """Run all checks again, as `strict` does when the config is made. Raises ValueError."""

    def __post_init__(self, **kwargs):
        own = [f.name for f in fields(self)]
        for name in kwargs:
            if name not in _LIBRARY_KEYWORDS and not name.startswith("_"):
                raise ValueError(f"{type(self).__name__} has no field {name!r}; {closest(name, own)}")
        family = kwargs.get("model_type", self.model_type)
        if family != self.model_type:
            raise ValueError(
                f"model_type={family!r}: expected {self.model_type!r} for {type(self).__name__}; load the checkpoint "
                "with AutoConfig or AutoModel, or correct its config.json"
            )
        if self.output_dim is None:
            self.output_dim = self.input_dim
        if self.nonnegative_output is None:
            self.nonnegative_output = self.gene_dim is None
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As in [`PreTrainedConfig`].

        Raises:
            ValueError: `config.json` asks for labels, which no model here has, for numbers of a kind that none has, for outputs
                without names, or for code of a repository. Only a caller may ask for such code, with `attn_implementation=`.
        """
        config_dict = dict(config_dict)
        pipelines = config_dict.get("custom_pipelines", PIPELINES)
        if pipelines != PIPELINES:
            raise ValueError(
                f"custom_pipelines is {str(pipelines)[:200]!r}, expected {PIPELINES}: config.json may name no code of others; "
                "copy the checkpoint again"
            )
        if is_installed(cls.__module__):
            # The package has registered the pipeline; with this entry, transformers would run the folder's copy of it.
            config_dict.pop("custom_pipelines", None)
        labels = config_dict.get("num_labels")
        if labels is not None and not (type(labels) is int and 0 <= labels <= 2):
            raise ValueError(
                f"num_labels is {labels!r}: no model of this package has labels; leave it out of config.json"
            )
        named = config_dict.get("return_dict", True)
        if named is not True:
            raise ValueError(
                f"return_dict is {str(named)[:60]!r}: outputs of models of this package have names; leave it out of config.json"
            )
        for name in ("dtype", "torch_dtype"):
            # transformers takes any name of torch's.
            if (kind := config_dict.get(name)) is not None and str(kind).removeprefix("torch.") not in _DTYPES:
                raise ValueError(f"{name} is {str(kind)[:60]!r}: expected one of {list(_DTYPES)}; correct config.json")
        for name in ("attn_implementation", "_attn_implementation"):
            kernel = config_dict.get(name)
            if isinstance(kernel, dict) or (kernel is not None and not re.fullmatch(r"[a-z0-9_|]+", str(kernel))):
                raise ValueError(
                    f"{name} is {str(kernel)[:60]!r}: config.json may name no code of others; pass attn_implementation= where "
                    "you trust it"
                )
        return super().from_dict(config_dict, **kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """As in [`PreTrainedConfig`], but of a path on this machine only the last part is written."""
        content = json.loads(super().to_json_string(use_diff))
        return json.dumps(public(content), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "PerturbationConfig":
        """
        One of the family's named configurations (`presets`), with the given fields in place of its own.

        Raises:
            ValueError: the preset or a field is unknown (the error names the nearest one), or fields contradict.
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; {closest(name, cls.presets)}")
        values = {**cls.presets[name], **overrides}
        if "hidden_size" in overrides or "num_attention_heads" in overrides:
            # The preset's other widths belong to its own hidden size. Unless they are given too, they follow the given one.
            for derived in cls._derived:
                if derived not in overrides:
                    values.pop(derived, None)
        return cls(**values)

    @classmethod
    def sizes(cls, processor) -> dict:
        """The fields that follow from the data: the sizes of what a [`StateProcessor`] learned from the training cells."""
        vocabulary = processor.vocabulary
        sizes = {"input_dim": processor.feature_dim, "num_contexts": len(vocabulary.contexts)}
        if processor.perturbation_features is None:
            sizes["num_perturbations"] = len(vocabulary.perturbations)
        else:
            sizes["perturbation_dim"] = processor.perturbation_features.dim
        if vocabulary.batches:
            sizes["num_batches"] = len(vocabulary.batches)
        if processor.gene_input is not None:
            sizes["gene_dim"] = len(vocabulary.genes)
        return sizes

    def fields_of_vocabulary(self, vocabulary) -> dict:
        """The fields that hold positions in a [`Vocabulary`], for a model that is to have this one. Most families have none."""
        return {}

    @classmethod
    def fields_from_names(cls, processor, fields: dict) -> dict:
        """
        Further fields that follow from the data and from `fields`, the ones that a run sets. Most families have none.

        Raises:
            ValueError: the family cannot learn from such data.
        """
        return {}

    @property
    def perturbation_width(self) -> int:
        """
        Width of a perturbation as the model takes it: `num_perturbations`, or `perturbation_dim` of a model on features.

        Raises:
            ValueError: neither is set.
        """
        width = self.num_perturbations or self.perturbation_dim
        if width is None:
            raise ValueError(
                f"{type(self).__name__} needs num_perturbations (perturbations by id) or perturbation_dim (by features) "
                "to build a model, found neither"
            )
        return width

    def required_size(self, name: str) -> int:
        """
        The value of a field that may be None, where it must be set.

        Raises:
            ValueError: it is None.
        """
        size = getattr(self, name)
        if size is None:
            raise ValueError(f"{type(self).__name__} needs {name} to build this model, found None; set it")
        return size

    @property
    def embeds_batches(self) -> bool:
        """Whether the model has weights for each experimental batch, and so knows only the batches of its training cells."""
        return False

    @property
    def reads_counts(self) -> bool:
        """Whether the model reads raw counts and predicts log1p expression, scaled to its `library_size`."""
        return False

    def validate_sizes_of_data(self):
        positive = ("input_dim", "output_dim", "set_size")
        optional = ("num_perturbations", "perturbation_dim", "num_contexts", "num_batches", "gene_dim")
        self._check_at_least(1, *positive, *(name for name in optional if getattr(self, name) is not None))
        if self.num_perturbations is not None and self.perturbation_dim is not None:
            raise ValueError(
                f"num_perturbations={self.num_perturbations} (perturbations by id) and perturbation_dim="
                f"{self.perturbation_dim} (perturbations by features) contradict one another: set one of them"
            )

    def validate_numbers(self):
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not within_reach(abs(number)) and number != 0:
                    raise ValueError(
                        f"{field.name}: expected a number within float32's reach, found {value}; correct it"
                    )

    def _check_at_least(self, low: int, *names: str):
        for name in names:
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, found {getattr(self, name)}")

    def _check_range(self, name: str, low: float, high: float = float("inf"), upper_open: bool = False):
        value = getattr(self, name)
        if not low <= value <= high or (upper_open and value == high):
            raise ValueError(f"{name} must lie in [{low}, {high}{')' if upper_open else ']'}, found {value}")


@strict_config
class NetworkConfig(PerturbationConfig):
    r"""
    What the families that are neural networks share. The fields of [`PerturbationConfig`], and:

    Args:
        hidden_size (`int`, *optional*, defaults to 672) [hidden_dim]:
            Width of every hidden layer.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the encoders and heads, a name of `transformers.activations.ACT2FN`.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the encoders and heads.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that new weights are drawn from.
        perturbation_initializer_range (`float`, *optional*, defaults to 1.0):
            The same for the rows of perturbations: how large a perturbation is beside the cell at the start. With a large
            value a model soon tells perturbations apart, which helps with few perturbations in many contexts. With a
            small value the effects of perturbations applied together add up more closely, which helps with combinations.
            For perturbation features it is divided by the square root of their width.
    """

    training_fields: ClassVar[tuple[str, ...]] = (*PerturbationConfig.training_fields, "hidden_dropout")

    hidden_size: int = 672
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    initializer_range: float | int = 0.02
    perturbation_initializer_range: float | int = 1.0

    def validate_network(self):
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation; {closest(self.hidden_act, ACT2FN)}")
        self._check_at_least(1, "hidden_size")
        self._check_range("hidden_dropout", 0, 1, upper_open=True)


@strict_config
class GeneDecoderConfig(PerturbationConfig):
    r"""
    What the families with a gene decoder share, which turns embeddings into expression. The fields of
    [`PerturbationConfig`], and:

    Args:
        decoder_hidden_sizes (`list[int]`, *optional*, defaults to `[1024, 1024, 512]` where `gene_dim` is set):
            Hidden widths of the gene decoder.
        decoder_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the gene decoder.
        residual_decoder (`bool`, *optional*, defaults to False):
            Add the output of block i-1 to that of every odd block i of the gene decoder, where their widths agree.
    """

    training_fields: ClassVar[tuple[str, ...]] = (*PerturbationConfig.training_fields, "decoder_dropout")

    decoder_hidden_sizes: list[int] | None = None
    decoder_dropout: float | int = 0.1
    residual_decoder: bool = False

    # Options of the gene decoder, and the value that each must have where there is none.
    _of_decoder: ClassVar[dict] = {"decoder_hidden_sizes": None, "residual_decoder": False}

    def __post_init__(self, **kwargs):
        if self.decoder_hidden_sizes is None and self.gene_dim is not None:
            self.decoder_hidden_sizes = [1024, 1024, 512]
        super().__post_init__(**kwargs)

    def validate_gene_decoder(self):
        self._check_range("decoder_dropout", 0, 1, upper_open=True)
        if self.gene_dim is None:
            for option, off in self._of_decoder.items():
                if getattr(self, option) != off:
                    raise ValueError(
                        f"{option}={getattr(self, option)!r} is an option of the gene decoder: set gene_dim"
                    )
        elif not all(width >= 1 for width in self.decoder_hidden_sizes or []):
            raise ValueError(f"decoder_hidden_sizes must all be at least 1, found {self.decoder_hidden_sizes}")


@strict_config
class EncoderConfig(NetworkConfig, GeneDecoderConfig):
    r"""
    What the families that encode cell and perturbation, and read predictions off an output head, share. The fields of
    [`NetworkConfig`] and [`GeneDecoderConfig`], and:

    Args:
        num_encoder_layers (`int`, *optional*, defaults to 4) [n_encoder_layers]:
            Linear layers of the perturbation encoder (State: and of the cell encoder where `basal_encoder="mlp"`).
        num_decoder_layers (`int`, *optional*, defaults to 4) [n_decoder_layers]:
            Linear layers of the output head.
        decoder_weight (`float`, *optional*, defaults to 1.0):
            Weight of the gene decoder's loss.
    """

    training_fields: ClassVar[tuple[str, ...]] = (
        *NetworkConfig.training_fields,
        "decoder_dropout",
        "decoder_weight",
    )

    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    decoder_weight: float | int = 1.0

    def validate_encoders(self):
        self._check_at_least(1, "num_encoder_layers", "num_decoder_layers")
        self._check_range("decoder_weight", 0)


@strict_config
class SetTransformerConfig(EncoderConfig):
    r"""
    What the families with a set transformer and a distributional loss share. The fields of [`EncoderConfig`], and:

    Args:
        backbone (`str`, *optional*, defaults to `"llama"`) [transformer_backbone_key]:
            Blocks of the set transformer.

            - `"llama"`: RMSNorm, projections without bias, gated SiLU feed-forward layer
            - `"gpt2"`: LayerNorm, biases, feed-forward layer with GELU (tanh form)
        num_hidden_layers (`int`, *optional*, defaults to 4):
            Transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`):
            Width of one head; heads x head_dim may differ from `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`):
            Width of the feed-forward layer.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        loss (`str`, *optional*, defaults to `"energy"`):
            The distance between the predicted and the observed cells of a sentence.

            - `"energy"`: energy distance
            - `"sinkhorn"`: debiased entropic optimal transport, squared Euclidean cost
            - `"combined"`: `energy_weight` x energy + `sinkhorn_weight` x sinkhorn
            - `"mse"`: mean squared error of cell i against cell i
        blur (`float`, *optional*, defaults to 0.05):
            Entropic blur of the Sinkhorn divergence, in units of the features.
        energy_weight (`float`, *optional*, defaults to 1.0), sinkhorn_weight (`float`, *optional*, defaults to 0.01):
            Weights of the two terms of `loss="combined"`.
        feature_chunks (`int`, *optional*, defaults to 1) [mmd_num_chunks]:
            Split the features in this many chunks and average the distances within each.
        shuffle_feature_chunks (`bool`, *optional*, defaults to False):
            Draw the chunks anew each step.
        detach_decoder (`bool`, *optional*, defaults to False):
            Stop the decoder's gradient at the latents; one training step in ten then decodes the true latents.
    """

    _derived: ClassVar[tuple[str, ...]] = ("head_dim", "intermediate_size")
    _of_decoder: ClassVar[dict] = {**GeneDecoderConfig._of_decoder, "detach_decoder": False}
    training_fields: ClassVar[tuple[str, ...]] = (
        *EncoderConfig.training_fields,
        "attention_dropout",
        "loss",
        "blur",
        "energy_weight",
        "sinkhorn_weight",
        "feature_chunks",
        "shuffle_feature_chunks",
        "detach_decoder",
    )
    backbone: Literal["llama", "gpt2"] = "llama"
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    if TYPE_CHECKING:
        # Never None once the config is made: `__post_init__` fills them in.
        head_dim: int = 84
        intermediate_size: int = 2688
    else:
        head_dim: int | None = None
        intermediate_size: int | None = None
    attention_dropout: float | int = 0.0
    loss: Literal["energy", "sinkhorn", "combined", "mse"] = "energy"
    blur: float | int = 0.05
    energy_weight: float | int = 1.0
    sinkhorn_weight: float | int = 0.01
    feature_chunks: int = 1
    shuffle_feature_chunks: bool = False
    detach_decoder: bool = False

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = max(1, self.hidden_size // max(1, self.num_attention_heads))
            if self.head_dim * self.num_attention_heads != self.hidden_size:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                    f"{self.num_attention_heads}: change one of them, or set head_dim (it is free)"
                )
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def attention(self) -> str:
        """Every token sees all tokens. The State model makes this an option, to run checkpoints trained otherwise."""
        return "bidirectional"

    @property
    def positions(self) -> str:
        """Tokens have no order. The State model makes this an option, to run checkpoints trained otherwise."""
        return "none"

    def validate_set_transformer(self):
        self._check_at_least(
            1, "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "feature_chunks"
        )
        self._check_range("attention_dropout", 0, 1, upper_open=True)
        for name in ("energy_weight", "sinkhorn_weight"):
            self._check_range(name, 0)
        if self.blur <= 0:
            raise ValueError(f"blur must be above 0, found {self.blur}")
        if self.feature_chunks > self.output_dim:
            raise ValueError(f"feature_chunks={self.feature_chunks} exceeds output_dim={self.output_dim}")
        if self.shuffle_feature_chunks and self.feature_chunks == 1:
            raise ValueError("shuffle_feature_chunks=True has no effect with feature_chunks=1")


__all__ = [
    "EncoderConfig",
    "GeneDecoderConfig",
    "NetworkConfig",
    "PerturbationConfig",
    "SetTransformerConfig",
    "strict_config",
]
