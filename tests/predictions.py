"""A small screen, models that have never been trained, and their predictions."""

import anndata as ad
import numpy as np
import torch

from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.data import simulate_screen
from pertstate.evaluation import OutputLayout, predict


GENES, SET_SIZE, CONTROLS = 30, 8, 20


def screen() -> ad.AnnData:
    """Counts of two contexts, and an embedding."""
    adata = simulate_screen(num_contexts=2, num_perturbations=3, num_genes=GENES, cells_per_group=10, seed=3)
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel()
    rng = np.random.default_rng(0)
    embedding = np.log1p(adata.X @ rng.normal(size=(GENES, 6)) ** 2).astype(np.float32)
    adata.obsm["X_emb"] = embedding - embedding.mean(axis=0)
    return adata


def model_of(processor: StateProcessor, **fields) -> StateForPerturbation:
    """A model that predicts some change."""
    torch.manual_seed(0)
    sizes = {"input_dim": processor.feature_dim, "num_perturbations": 3, "set_size": SET_SIZE, **fields}
    model = StateForPerturbation(StateConfig.from_preset("tiny", **sizes))
    torch.nn.init.normal_(model.output_head.layers[-1].weight, std=0.2)
    return model.eval()


def run(folder, model, output, perturbations=None, adata="screen.h5ad", **options):
    """[`predict`] of a file of a folder; `controls`, `sparse` and `dtype` are those of the [`OutputLayout`]."""
    named = {name: options.pop(name) for name in ("controls", "sparse", "dtype") if name in options}
    layout = OutputLayout(**named) if named else None
    return predict(*model[:2], folder / adata, output, perturbations, quiet=True, layout=layout, **options)
