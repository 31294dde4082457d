"""
Peak memory, speed and size of `pertstate prepare` on a screen that is simulated chunk by chunk, never as a whole:
`python benchmarks/prepare.py [--cells 1000000] [--genes 2000] [--files 1] [--num_proc 1] [--variable GENES]`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd


CHUNK = 10_000


def write_screen(path: Path, cells: int, genes: int, density: float, seed: int):
    """Write counts in CSR, a chunk at a time. The cells of 200 perturbations and 5 contexts are in random order."""
    rng = np.random.default_rng(seed)
    names = np.array(["control", *(f"gene_{i}" for i in range(200))])
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(
                np.where(rng.random(cells) < 0.1, 0, rng.integers(1, len(names), cells)), names
            ),
            "cell_type": pd.Categorical.from_codes(rng.integers(0, 5, cells), [f"line_{i}" for i in range(5)]),
            "batch": pd.Categorical.from_codes(rng.integers(0, 8, cells), [f"batch_{i}" for i in range(8)]),
        },
        index=np.char.add("cell_", np.arange(cells).astype(str)),
    )
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(genes)])
    ad.AnnData(obs=obs, var=var).write_h5ad(path)
    rate = rng.gamma(0.5, 1.0, genes)
    rate = np.minimum(rate / rate.mean() * density, 0.95)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (cells, genes)})
        data = group.create_dataset("data", (0,), "f4", maxshape=(None,), chunks=(1 << 18,))
        indices = group.create_dataset("indices", (0,), "i4", maxshape=(None,), chunks=(1 << 18,))
        indptr, done = np.zeros(cells + 1, dtype=np.int64), 0
        for start in range(0, cells, CHUNK):
            size = min(CHUNK, cells - start)
            rows, columns = np.nonzero(rng.random((size, genes), dtype=np.float32) < rate)
            data.resize((done + len(rows),))
            indices.resize((done + len(rows),))
            data[done:], indices[done:] = rng.geometric(0.5, len(rows)), columns
            indptr[start + 1 : start + size + 1] = done + np.cumsum(np.bincount(rows, minlength=size))
            done += len(rows)
        group.create_dataset("indptr", data=indptr)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--variable", type=int, default=None, help="choose so many highly variable genes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "screen").mkdir()
        per_file = args.cells // args.files
        stored = sum(
            write_screen(folder / "screen" / f"{i}.h5ad", per_file, args.genes, args.density, seed=i)
            for i in range(args.files)
        )
        (folder / "data.yaml").write_text(
            json.dumps({"data": {"datasets": {"screen": str(folder / "screen")}, "batch_key": "batch"}})
        )
        genes = [] if args.variable is None else ["--genes", str(args.variable), "--test_contexts", "line_0"]
        command = [sys.executable, "-m", "pertstate.cli", "prepare", "--config", str(folder / "data.yaml")]
        command += ["--output", str(folder / "store"), "--num-proc", str(args.num_proc), *genes]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        in_files = sum(os.path.getsize(p) for p in (folder / "screen").iterdir())
        in_store = sum(os.path.getsize(p) for p in (folder / "store").iterdir())
    print(f"{per_file * args.files:,} cells x {args.genes:,} genes, {stored:,} values that are not zero")
    print(f"cells per second                                {per_file * args.files / seconds:12,.0f}")
    print(f"peak memory of one process (MiB)                {peak:12,.0f}")
    print(f"store / values that are not zero (8 bytes each) {in_store / (8 * stored):12.3f}")
    print(f"store / files                                   {in_store / in_files:12.3f}")


if __name__ == "__main__":
    main()
