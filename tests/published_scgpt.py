"""A scGPT model as it is published, built from torch's modules, and the folder that holds it."""

import json
from pathlib import Path

import torch
from torch import nn


class _GeneEncoder(nn.Module):
    def __init__(self, num_genes: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(num_genes, width)
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, ids):
        return self.enc_norm(self.embedding(ids))


class _ValueEncoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(1, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, values):
        return self.norm(self.linear2(torch.relu(self.linear1(values.clamp(max=512)[..., None]))))


class _Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1)
        )

    def forward(self, tokens):
        return self.fc(tokens)[..., 0]


class PublishedScGPT(nn.Module):
    """`forward(ids, values, flags)`, each (cells, genes), to (cells, genes), under the published names."""

    def __init__(self, num_genes: int, width: int = 16, heads: int = 2, layers: int = 2, feed_forward: int = 24):
        super().__init__()
        self.encoder = _GeneEncoder(num_genes, width)
        self.value_encoder = _ValueEncoder(width)
        self.pert_encoder = nn.Embedding(3, width)
        self.bn = nn.BatchNorm1d(width, eps=6.1e-5)
        layer = nn.TransformerEncoderLayer(width, heads, feed_forward, dropout=0.2, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = _Head(width)
        for name, parameter in self.named_parameters():
            # Every weight matters: norms and biases too are away from 1 and 0.
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)
        self.arguments = {"embsize": width, "nheads": heads, "nlayers": layers, "d_hid": feed_forward, "dropout": 0.2}
        self.arguments |= {"input_emb_style": "continuous", "n_bins": 51, "pad_token": "<pad>"}
        self.eval()

    def forward(self, ids, values, flags):
        tokens = self.encoder(ids) + self.value_encoder(values) + self.pert_encoder(flags)
        tokens = self.bn(tokens.transpose(1, 2)).transpose(1, 2)
        return self.decoder(self.transformer_encoder(tokens))


def write_published(
    folder: Path, model: PublishedScGPT, vocabulary: dict[str, int], flash: bool = False, **more
) -> Path:
    """Write the published folder. With `flash`, attention has the names of flash attention; `more` adds weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    if flash:
        weights = {name.replace("in_proj_", "Wqkv."): tensor for name, tensor in weights.items()}
    torch.save({**weights, **more}, folder / "best_model.pt")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "args.json").write_text(json.dumps(model.arguments))
    return folder
