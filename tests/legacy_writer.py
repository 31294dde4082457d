"""Training folders as the published research code leaves them, with weights drawn at random."""

import copy
import pickle
from pathlib import Path

import torch
import yaml


PERTURBATIONS = ["GATA1", "KLF1", "TP53", "non-targeting"]
BATCHES, CONTEXTS = ["plate_a", "plate_b"], ["k562", "jurkat", "rpe1"]
INPUT, HIDDEN, SET_SIZE = 6, 8, 4
GENES = [f"G{i}" for i in range(INPUT)]

_LLAMA = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12, "head_dim": 4}
_COMMON = {"hidden_dim": HIDDEN, "cell_set_len": SET_SIZE, "n_encoder_layers": 2, "n_decoder_layers": 2, "dropout": 0.1}
_LLAMA_MODEL = {**_COMMON, "transformer_backbone_key": "llama", "predict_residual": True}
_FLAG = {"bidirectional_attention": True, **_LLAMA}
# `model.kwargs` by `model.name`.
MODELS = {
    "state": {
        **_LLAMA_MODEL,
        "transformer_backbone_kwargs": _FLAG,
        "use_basal_projection": False,
        "batch_encoder": True,
        "mask_attn": False,
    },
    "old_neuralot": {**_LLAMA_MODEL, "transformer_backbone_kwargs": _LLAMA},
    "pseudobulk": {**_LLAMA_MODEL, "transformer_backbone_kwargs": _LLAMA, "batch_encoder": True},
    "embedsum": _COMMON,
}


def one_hot_map(names: list) -> dict:
    """One-hot vectors by name. The names are not in the order of their places."""
    rows = {name: torch.eye(len(names))[i].clone() for i, name in enumerate(names)}
    return dict(reversed(rows.items()))


def _linear(prefix: str, out: int, into: int) -> dict[str, torch.Tensor]:
    return {f"{prefix}.weight": torch.randn(out, into) * 0.3, f"{prefix}.bias": torch.randn(out) * 0.3}


def _mlp(prefix: str, into: int, out: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """Linear layers at 0, 3, .. of a sequential module."""
    widths = [into] + [HIDDEN] * (layers - 1) + [out]
    parts = [_linear(f"{prefix}.{3 * i}", b, a) for i, (a, b) in enumerate(zip(widths[:-1], widths[1:]))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def weights_of(family: str) -> dict[str, torch.Tensor]:
    """The state dict of a model of [`MODELS`], reproducible."""
    torch.manual_seed(0)
    weights = _mlp("pert_encoder", len(PERTURBATIONS), HIDDEN) | _mlp("project_out", HIDDEN, INPUT)
    weights |= _linear("basal_encoder", HIDDEN, INPUT) if family == "state" else _mlp("basal_encoder", INPUT, HIDDEN)
    if family == "state":
        weights["batch_encoder.weight"] = torch.randn(len(BATCHES), HIDDEN)
    if family == "pseudobulk":
        weights |= _mlp("batch_encoder", len(BATCHES), HIDDEN)
    if family == "embedsum":
        return weights
    layer, width = "transformer_backbone.layers.0", _LLAMA["intermediate_size"]
    for name in "qkvo":
        weights[f"{layer}.self_attn.{name}_proj.weight"] = torch.randn(HIDDEN, HIDDEN) * 0.3
    for name, shape in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
        weights[f"{layer}.mlp.{name}_proj.weight"] = torch.randn(shape) * 0.3
    for name in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "transformer_backbone.norm"):
        weights[f"{name}.weight"] = 1 + torch.randn(HIDDEN) * 0.1
    # The research code saves these weights, which have no use.
    weights["transformer_backbone.embed_tokens.weight"] = torch.zeros(3, HIDDEN)
    return weights


class LegacyFolderWriter:
    """
    The parts of a training folder, to be changed before they are written.

    Attributes:
        config (`dict`): content of `config.yaml`.
        dims (`dict`): content of `var_dims.pkl`.
        maps (`dict`): contents by file name. A `.pkl` is written as a plain pickle.
        content (`dict`): content of the checkpoint, which is written as `checkpoints/{name}` for each of `checkpoints`.
    """

    def __init__(self, family: str = "state"):
        kwargs = copy.deepcopy(MODELS[family])
        data = {"embed_key": "X_hvg", "output_space": "gene", "pert_col": "gene", "cell_type_key": "cell_line"}
        data |= {"batch_col": "plate", "control_pert": "non-targeting"}
        self.config = {
            "data": {"name": "PerturbationDataModule", "kwargs": data},
            "model": {"name": family, "kwargs": kwargs},
            "training": {"lr": 0.001, "max_steps": 7},
        }
        self.dims = {"input_dim": INPUT, "output_dim": INPUT, "gene_dim": INPUT, "hvg_dim": INPUT}
        self.dims |= {"pert_dim": len(PERTURBATIONS), "batch_dim": len(BATCHES), "gene_names": list(GENES)}
        self.maps = {
            "pert_onehot_map.pt": one_hot_map(PERTURBATIONS),
            "batch_onehot_map.torch": one_hot_map(BATCHES),
            "cell_type_onehot_map.torch": one_hot_map(CONTEXTS),
        }
        sizes = {name: value for name, value in self.dims.items() if name != "gene_names"}
        hyper = {**copy.deepcopy(kwargs), **sizes, "control_pert": "non-targeting", "embed_key": "X_hvg"}
        self.content = {"epoch": 3, "global_step": 7, "state_dict": weights_of(family), "hyper_parameters": hyper}
        self.checkpoints = ["final.ckpt"]

    def write(self, folder: Path) -> Path:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config), encoding="utf-8")
        for name, content in {"var_dims.pkl": self.dims, **self.maps}.items():
            if name.endswith(".pkl"):
                (folder / name).write_bytes(pickle.dumps(content))
            else:
                torch.save(content, folder / name)
        for name in self.checkpoints:
            torch.save(self.content, folder / "checkpoints" / name)
        return folder
