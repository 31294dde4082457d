"""
The time of `pertstate evaluate` and its memory, on simulated files: many cells, and many tiny groups. Where `cell-eval` is
installed (`pip install 'pertstate[eval]'`), also its time on the same files, and how far both agree.

    python benchmarks/evaluate.py [--perturbations 100]

Predictions are real cells of another draw, so that no model takes part. The two do not do the same: `evaluate` scores eight
baselines and a ceiling beside the predictions, with resampled intervals, from at most 1,000 cells of each kind; `cell-eval` takes all
cells of the predictions alone, and tests genes. Each runs in a process of its own, and imports and compilation are not counted.
"""

import argparse
import contextlib
import io
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.metrics import MODEL


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


def ours(folder: Path) -> pd.DataFrame:
    """Our figures of the predictions of each perturbation."""
    table = evaluate(folder / "guess.h5ad", folder / "real.h5ad", folder / "train.h5ad", quiet=True).table
    return table[table["method"] == MODEL].set_index("perturbation")[["pearson", "mae", "mse"]]


def of_cell_eval(folder: Path) -> pd.DataFrame:
    """Those of cell-eval."""
    from cell_eval import MetricsEvaluator

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        evaluator = MetricsEvaluator(
            str(folder / "guess_with_controls.h5ad"),
            str(folder / "real.h5ad"),
            control_pert="control",
            pert_col="perturbation",
            outdir=place,
        )
        found, _ = evaluator.compute(write_csv=False)
    table = pd.DataFrame(found.to_dict(as_series=False)).set_index("perturbation")
    return table.rename(columns={"pearson_delta": "pearson"})[["pearson", "mae", "mse"]].astype(float)


def measured(run: Callable[[Path], pd.DataFrame], folder: Path, warm: Path, send):
    """
    Send the figures, the seconds, those of the processors, and the peak memory in MiB of a run, after a small run that imports and
    compiles.
    """
    run(warm)
    start, before = time.perf_counter(), _processor_seconds()
    table = run(folder)
    seconds, work = time.perf_counter() - start, _processor_seconds() - before
    send.send((table, seconds, work, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _processor_seconds() -> float:
    """Those of this process and of its children that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def alone(run: Callable[[Path], pd.DataFrame], folder: Path, warm: Path) -> tuple[pd.DataFrame, float, float, float]:
    """[`measured`] in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(run, folder, warm, send))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def files(folder: Path, perturbations: int, cells: int, controls: int, genes: int, predicted_cells: int):
    """Write real, training and predicted cells, and predicted cells with the real control cells."""
    folder.mkdir()
    real, training = (screen(perturbations, cells, controls, genes, seed) for seed in (0, 1))
    guess = screen(perturbations, predicted_cells, 1, genes, 2)[1:].copy()
    for name, data in (("real", real), ("train", training), ("guess", guess)):
        data.obs_names = [f"{name}-{barcode}" for barcode in data.obs_names]
        data.write_h5ad(folder / f"{name}.h5ad")
    ad.concat([real[:controls], guess]).write_h5ad(folder / "guess_with_controls.h5ad")


def compare(folder: Path, what: str, perturbations: int, *sizes: int):
    files(folder / what, perturbations, *sizes)
    print(what)
    table, seconds, work, peak = alone(ours, folder / what, folder / "warm")
    per_group = 1000 * seconds / perturbations
    print(
        f"  pertstate  {seconds:8.1f} s {work:8.1f} s of processors {per_group:8.1f} ms a group, peak {peak:,.0f} MiB",
        flush=True,
    )
    if find_spec("cell_eval") is None:
        return
    theirs, their_seconds, their_work, their_peak = alone(of_cell_eval, folder / what, folder / "warm")
    per_group = 1000 * their_seconds / perturbations
    print(
        f"  cell-eval  {their_seconds:8.1f} s {their_work:8.1f} s of processors {per_group:8.1f} ms a group, peak {their_peak:,.0f} MiB: "
        f"{their_seconds / seconds:.2f} times the time, {their_peak / peak:.2f} times the memory"
    )
    largest = (table - theirs.loc[table.index]).abs().max()
    print("  largest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perturbations", type=int, default=100)
    parser.add_argument("--tiny", type=int, default=3000)
    args = parser.parse_args()
    if find_spec("cell_eval") is None:
        print("cell-eval is left out: pip install 'pertstate[eval]'")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files(place / "warm", 3, 10, 20, 50, 10)
        compare(place, f"{args.tiny} groups of 2 cells, 500 controls x 60 genes", args.tiny, 2, 500, 60, 20)
        compare(
            place,
            f"{args.perturbations} groups of 200 cells, 1,000 controls x 2,000 genes",
            args.perturbations,
            200,
            1000,
            2000,
            200,
        )
        compare(
            place,
            f"{args.perturbations} groups of 200 cells, 4,000 controls x 2,000 genes",
            args.perturbations,
            200,
            4000,
            2000,
            1000,
        )


if __name__ == "__main__":
    main()
