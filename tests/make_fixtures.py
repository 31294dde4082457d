"""
Writes a tiny checkpoint of each family, with cells and what is predicted for them, to `tests/fixtures`.

    python tests/make_fixtures.py

Run it once when a family (or a way to feed one, see `CASES`) is added, and commit what it wrote. It never changes a folder
that exists: an earlier version wrote these files, and later versions must read them as that version did
(`tests/test_fixtures.py`). If that fails, mend the loading, not the fixture.
"""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pertstate import StateProcessor
from pertstate.base.modeling_fitted import TrainingMeans
from pertstate.data import simulate_screen
from pertstate.families import FAMILIES
from pertstate.processing import PerturbationFeatures


FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL |= {"latent_dim": 4, "adversary_hidden_size": 8, "decoder_hidden_sizes": [8, 8], "set_size": 4}
ON_EMBEDDINGS = {"input": "obsm/X_emb", "gene_input": "layers/counts"}
COUNTS = {"input": "layers/counts", "normalize": "none"}
# For each folder: the family, what its processor is fitted with, and fields of its config. A way to feed a family that
# has weights or files of its own has a further folder.
CASES: dict[str, tuple[str, dict, dict]] = {
    **{name: (name, {}, {}) for name in FAMILIES},
    "state-decoder-only": ("state-decoder-only", ON_EMBEDDINGS, {}),
    "state-cpa": ("state-cpa", {}, {"nonnegative_output": False, "hidden_size": 24}),
    "state-scvi": ("state-scvi", COUNTS, {}),
    "state-batches": ("state", {}, {"batch_encoder": True, "batch_token": True, "confidence_token": True}),
    "state-embedding": ("state", ON_EMBEDDINGS, {"nonnegative_output": False, "backbone": "gpt2"}),
    "state-features": ("state", {"perturbation_features": True}, {"residual": "hidden", "basal_encoder": "mlp"}),
    "state-perturbation-mean-features": ("state-perturbation-mean", {"perturbation_features": True}, {}),
    "state-cpa-counts": ("state-cpa", COUNTS, {"likelihood": "nb", "doser": "sigmoid"}),
    "state-scgpt-chemical": ("state-scgpt", {}, {"perturbation_type": "chemical", "nonnegative_output": False}),
}


def cells() -> ad.AnnData:
    """Counts of two contexts, two perturbations (which are genes, too) and two batches, and an embedding of the cells."""
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=10, cells_per_group=5, seed=0)
    adata.var_names = ["pert_0", "pert_1", *adata.var_names[2:]]
    adata.X = adata.X.toarray()
    adata.layers["counts"] = adata.X.copy()
    adata.obsm["X_emb"] = np.random.default_rng(0).normal(size=(adata.n_obs, 6)).astype(np.float32)
    return adata


def read_cells(folder: Path) -> tuple[ad.AnnData, list[str]]:
    """The cells of a fixture, and the perturbations to predict for them."""
    labels = json.loads((folder / "labels.json").read_text())
    tensors = load_file(folder / "cells.safetensors")
    counts = tensors["counts"].numpy()
    adata = ad.AnnData(counts, obs=labels["obs"], layers={"counts": counts}, obsm={"X_emb": tensors["X_emb"].numpy()})
    adata.var_names, adata.obs_names = labels["genes"], labels["barcodes"]
    return adata, labels["perturbations"]


def predict(model, processor, adata: ad.AnnData, perturbations: list[str]) -> dict[str, torch.Tensor]:
    """Every tensor that the model reads or returns, by name."""
    sentences = processor(adata, perturbations)
    inputs = dict(sentences)
    if model.is_ceiling:
        inputs["labels"] = inputs["control_cells"]
    with torch.no_grad():
        outputs = model(**inputs)
    tensors = {f"inputs.{key}": value for key, value in sentences.items()}
    return tensors | {f"outputs.{key}": value.clone() for key, value in outputs.items()}


def of_real_cells(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `predict` with zeros for padding, of which a model may return anything."""
    mask = tensors.get("inputs.cell_mask")
    if mask is None:
        return tensors
    return {
        name: value * mask[..., None]
        if name.startswith("outputs.") and value.ndim == 3 and value.shape[:2] == mask.shape
        else value
        for name, value in tensors.items()
    }


def make_processor(adata: ad.AnnData, options: dict) -> StateProcessor:
    options = dict(options)
    if options.pop("perturbation_features", False):
        vectors = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
        options["perturbation_features"] = PerturbationFeatures(["pert_0", "pert_1", "unseen"], vectors)
    return StateProcessor.fit(adata, batch_key="batch", set_size=4, **options)


def make_model(model_type: str, processor: StateProcessor, fields: dict):
    family = FAMILIES[model_type].model
    config = family.config_class
    fields = {**{name: SMALL[name] for name in SMALL if name in config.__dataclass_fields__}, **fields}
    fields |= config.sizes(processor) | config.fields_from_names(processor, fields)
    if fields.get("gene_dim") is None:
        fields.pop("decoder_hidden_sizes", None)
    torch.manual_seed(0)
    model = family(config.from_preset("tiny", **fields))
    if family.fitted:
        model.fit(means(processor))
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                # A new model predicts no change, and so does one without part of its weights.
                parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(0.5 + torch.rand_like(buffer))
    return model.eval()


def means(processor: StateProcessor) -> TrainingMeans:
    rng, features = np.random.default_rng(2), processor.perturbation_features
    return TrainingMeans(
        changes=rng.normal(size=(2, processor.feature_dim)),
        perturbation_ids=np.array([[0], [1]]) if features is None else None,
        perturbation_features=None if features is None else features.encode([["pert_0"], ["pert_1"]]),
        context_ids=np.array([0, 1]),
        context_means=rng.random((2, processor.feature_dim)),
        control_means=rng.random((2, processor.feature_dim)),
        log_folds=rng.normal(size=(2, processor.feature_dim)),
    )


def write(name: str):
    """Write the folder of a case, as a run leaves it, but without code and card."""
    model_type, options, fields = CASES[name]
    folder, adata = FIXTURES / name, cells()
    processor = make_processor(adata, options)
    model = make_model(model_type, processor, fields)
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()]
    perturbations = ["control", "pert_1"] + (["unseen"] if "perturbation_features" in options else [])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    tensors = {"counts": controls.layers["counts"], "X_emb": controls.obsm["X_emb"]}
    save_file({key: torch.tensor(np.asarray(value)) for key, value in tensors.items()}, folder / "cells.safetensors")
    obs = {key: controls.obs[key].astype(str).tolist() for key in ("perturbation", "cell_type", "batch")}
    labels = {"genes": list(controls.var_names), "barcodes": list(controls.obs_names), "obs": obs}
    (folder / "labels.json").write_text(json.dumps({**labels, "perturbations": perturbations}, indent=1))
    save_file(predict(model, processor, *read_cells(folder)), folder / "expected.safetensors")


def main():
    for name in CASES:
        if (FIXTURES / name).exists():
            print(f"{name}: kept as it is")
        else:
            write(name)
            print(f"{name}: written")


if __name__ == "__main__":
    main()
