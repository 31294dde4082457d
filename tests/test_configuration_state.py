"""A config has the published sizes, survives a round trip, and refuses what it does not understand."""

import re
from dataclasses import fields
from typing import Literal, get_args, get_origin

import pytest
from transformers import PreTrainedConfig

from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.messages import closest
from pertstate.configuration_state import StateConfig


# hidden size, layers, heads, head width, feed-forward width, set size, encoder and head layers, backbone
PUBLISHED_SIZES = {
    "small": (672, 4, 8, 84, 2688, 128, 4, "llama"),
    "base": (768, 8, 12, 64, 3072, 512, 1, "llama"),
    "large": (1488, 6, 12, 124, 5952, 512, 4, "llama"),
    "gpt2": (328, 8, 8, 41, 1312, 512, 4, "gpt2"),
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_presets_have_the_published_sizes(name):
    config = StateConfig.from_preset(name)
    found = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.head_dim,
        config.intermediate_size,
        config.set_size,
        config.num_encoder_layers,
        config.backbone,
    )
    assert found == PUBLISHED_SIZES[name]
    assert config.num_decoder_layers == config.num_encoder_layers
    assert (config.attention, config.positions) == ("bidirectional", "none")


def test_every_preset_is_checked_here():
    assert set(StateConfig.presets) == {*PUBLISHED_SIZES, "tiny", "mini"}


def test_defaults_follow_other_fields():
    genes = StateConfig(input_dim=100)
    assert (genes.output_dim, genes.nonnegative_output, genes.decoder_hidden_sizes) == (100, True, None)
    latent = StateConfig(input_dim=30, gene_dim=100, hidden_size=48, num_attention_heads=6)
    assert (latent.output_dim, latent.nonnegative_output) == (30, False)
    assert latent.decoder_hidden_sizes == [1024, 1024, 512]
    assert (latent.head_dim, latent.intermediate_size) == (8, 192)
    assert StateConfig(gene_dim=100, nonnegative_output=True).nonnegative_output is True
    assert StateConfig(nonnegative_output=False).nonnegative_output is False


def test_head_dim_is_free_of_hidden_size():
    config = StateConfig(hidden_size=328, num_attention_heads=12, head_dim=64)
    assert config.num_attention_heads * config.head_dim == 768


def test_preset_overrides_replace_its_fields():
    config = StateConfig.from_preset("base", input_dim=30, num_hidden_layers=2, set_size=7)
    assert (config.input_dim, config.num_hidden_layers, config.set_size) == (30, 2, 7)
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (768, 64, 3072)


def test_widths_of_a_preset_follow_an_overridden_hidden_size():
    config = StateConfig.from_preset("small", hidden_size=96)
    assert (config.head_dim, config.intermediate_size) == (12, 384)
    config = StateConfig.from_preset("small", hidden_size=96, head_dim=5, intermediate_size=11)
    assert (config.head_dim, config.intermediate_size) == (5, 11)


def test_overriding_a_preset_leaves_the_preset_alone():
    before = {name: dict(values) for name, values in StateConfig.presets.items()}
    StateConfig.from_preset("tiny", hidden_size=128, set_size=3)
    assert StateConfig.presets == before


@pytest.mark.parametrize(
    "name, hint",
    [("smal", "did you mean 'small'"), ("xyz", "expected one of 'tiny', 'mini', 'small', 'base', 'large'")],
)
def test_unknown_preset_names_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"StateConfig has no preset '{name}'; {hint}"):
        StateConfig.from_preset(name)


@pytest.mark.parametrize(
    "misspelt, nearest",
    [
        ("hiden_size", "hidden_size"),
        ("set_sizes", "set_size"),
        ("num_perturbation", "num_perturbations"),
        ("residal", "residual"),
        ("backbon", "backbone"),
    ],
)
def test_misspelt_field_names_the_nearest(misspelt, nearest):
    expected = f"StateConfig has no field '{misspelt}'; did you mean '{nearest}'"
    with pytest.raises(ValueError, match=expected):
        StateConfig(**{misspelt: 1})
    with pytest.raises(ValueError, match=expected):
        StateConfig.from_preset("tiny", **{misspelt: 1})


def test_field_unlike_any_other_lists_some_fields():
    with pytest.raises(ValueError, match=r"StateConfig has no field 'qqqq'; expected one of .* and \d+ more"):
        StateConfig(qqqq=1)


