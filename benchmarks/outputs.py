"""
Time and peak memory of `pertstate predict`, by layout, as the numbers of perturbations and of control cells grow.

    python benchmarks/outputs.py [--perturbations 20 200] [--controls 1000 5000] [--genes 1000]

Each run is a process of its own, of a small model that was never trained: what is measured is reading, batching and writing. The
last column is the peak memory beside that of the smallest experiment in the same layout: it stays near 1 where memory is bounded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


LAYOUTS = {
    "dense": ("out.h5ad", {}),
    "sparse": ("out.h5ad", {"sparse": True}),
    "float16": ("out.h5ad", {"dtype": "float16"}),
    "with controls": ("out.h5ad", {"controls": "rows"}),
    "zarr": ("out.zarr", {}),
    "summary": ("out.parquet", None),
}

RUN = """
import ast, resource, sys, time
import torch
import anndata as ad
from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.evaluation import OutputLayout, predict
from pertstate.processing import Vocabulary

folder, name, output, options = *sys.argv[1:4], ast.literal_eval(sys.argv[4])
torch.set_num_threads(int(sys.argv[5]))
names = [f"P{i}" for i in range(int(sys.argv[6]))]
data = ad.read_h5ad(f"{folder}/{name}.h5ad", backed="r")
processor = StateProcessor(vocabulary=Vocabulary(list(data.var_names), names, ["T"]), set_size=64)
data.file.close()
sizes = {"input_dim": len(processor.vocabulary.genes), "num_perturbations": len(names), "set_size": 64}
torch.manual_seed(0)
model = StateForPerturbation(StateConfig.from_preset("tiny", **sizes))
torch.nn.init.normal_(model.output_head.layers[-1].weight, std=0.05)  # a new model predicts no change
out = {"summary": f"{folder}/{output}"} if options is None else {"output": f"{folder}/{output}", "layout": OutputLayout(**options)}
start = time.perf_counter()
done = predict(model, processor, f"{folder}/{name}.h5ad", perturbations=names, quiet=True, **out)
print(done["cells"], time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_controls(path: Path, cells: int, genes: int):
    """Control cells of one context, with 15 % of their values above zero."""
    rng = np.random.default_rng(0)
    values = sp.random(cells, genes, 0.15, format="csr", dtype=np.float32, random_state=0)
    values.data = rng.gamma(2.0, 0.5, values.nnz).astype(np.float32)
    obs = pd.DataFrame({"perturbation": "control", "cell_type": "T"}, index=[f"cell{i}x" for i in range(cells)])
    ad.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)])).write_h5ad(path)


def size_of(path: Path) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


def measured(folder: Path, layout: str, perturbations: int, name: str, threads: int) -> tuple[int, float, float, int]:
    """Cells, seconds, MiB at the peak, bytes of the output."""
    output, options = LAYOUTS[layout]
    words = [sys.executable, "-c", RUN, folder, name, output, repr(options), threads, perturbations]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    cells, seconds, peak = done.stdout.split()
    size = size_of(folder / output)
    subprocess.run(["rm", "-r", str(folder / output)], check=True)
    return int(cells), float(seconds), float(peak), size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perturbations", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--controls", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))
    args = parser.parse_args()
    print(
        "| layout | perturbations | control cells | predicted cells | seconds | output, MB | peak, MiB | ratio |\n|---"
        + "|---" * 7
        + "|"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for controls in args.controls:
            write_controls(folder / f"{controls}.h5ad", controls, args.genes)
        for layout in args.layouts:
            first = None
            for perturbations in args.perturbations:
                for controls in args.controls:
                    cells, seconds, peak, size = measured(folder, layout, perturbations, str(controls), args.threads)
                    first = first or peak
                    print(
                        f"| {layout} | {perturbations:,} | {controls:,} | {cells:,} | {seconds:.1f} | {size / 1e6:,.0f} | {peak:,.0f} "
                        f"| {peak / first:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
