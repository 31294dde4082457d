"""
The time of `pertstate evaluate` and its memory, on simulated files: many cells, and many tiny groups.

    python benchmarks/evaluate.py [--perturbations 100]

Predictions are real cells of another draw, so that no model takes part.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.evaluation.comparison import evaluate


def screen(perturbations: int, cells: int, controls: int, genes: int, seed: int) -> ad.AnnData:
    """Cells of log1p counts of one context, about 15 % of them above zero."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(0.3, 0.6, genes)
    names = ["control"] * controls + [f"P{i}" for i in range(perturbations) for _ in range(cells)]
    effects = {name: np.exp(rng.normal(0, 0.3, genes) * (rng.random(genes) < 0.1)) for name in dict.fromkeys(names)}
    blocks = []
    for name in dict.fromkeys(names):
        size = controls if name == "control" else cells
        blocks.append(sp.csr_matrix(rng.poisson(base * effects[name], (size, genes)).astype(np.float32)))
    counts = sp.vstack(blocks, format="csr")
    counts = sp.diags(1e4 / np.maximum(1, np.asarray(counts.sum(axis=1)).ravel())) @ counts
    counts = counts.astype(np.float32)
    counts.data = np.log1p(counts.data)
    obs = pd.DataFrame({"perturbation": names, "cell_type": "T"}, index=[f"cell{i}x" for i in range(len(names))])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)]))


def timed(folder: Path, what: str, perturbations: int, cells: int, controls: int, genes: int, predicted_cells: int):
    real, training = (screen(perturbations, cells, controls, genes, seed) for seed in (0, 1))
    guess = screen(perturbations, predicted_cells, 1, genes, 2)[1:].copy()
    for name, data in (("real", real), ("train", training), ("guess", guess)):
        data.obs_names = [f"{name}-{barcode}" for barcode in data.obs_names]
        data.write_h5ad(folder / f"{name}.h5ad")
    start = time.perf_counter()
    evaluate(folder / "guess.h5ad", folder / "real.h5ad", folder / "train.h5ad", quiet=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{what:50} {seconds:8.1f} s {1000 * seconds / perturbations:8.1f} ms a group, peak {peak:,.0f} MiB", flush=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perturbations", type=int, default=100)
    parser.add_argument("--tiny", type=int, default=3000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        timed(
            place,
            f"{args.tiny} groups of 2 cells, 500 controls x 60 genes",
            args.tiny,
            2,
            500,
            60,
            500 if args.tiny < 100 else 20,
        )
        timed(
            place,
            f"{args.perturbations} groups of 200 cells, 4,000 controls x 2,000",
            args.perturbations,
            200,
            4000,
            2000,
            1000,
        )


if __name__ == "__main__":
    main()