def test_closest_lists_few_names_in_full():
    assert closest("zzz", ["alpha", "beta"]) == "expected one of 'alpha', 'beta'"


OPTIONS = {f.name: get_args(f.type) for f in fields(StateConfig) if get_origin(f.type) is Literal}


@pytest.mark.parametrize(
    "field, value, hint",
    [
        ("basal_encoder", "liner", r"; did you mean 'linear'\?"),
        ("backbone", "lama", r"; did you mean 'llama'\?"),
        ("attention", "causul", r"; did you mean 'causal'\?"),
        ("positions", "ropes", r"; did you mean 'rope'\?"),
        ("residual", "hiden", r"; did you mean 'hidden'\?"),
        ("loss", "energi", r"; did you mean 'energy'\?"),
        ("loss", "huber", ""),
        ("backbone", 3, ""),
    ],
)
def test_wrong_choice_lists_the_options_and_names_the_nearest(field, value, hint):
    options = re.escape(str(list(OPTIONS[field])))
    with pytest.raises(ValueError, match=f"{field}={value!r} is not an option of StateConfig.*{options}{hint}$"):
        StateConfig(**{field: value})


def test_every_choice_is_accepted():
    for field, options in OPTIONS.items():
        for option in options:
            assert getattr(StateConfig(**{field: option}), field) == option


def test_unknown_activation_names_the_nearest():
    with pytest.raises(ValueError, match="hidden_act='gelo' is not an activation; did you mean 'gelu'"):
        StateConfig(hidden_act="gelo")


@pytest.mark.parametrize(
    "field",
    [
        "input_dim",
        "output_dim",
        "hidden_size",
        "set_size",
        "num_perturbations",
        "perturbation_dim",
        "num_contexts",
        "num_batches",
        "gene_dim",
        "num_encoder_layers",
        "num_decoder_layers",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "intermediate_size",
        "feature_chunks",
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_at_least_one(field, value):
    # A given head_dim keeps the divisibility of the hidden size out of the way.
    options = {"head_dim": 8, "residual": "none", field: value}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, found {value}"):
        StateConfig(**options)


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout", "decoder_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5])
def test_dropout_lies_in_zero_to_one(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} must lie in [0, 1), found {value}")):
        StateConfig(**{field: value})


@pytest.mark.parametrize(
    "field",
    [
        "energy_weight",
        "sinkhorn_weight",
        "decoder_weight",
        "l1_weight",
        "confidence_weight",
        "confidence_target_scale",
        "batch_token_weight",
    ],
)
def test_weights_are_not_negative(field):
    with pytest.raises(ValueError, match=re.escape(f"{field} must lie in [0, inf], found -1")):
        StateConfig(**{field: -1})
    assert getattr(StateConfig(**{field: 0}), field) == 0


CONTRADICTIONS = [
    ({"num_perturbations": 5, "perturbation_dim": 7}, r"num_perturbations=5 .* perturbation_dim=7 .* contradict"),
    ({"hidden_size": 100, "num_attention_heads": 8}, "hidden_size=100 is not divisible by num_attention_heads=8"),
    ({"blur": 0}, "blur must be above 0, found 0"),
    ({"input_dim": 10, "feature_chunks": 11}, "feature_chunks=11 exceeds output_dim=10"),
    ({"output_dim": 10}, r"residual='output' adds to .* needs output_dim == input_dim, found 10 and 2000"),
    ({"output_dim": 10, "residual": "hidden", "l1_weight": 0.1}, "l1_weight > 0 .* needs output_dim == input_dim"),
    ({"input_dim": 7, "output_adapter": True}, "output_adapter needs output_dim of at least 8, found 7"),
    ({"batch_encoder": True}, "batch_encoder=True needs num_batches, found None"),
    ({"batch_token": True}, "batch_token=True needs num_batches, found None"),
    (
        {"batch_token": True, "num_batches": 2, "attention": "none"},
        "batch_token=True contradicts attention='none': the token would see no cell",
    ),
    ({"confidence_token": True, "attention": "none"}, "confidence_token=True contradicts attention='none'"),
    ({"batch_token": True, "num_batches": 2, "attention": "causal"}, "batch_token=True contradicts attention='causal'"),
    ({"positions": "rope", "backbone": "gpt2"}, "positions='rope' exists for backbone='llama' alone"),
    ({"positions": "rope", "attention": "none"}, "positions='rope' has no effect with attention='none'"),
    ({"positions": "rope", "head_dim": 9}, "positions='rope' needs an even head_dim, found 9"),
    ({"decoder_hidden_sizes": [8]}, r"decoder_hidden_sizes=\[8\] is an option of the gene decoder: set gene_dim"),
    ({"residual_decoder": True}, "residual_decoder=True is an option of the gene decoder: set gene_dim"),
    ({"detach_decoder": True}, "detach_decoder=True is an option of the gene decoder: set gene_dim"),
    ({"gene_dim": 5, "decoder_hidden_sizes": [8, 0]}, r"decoder_hidden_sizes must all be at least 1, found \[8, 0\]"),
]


