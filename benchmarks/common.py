"""What the accuracy benchmarks share: train through train.py, predict and score through the files that users see."""

import contextlib
import io
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModel, AutoProcessor

import cellstate.train
from cellstate.evaluation.comparison import evaluate_files
from cellstate.evaluation.prediction import predict_file


METRICS = ["pearson", "mae", "energy"]


def train_predict_score(
    config: str, data: str, flags: list[str], contexts, perturbations=None
) -> tuple[pd.DataFrame, float]:
    """Scores of one run, a row per (context, perturbation, method) without the averages, and its training seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        words = ["--config", config, "--output_dir", folder, "--disable_tqdm", "true", *flags]
        # The Trainer prints its log; a benchmark's output is its table.
        with contextlib.redirect_stdout(io.StringIO()):
            cellstate.train.main(words)
        seconds = time.perf_counter() - start
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        predicted = Path(folder, "predicted.h5ad")
        predict_file(model, processor, data, predicted, perturbations, contexts, quiet=True)
        table, _ = evaluate_files(predicted, data, data, quiet=True)
    return table[table["context"] != "mean"], seconds


def show(table: pd.DataFrame, by: list[str]) -> str:
    """Means of the figures, aligned; an undefined correlation is a dash."""
    means = table.groupby(by, sort=False)[METRICS].mean()
    return means.map(lambda value: "-" if value != value else f"{value:.4f}").to_string()


def threads(count: int | None):
    if count:
        torch.set_num_threads(count)
