"""Code that the accuracy benchmarks share. It trains through train.py, and predicts and scores through files, as users do."""

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoProcessor

import pertstate.train
from pertstate.data.record import RunRecord
from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.prediction import predict


METRICS = ["pearson", "mae", "energy"]


def train_predict_score(
    config: str, data: str, flags: list[str], contexts, perturbations=None
) -> tuple[pd.DataFrame, float, int]:
    """
    Returns the scores of one run, a row per (context, perturbation, method) without the averages; the seconds of processor
    time that its training took; and the number of the model's parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        words = ["--config", config, "--output_dir", folder, "--disable_tqdm", "true", *flags]
        # The Trainer prints its log; a benchmark's output is its table.
        with contextlib.redirect_stdout(io.StringIO()):
            pertstate.train.main(words)
        seconds = time.process_time() - start
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        predicted = Path(folder, "predicted.h5ad")
        predict(model, processor, data, predicted, perturbations, contexts, quiet=True)
        if processor.values == "counts":
            to_units_of_x(predicted, data)
        # All cells: these figures are compared with published ones.
        table = evaluate(predicted, data, record=RunRecord.load(folder), max_cells=None, quiet=True).table
    return table, seconds, model.num_parameters()


def to_units_of_x(predicted: Path, data: str | Path):
    """
    Predictions of a model on counts in the units of the file's X. The model's predictions are scaled to a total over the
    model's genes, and X is log1p of counts with that total over *all* genes. So each cell is multiplied by the share of the
    model's genes in its control cell.
    """
    adata, real = ad.read_h5ad(predicted), ad.read_h5ad(data)
    controls = real[adata.obs["control_barcode"].to_numpy(), adata.var_names].X
    controls = controls.toarray() if sp.issparse(controls) else np.asarray(controls)
    settings = json.loads(adata.uns["pertstate"]["processor"])
    share = np.expm1(controls).sum(axis=1, keepdims=True) / settings["target_sum"]
    adata.X = np.log1p(np.expm1(adata.X) * share)
    settings |= {"input": "X", "values": "log1p", "predicts": None}
    adata.uns["pertstate"]["processor"] = json.dumps(settings)
    adata.write_h5ad(predicted)


def show(table: pd.DataFrame, by: list[str]) -> str:
    """The means of the figures as an aligned table. A dash stands for an undefined correlation."""
    means = table.groupby(by, sort=False)[METRICS].mean()
    return means.map(lambda value: "-" if value != value else f"{value:.4f}").to_string()


def threads(count: int | None):
    if count:
        torch.set_num_threads(count)
