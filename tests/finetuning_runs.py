"""A small screen, a checkpoint trained on a part of it, and runs that start from there."""

from pathlib import Path

import anndata as ad
import torch
import yaml
from safetensors.torch import load_file

from pertstate import train
from pertstate.data import simulate_screen


TRAINING = {
    "max_steps": 6,
    "logging_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_folder(folder: Path) -> Path:
    """
    A screen in three files: `first.h5ad` of three cell types and three perturbations, `second.h5ad` of two other cell
    types with one perturbation more, `controls.h5ad` of control cells of the last type; and `base`, trained on the first.
    """
    adata = simulate_screen(num_contexts=5, num_perturbations=4, num_genes=40, cells_per_group=16, seed=1)
    types, names = adata.obs["cell_type"], adata.obs["perturbation"]
    first = types.isin(["type_0", "type_1", "type_2"]) & (names != "pert_3")
    adata[first].write_h5ad(folder / "first.h5ad")
    adata[types.isin(["type_3", "type_4"])].write_h5ad(folder / "second.h5ad")
    adata[(types == "type_4") & (names == "control")].write_h5ad(folder / "controls.h5ad")
    run(folder, "base", "first", {"batch_key": "batch"}, {"preset": "tiny", "set_size": 8})
    return folder


def run(folder: Path, name: str, file: str, data: dict | None = None, model: dict | None = None, **training) -> dict:
    """Run a training that writes `folder / name`. Returns its figures."""
    content = {
        "data": {"datasets": {"screen": str(folder / f"{file}.h5ad")}, **(data or {})},
        "model": {"pretrained": str(folder / "base")} if model is None else model,
        "training": {**TRAINING, "output_dir": str(folder / name), **training},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return train.main([str(path)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(
        path / ("model.safetensors" if (path / "model.safetensors").exists() else "adapter_model.safetensors")
    )


def predictions(model, processor, file: Path, perturbation: str = "pert_1") -> torch.Tensor:
    sentences = processor(ad.read_h5ad(file), perturbation=perturbation, context="type_3")
    with torch.inference_mode():
        return model.eval()(**sentences).predictions
