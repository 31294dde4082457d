"""The whole path on built-in data: simulate a screen, train, predict a cell type that was held out, compare."""

import os
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np

from pertstate.data.record import RunRecord
from pertstate.data.simulator import simulate_screen
from pertstate.evaluation.comparison import evaluate, table_of, write_table
from pertstate.evaluation.plots import plot_mean_changes


FOLDER = Path("demo")
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
HELD_OUT = "type_11"


def run(*command: str):
    print("$ " + " ".join(command), flush=True)
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)


def main():
    start = time.monotonic()
    # A model of this size is faster on one thread than on several.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    FOLDER.mkdir(exist_ok=True)
    screen = simulate_screen(seed=0)
    screen.write_h5ad(FOLDER / "screen.h5ad")
    print(f"simulated {screen.n_obs:,} cells x {screen.n_vars} genes: {FOLDER}/screen.h5ad", flush=True)

    run("pertstate", "train", str(CONFIG), "--overwrite")
    predicted, real = FOLDER / "predicted.h5ad", FOLDER / "screen.h5ad"
    run(
        *("pertstate", "predict", "--model", str(FOLDER / "checkpoint"), "--adata", str(real)),
        *("--context", HELD_OUT, "--output", str(predicted), "--overwrite"),
    )

    scores = evaluate(predicted, real, record=RunRecord.load(FOLDER / "checkpoint"), quiet=True)
    write_table(table_of(scores), FOLDER / "scores.csv", overwrite=True)
    plot_mean_changes(predicted, real, FOLDER / "mean_change.png", overwrite=True)
    table = table_of(scores)
    mean = table[table["context"] == "mean"].set_index("method")[["pearson", "mae", "energy"]]
    mean.columns = ["Pearson of the mean change", "MAE of the mean", "energy distance"]
    shown = mean.map(lambda value: "-" if np.isnan(value) else f"{value:.4f}")
    perturbations = ad.read_h5ad(predicted).obs["perturbation"].nunique()
    print(
        f"\n{HELD_OUT}, never seen perturbed: mean of {perturbations} perturbations\n\n{shown.to_string()}\n\n{scores.verdict}\n"
    )
    for what, name in (
        ("checkpoint", "checkpoint"),
        ("predicted cells", "predicted.h5ad"),
        ("scores of each perturbation", "scores.csv"),
        ("predicted against observed mean change", "mean_change.png"),
    ):
        print(f"{what + ':':40} {FOLDER / name}")
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
