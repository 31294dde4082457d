"""
What a user waits for, from the command line: help, the first training step, training, prediction, and disk.

    python benchmarks/end_to_end.py

The model is a 328-wide, 8-layer llama on 22,000 simulated cells x 2,000 genes. Beside each figure stands what the known
research code took for the same shape on two cores. That was measured once, elsewhere: it is for orientation only.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


ROOT = Path(__file__).parents[1]
CONFIG = """
data:
  datasets: {{screen: {folder}/screen.h5ad}}
model:
  hidden_size: 328
  num_hidden_layers: 8
  num_attention_heads: 12
  head_dim: 64
  intermediate_size: 1312
  set_size: 64
  num_encoder_layers: 4
  num_decoder_layers: 4
training:
  output_dir: {folder}/run
  logging_steps: 1
  save_strategy: "no"
  disable_tqdm: true
  use_cpu: true
"""


def screen(folder: Path, perturbations: int = 100, cells: int = 200, controls: int = 2000, genes: int = 2000):
    rng = np.random.default_rng(0)
    labels = np.repeat(["control"] + [f"p{i}" for i in range(perturbations)], [controls] + [cells] * perturbations)
    values = sp.random_array((len(labels), genes), density=0.2, format="csr", dtype=np.float32, rng=rng)
    obs = pd.DataFrame({"perturbation": labels, "cell_type": "line"}, index=[f"c{i}" for i in range(len(labels))])
    ad.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])).write_h5ad(
        folder / "screen.h5ad"
    )


def timed(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def train(folder: Path, steps: int) -> tuple[float, float]:
    """Seconds from the command to the end of the first step, and median cells per second of the others."""
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, str(ROOT / "train.py"), "--config", str(folder / "run.yaml"), "--max_steps", str(steps)]
    start, first, speeds = time.perf_counter(), None, []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if match := re.search(r"'cells_per_second': '?([\d.e+]+)", line):
            first = first or time.perf_counter() - start
            speeds.append(float(match[1]))
    if process.wait():
        raise RuntimeError("".join(output[-20:]))
    return first, float(np.median(speeds[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    pertstate = str(Path(sys.executable).with_name("pertstate"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        screen(folder)
        helps = sorted(timed(pertstate, "--help") for _ in range(5))[2]
        first, speed = train(folder, args.steps)
        predict = [
            pertstate,
            "predict",
            "--model",
            str(folder / "run"),
            "--adata",
            str(folder / "screen.h5ad"),
            "--quiet",
        ]
        predict += ["--output", str(folder / "predicted.h5ad"), "--device", "cpu"]
        one = timed(*predict, "--perturbation", "p0")
        five = timed(*predict, "--perturbation", "p0", "p1", "p2", "p3", "p4", "p5")
        weights = (folder / "run" / "model.safetensors").stat().st_size
        total = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    rows = [
        ("pertstate --help (s)", f"{helps:.2f}", "3.0"),
        ("command to first training step (s)", f"{first:.1f}", "15"),
        ("training (cells/s)", f"{speed:.0f}", "524"),
        ("prediction (cells/s, start-up left out)", f"{5 * 2000 / (five - one):.0f}", "588"),
        ("prediction of 2,000 cells, whole command (s)", f"{one:.1f}", "-"),
        ("parameters (million)", f"{weights / 4e6:.1f}", "20.9"),
        ("checkpoint folder (MB)", f"{total / 1e6:.0f}", "3 x 242"),
    ]
    print(f"{'':46}{'pertstate':>12}{'known code':>14}")
    for what, ours, known in rows:
        print(f"{what:46}{ours:>12}{known:>14}")


if __name__ == "__main__":
    main()