@pytest.mark.parametrize("options, message", CONTRADICTIONS, ids=[" ".join(o) for o, _ in CONTRADICTIONS])
def test_contradictory_options(options, message):
    with pytest.raises(ValueError, match=message):
        StateConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"output_dim": 10, "residual": "hidden"},
        {"batch_token": True, "num_batches": 2},
        {"batch_encoder": True, "num_batches": 2, "attention": "none"},
        {"confidence_token": True, "attention": "causal"},
        {"positions": "rope", "attention": "causal"},
        {"gene_dim": 5, "residual_decoder": True, "detach_decoder": True},
        {"input_dim": 8, "output_adapter": True, "feature_chunks": 8},
    ],
)
def test_neighbours_of_the_contradictions_are_accepted(options):
    config = StateConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_dropout", "0.1"),
        ("batch_encoder", "yes"),
        ("decoder_hidden_sizes", 64),
        ("num_batches", "two"),
    ],
)
def test_wrong_type_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, found .* \\({type(value).__name__}\\); correct it"):
        StateConfig(**{field: value, "head_dim": 8, "intermediate_size": 8})


# One value other than the default for every field of ours.
UNUSUAL = {
    "input_dim": 24,
    "output_dim": 16,
    "num_perturbations": 5,
    "num_contexts": 3,
    "num_batches": 4,
    "gene_dim": 9,
    "hidden_size": 20,
    "set_size": 6,
    "hidden_act": "relu",
    "hidden_dropout": 0,
    "nonnegative_output": True,
    "initializer_range": 0.1,
    "perturbation_initializer_range": 0.5,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "basal_encoder": "mlp",
    "backbone": "gpt2",
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "head_dim": 8,
    "intermediate_size": 30,
    "attention_dropout": 0.2,
    "residual": "hidden",
    "output_adapter": True,
    "batch_encoder": True,
    "batch_token": True,
    "confidence_token": True,
    "decoder_hidden_sizes": [7, 7],
    "decoder_dropout": 0.3,
    "residual_decoder": True,
    "loss": "combined",
    "blur": 0.1,
    "energy_weight": 2,
    "sinkhorn_weight": 0.5,
    "feature_chunks": 2,
    "shuffle_feature_chunks": True,
    "decoder_weight": 0.7,
    "detach_decoder": True,
    "confidence_weight": 0.2,
    "confidence_target_scale": 5.0,
    "batch_token_weight": 0.3,
}


@pytest.mark.parametrize(
    "options",
    [
        UNUSUAL,
        {"perturbation_dim": 7, "attention": "causal", "positions": "rope", "l1_weight": 0.1},
    ],
)
def test_save_and_load_keep_every_field(tmp_path, options):
    config = StateConfig(**options)
    config.save_pretrained(tmp_path)
    loaded = StateConfig.from_pretrained(tmp_path)
    for field in fields(PerturbationConfig) + fields(StateConfig):
        if field.name != "transformers_version":
            assert getattr(loaded, field.name) == getattr(config, field.name), field.name
    for name, value in options.items():
        assert getattr(loaded, name) == value


def test_the_round_trips_cover_every_field():
    library = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(StateConfig)} - library
    assert own == {*UNUSUAL, "perturbation_dim", "attention", "positions", "l1_weight"}
    defaults = StateConfig(gene_dim=10)
    assert not [name for name, value in UNUSUAL.items() if getattr(defaults, name) == value]
