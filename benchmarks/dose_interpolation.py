"""
Does a model interpolate a dose that it has not seen better than the nearest measured dose does?

The screen is simulated: each gene of a drug's signature follows a Hill curve of the dose. One dose in the middle is left
out of training (`exclude`). The first error is that of the mean of the predicted cells at this dose. Beside it stand the
errors of two simple predictions: the measured cells of the next lower dose, and of the next higher one. Settings were
chosen on seed 100; other seeds are shown.

    python benchmarks/dose_interpolation.py [--seeds 0 1 2] [--steps 400]
"""

import argparse
import logging
import os
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml


DOSES = (0.01, 0.03, 0.1, 0.3, 1.0)
LEFT_OUT = 0.1


def simulate_series(seed: int, drugs: int = 3, genes: int = 80, cells: int = 60, doses=DOSES) -> ad.AnnData:
    """Counts of a screen of drugs at doses: obs `perturbation`, `cell_type` (one) and `dose`, 0 for controls."""
    r = np.random.default_rng(seed)
    base = r.gamma(1.0, 2.0, genes) + 0.2
    counts, labels, of_dose = (
        [r.poisson(base * r.gamma(20, 0.05, (4 * cells, 1)))],
        ["control"] * 4 * cells,
        [0.0] * 4 * cells,
    )
    for drug in range(drugs):
        largest = r.normal(0, 1.2, genes) * (r.random(genes) < 0.4)
        half, slope = 10 ** r.uniform(-1.5, -0.5), r.uniform(0.8, 2.0)
        for dose in doses:
            effect = np.exp(largest * dose**slope / (dose**slope + half**slope))
            counts.append(r.poisson(base * effect * r.gamma(20, 0.05, (cells, 1))))
            labels += [f"drug_{drug}"] * cells
            of_dose += [dose] * cells
    obs = pd.DataFrame({"perturbation": labels, "dose": of_dose, "cell_type": "line"})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    var = pd.DataFrame(index=[f"gene{i}" for i in range(genes)])
    return ad.AnnData(sp.csr_matrix(np.vstack(counts).astype(np.float32)), obs=obs, var=var)


def errors(
    adata: ad.AnnData, folder: Path, encoding: str, steps: int, left_out: float = LEFT_OUT, doses=DOSES
) -> dict[str, float]:
    """Mean absolute errors of the mean at the dose that is left out, over drugs, for the model and both neighbouring doses."""
    from transformers import AutoModel, AutoProcessor

    import pertstate.train
    from pertstate.evaluation.prediction import predict

    path = folder / "series.h5ad"
    adata.write_h5ad(path)
    run = {
        "data": {
            "datasets": str(path),
            "dose_key": "dose",
            "dose_encoding": encoding,
            "exclude": {"dose": [left_out]},
        },
        "model": {"preset": "tiny", "set_size": 16, "residual": "output"},
        "training": {
            "output_dir": str(folder / encoding),
            "max_steps": steps,
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": True,
            "seed": 0,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    pertstate.train.main([str(folder / "run.yaml")])
    processor = AutoProcessor.from_pretrained(folder / encoding)
    model = AutoModel.from_pretrained(folder / encoding)
    drugs = processor.vocabulary.perturbations
    options = {"perturbations": drugs, "doses": [left_out], "quiet": True, "overwrite": True}
    predict(model, processor, path, folder / "predicted.h5ad", **options)
    predicted = ad.read_h5ad(folder / "predicted.h5ad")
    log = np.log1p(adata.X.toarray() / adata.X.sum(axis=1).A1[:, None] * 1e4)

    def measured(drug: str, dose: float) -> np.ndarray:
        return log[((adata.obs["perturbation"] == drug) & (adata.obs["dose"] == dose)).to_numpy()].mean(axis=0)

    at = doses.index(left_out)
    found: dict[str, list[float]] = {"model": [], "next lower dose": [], "next higher dose": []}
    for drug in drugs:
        truth = measured(drug, left_out)
        mean = np.asarray(predicted[(predicted.obs["perturbation"] == drug).to_numpy()].X).mean(axis=0)
        for name, value in (
            ("model", mean),
            ("next lower dose", measured(drug, doses[at - 1])),
            ("next higher dose", measured(drug, doses[at + 1])),
        ):
            found[name].append(float(np.abs(value - truth).mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    for seed in args.seeds:
        adata = simulate_series(seed)
        for encoding in ("log", "linear"):
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"seed": seed, "encoding": encoding, **errors(adata, Path(folder), encoding, args.steps)})
    table = pd.DataFrame(rows)
    print(table.round(4).to_string(index=False))
    print(table.groupby("encoding").mean(numeric_only=True).drop(columns="seed").round(4).to_string())


if __name__ == "__main__":
    main()
