"""Options and weights of the published research code, converted to those of this package."""

import re
from typing import Any, Literal

import torch

from pertstate.base.configuration_perturbation import EncoderConfig
from pertstate.configuration_state import StateConfig
from pertstate.families.embed_sum.configuration_embed_sum import EmbedSumConfig
from pertstate.families.neural_ot.configuration_neural_ot import NeuralOTConfig
from pertstate.families.pseudobulk.configuration_pseudobulk import PseudobulkConfig


_FAMILIES: dict[str, type[EncoderConfig]] = {
    "state": StateConfig,
    "embedsum": EmbedSumConfig,
    "old_neuralot": NeuralOTConfig,
    "pseudobulk": PseudobulkConfig,
}
_LOSSES = {"energy": "energy", "mse": "mse", "sinkhorn": "sinkhorn", "se": "combined"}


def config_from_legacy(options: dict) -> EncoderConfig:
    """
    The config of a model trained by the published research code.

    Args:
        options (`dict`): the options under the research code's names, with `model_name` and `transformer_backbone_kwargs`.
            Without a bidirectional flag, the config gets causal attention, with rotary positions for llama. (Families other
            than "state" never attended causally, whatever the flag says.)

    Raises:
        ValueError: the family, loss or backbone is not known, or a needed option is missing.
    """
    family = options.get("model_name", "state")
    if family not in _FAMILIES:
        raise ValueError(f"model_name={family!r} is another family; expected one of {list(_FAMILIES)}")
    config = _FAMILIES[family]
    needed = ["input_dim", "hidden_dim", "output_dim", "pert_dim"]
    if config is not EmbedSumConfig:
        needed.append("transformer_backbone_kwargs")
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(f"legacy options lack {missing}, found {sorted(options)}")
    decoder = options.get("decoder_cfg")
    fields = {
        "input_dim": options["input_dim"],
        "output_dim": options["output_dim"],
        "num_perturbations": options["pert_dim"],
        "num_batches": options.get("batch_dim"),
        "hidden_size": options["hidden_dim"],
        "set_size": options.get("cell_set_len", 256),
        "hidden_act": options.get("activation", "gelu"),
        "hidden_dropout": options.get("dropout", 0.1),
        "num_encoder_layers": options.get("n_encoder_layers", 2),
        "num_decoder_layers": options.get("n_decoder_layers", 2),
    }
    if decoder is not None:
        fields |= {
            "gene_dim": decoder["gene_dim"],
            "decoder_hidden_sizes": list(decoder["hidden_dims"]),
            "decoder_dropout": decoder.get("dropout", 0.1),
            "residual_decoder": bool(decoder.get("residual_decoder", False)),
        }
    if config is EmbedSumConfig:
        return EmbedSumConfig(**fields, nonnegative_output=False)
    on_embeddings = options.get("embed_key") not in (None, "X_hvg")
    fields |= {
        "nonnegative_output": not (on_embeddings and decoder is not None),
        **_backbone(options),
        **_loss(options),
    }
    if decoder is not None:
        if "decoder_weight" in options:
            fields["decoder_weight"] = options["decoder_weight"]
        fields["detach_decoder"] = bool(options.get("detach_decoder", False))
    residual: Literal["hidden", "none"] = "hidden" if options.get("predict_residual", True) else "none"
    if config is NeuralOTConfig:
        return NeuralOTConfig(**{**fields, "nonnegative_output": False}, residual=residual)
    if config is PseudobulkConfig:
        return PseudobulkConfig(**fields, residual=residual, batch_encoder=bool(options.get("batch_encoder", False)))
    return StateConfig(**fields, **_of_state(options, residual))


# Options of the published backbones that their weights do not show. They must have the values that our backbones have.
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6},
    "rope": {"rope_theta": 10000.0, "rope_scaling": None},
    "gpt2": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True},
}
_NEEDED = {"llama": ("num_attention_heads", "num_hidden_layers", "intermediate_size"), "gpt2": ("n_head", "n_layer")}


def _check_fixed(inner: dict, part: str):
    for name, expected in _FIXED[part].items():
        if inner.get(name, expected) != expected:
            raise ValueError(
                f"legacy transformer_backbone_kwargs: expected {name}={expected!r}, found {inner[name]!r}; a backbone with "
                "another value cannot be converted"
            )


def _backbone(options: dict) -> dict:
    backbone = str(options.get("transformer_backbone_key", "GPT2")).lower()
    if backbone not in ("llama", "gpt2"):
        raise ValueError(f"legacy backbone {backbone!r} is not known; expected 'llama' or 'GPT2'")
    inner, hidden = options["transformer_backbone_kwargs"], options["hidden_dim"]
    for name in _NEEDED[backbone]:
        if not isinstance(inner.get(name), int) or inner[name] < 1:
            raise ValueError(
                f"legacy transformer_backbone_kwargs: expected a number of at least 1 as {name}, found {inner.get(name)!r}"
            )
    _check_fixed(inner, backbone)
    if backbone == "llama":
        heads = inner["num_attention_heads"]
        sizes = {
            "num_hidden_layers": inner["num_hidden_layers"],
            "num_attention_heads": heads,
            "head_dim": inner.get("head_dim", hidden // heads),
            "intermediate_size": inner["intermediate_size"],
            "attention_dropout": inner.get("attention_dropout", 0.0),
        }
    else:
        sizes = {
            "num_hidden_layers": inner["n_layer"],
            "num_attention_heads": inner["n_head"],
            "head_dim": hidden // inner["n_head"],
            "intermediate_size": inner.get("n_inner") or 4 * hidden,
            "attention_dropout": inner.get("attn_pdrop", 0.1),
        }
    return {"backbone": backbone, **sizes}


def _loss(options: dict) -> dict:
    loss = options.get("loss", "energy")
    if loss not in list(_LOSSES):
        raise ValueError(f"legacy loss {loss!r} is not known; expected one of {sorted(_LOSSES)}")
    return {
        "loss": _LOSSES[loss],
        "blur": options.get("blur", 0.05),
        "energy_weight": options.get("energy_weight", 1.0),
        "sinkhorn_weight": options.get("sinkhorn_weight", 0.01),
        "feature_chunks": options.get("mmd_num_chunks", 1),
        "shuffle_feature_chunks": bool(options.get("randomize_mmd_chunks", False)),
    }


def _of_state(options: dict, residual: str) -> dict:
    """Options that only the State transition model has."""
    inner = options["transformer_backbone_kwargs"]
    bidirectional = bool(inner.get("bidirectional_attention", False))
    attention = "none" if options.get("mask_attn") else "bidirectional" if bidirectional else "causal"
    llama = str(options.get("transformer_backbone_key", "GPT2")).lower() == "llama"
    positions = "rope" if llama and attention == "causal" else "none"
    if positions == "rope":
        _check_fixed(inner, "rope")
    adapter = options.get("output_space") == "all"
    return {
        "basal_encoder": "mlp" if options.get("use_basal_projection", True) else "linear",
        "attention": attention,
        "positions": positions,
        "residual": "output" if adapter and residual == "hidden" else residual,
        "output_adapter": adapter,
        "batch_encoder": bool(options.get("batch_encoder", False)),
        "batch_token": bool(options.get("use_batch_token", False)),
        "confidence_token": bool(options.get("confidence_token", False)),
        "l1_weight": options.get("regularization", 0.0),
        "confidence_weight": options.get("confidence_weight", 0.01),
        "confidence_target_scale": options.get("confidence_target_scale", 10.0),
        "batch_token_weight": options.get("batch_token_weight", 0.1),
    }


# Sequential indices of the published modules: an MLP has its linear layers at 0, 3, 6 .. A plain gene decoder has its linear
# layers and norms at 0, 1, 4, 5, 8, 9 .. and its output at 4 x blocks.
_RENAMES = [
    (r"basal_encoder\.(weight|bias)", lambda m: f"cell_encoder.layers.0.{m[1]}"),
    (r"basal_encoder\.(\d+)\.(weight|bias)", lambda m: f"cell_encoder.layers.{int(m[1]) // 3}.{m[2]}"),
    (r"pert_encoder\.0\.(weight|bias)", lambda m: f"perturbation_encoder.embedding.{m[1]}"),
    (r"pert_encoder\.(\d+)\.(weight|bias)", lambda m: f"perturbation_encoder.layers.{int(m[1]) // 3 - 1}.{m[2]}"),
    (r"project_out\.(\d+)\.(weight|bias)", lambda m: f"output_head.layers.{int(m[1]) // 3}.{m[2]}"),
    (r"batch_encoder\.weight", lambda m: "batch_embedding.weight"),
    (r"batch_encoder\.0\.(weight|bias)", lambda m: f"batch_encoder.embedding.{m[1]}"),
    (r"batch_encoder\.(\d+)\.(weight|bias)", lambda m: f"batch_encoder.layers.{int(m[1]) // 3 - 1}.{m[2]}"),
    (r"batch_classifier\.0\.(weight|bias)", lambda m: f"batch_head.{m[1]}"),
    (r"batch_token", lambda m: "batch_token"),
    (r"confidence_token\.confidence_token", lambda m: "confidence_token"),
    (r"confidence_token\.confidence_projection\.(.+)", lambda m: f"confidence_head.layers.{m[1]}"),
    (r"final_down_then_up\.(.+)", lambda m: f"output_adapter.{m[1]}"),
    (r"gene_decoder\.blocks\.(.+)", lambda m: f"gene_decoder.blocks.{m[1]}"),
    (r"gene_decoder\.final_layer\.0\.(weight|bias)", lambda m: f"gene_decoder.output.{m[1]}"),
    (
        r"transformer_backbone\.layers\.(\d+)\.self_attn\.o_proj\.weight",
        lambda m: f"backbone.layers.{m[1]}.attention.o_proj.weight",
    ),
    (
        r"transformer_backbone\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight",
        lambda m: f"backbone.layers.{m[1]}.feed_forward.{m[2]}_proj.weight",
    ),
    (
        r"transformer_backbone\.layers\.(\d+)\.input_layernorm\.weight",
        lambda m: f"backbone.layers.{m[1]}.attention_norm.weight",
    ),
    (
        r"transformer_backbone\.layers\.(\d+)\.post_attention_layernorm\.weight",
        lambda m: f"backbone.layers.{m[1]}.feed_forward_norm.weight",
    ),
    (r"transformer_backbone\.norm\.weight", lambda m: "backbone.norm.weight"),
    (r"transformer_backbone\.ln_f\.(weight|bias)", lambda m: f"backbone.norm.{m[1]}"),
    (
        r"transformer_backbone\.h\.(\d+)\.ln_1\.(weight|bias)",
        lambda m: f"backbone.layers.{m[1]}.attention_norm.{m[2]}",
    ),
    (
        r"transformer_backbone\.h\.(\d+)\.ln_2\.(weight|bias)",
        lambda m: f"backbone.layers.{m[1]}.feed_forward_norm.{m[2]}",
    ),
    (
        r"transformer_backbone\.h\.(\d+)\.attn\.c_attn\.(weight|bias)",
        lambda m: f"backbone.layers.{m[1]}.attention.qkv_proj.{m[2]}",
    ),
    (
        r"transformer_backbone\.h\.(\d+)\.attn\.c_proj\.(weight|bias)",
        lambda m: f"backbone.layers.{m[1]}.attention.o_proj.{m[2]}",
    ),
    (
        r"transformer_backbone\.h\.(\d+)\.mlp\.c_(fc|proj)\.(weight|bias)",
        lambda m: f"backbone.layers.{m[1]}.feed_forward.{'up' if m[2] == 'fc' else 'down'}_proj.{m[3]}",
    ),
]
# Weights that our models do not need: frozen all-zero embeddings, with which the research code switched positions and tokens
# off, and constants of rotary positions and causal masks.
_IGNORED = re.compile(r"transformer_backbone\.(wte|wpe|embed_tokens)\.weight|.*\.rotary_emb\.inv_freq|.*\.attn\.bias")
_QKV = re.compile(r"transformer_backbone\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight")
_DECODER = re.compile(r"gene_decoder\.decoder\.(\d+)\.(weight|bias)")


def state_dict_from_legacy(weights: dict[str, torch.Tensor], config: EncoderConfig) -> dict[str, torch.Tensor]:
    """
    The weights of the published research code under our names, ready for `load_state_dict(strict=True)`.

    Args:
        weights (`dict[str, torch.Tensor]`): its state dict.
        config ([`EncoderConfig`]): the result of [`config_from_legacy`].

    Raises:
        ValueError: a weight has an unknown name (the names are listed) or an impossible shape, or there are position
            embeddings, which our models do not have.
    """
    converted: dict[str, torch.Tensor] = {}
    projections: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for name, tensor in weights.items():
        if _IGNORED.fullmatch(name):
            if name == "transformer_backbone.wpe.weight" and tensor.any():
                raise ValueError(
                    f"legacy weight {name}: expected zeros (positions switched off), found numbers; a model with learned "
                    "positions cannot be converted"
                )
            continue
        if match := _QKV.fullmatch(name):
            projections.setdefault(match[1], {})[match[2]] = tensor
            continue
        if match := _DECODER.fullmatch(name):
            index, block = int(match[1]), int(match[1]) // 4
            last = block == len(config.decoder_hidden_sizes or [])
            target = (
                f"gene_decoder.output.{match[2]}" if last else f"gene_decoder.blocks.{block}.{index % 4}.{match[2]}"
            )
            converted[target] = tensor
            continue
        for pattern, rename in _RENAMES:
            if match := re.fullmatch(pattern, name):
                # Our models have a row for each perturbation, and GPT-2's layers store (in, out): both are transposed.
                transposed = name in ("pert_encoder.0.weight", "batch_encoder.0.weight") or re.search(
                    r"\.c_(attn|proj|fc)\.weight$", name
                )
                if transposed and tensor.dim() != 2:
                    raise ValueError(f"legacy weight {name}: expected a matrix, found shape {tuple(tensor.shape)}")
                converted[rename(match)] = tensor.T.contiguous() if transposed else tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} legacy weights have unknown names: {unknown[:10]}")
    for layer, parts in projections.items():
        shapes = {kind: tuple(part.shape) for kind, part in parts.items()}
        if set(parts) != set("qkv") or len({shape[1:] for shape in shapes.values()}) > 1 or () in shapes.values():
            raise ValueError(f"legacy weights q, k, v of layer {layer}: expected three matrices, found {shapes}")
        converted[f"backbone.layers.{layer}.attention.qkv_proj.weight"] = torch.cat([parts[k] for k in "qkv"])
    return converted
