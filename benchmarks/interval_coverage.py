"""
How often intervals of predicted mean changes hold the changes that are measured in held-out test groups.

    python benchmarks/interval_coverage.py --data ../shared/data [--tasks kang papalexi] [--folds NK B] [--seeds 1] [--keep build/truth]

The runs are those of `truth.py`, with a data section alone; those that it kept are not done again. The intervals are what
`pertstate predict --summary` writes: they come from training groups that were held out while the number of steps was chosen, and
no test cell took part. Each line has the share of (group, gene) pairs whose measured change is inside, that share in the groups with
the lowest and the highest one, the same share among the tenth of genes with the largest predicted changes, and the mean half
width beside the mean size of the measured changes. Below the table stands what the expected error of a group is worth.
"""

import argparse
import contextlib
import io
import logging
from pathlib import Path

import common
import numpy as np
import pandas as pd
import transformers
import truth
from transformers import AutoModel, AutoProcessor

from pertstate.data.record import RunRecord
from pertstate.evaluation.confidence import ranked
from pertstate.evaluation.group_scores import groups_of, real_cells_of
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.predicted_groups import predicted_groups
from pertstate.evaluation.report_data import SCORES_FOLDER
from pertstate.evaluation.scores import Scores
from pertstate.training.run import load_data, read_run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=["kang", "papalexi"], choices=list(truth.TASKS))
    parser.add_argument("--folds", nargs="+", help="these alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("build/truth"), help="folder of the runs of truth.py")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    common.threads(args.threads)
    logging.disable(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    print(
        "| | groups | inside | lowest, highest group | large changes | half width / change |\n|---|---|---|---|---|---|"
    )
    said = []
    for task in args.tasks:
        parts, tables = [], []
        for fold in truth.TASKS[task].folds:
            if args.folds and fold not in args.folds:
                continue
            for seed in range(args.seeds):
                folder = args.keep / task / fold / str(seed)
                if not (folder / "run" / "model.safetensors").is_file():
                    truth.run_of(folder, truth.TASKS[task], fold, seed, args.data, [])
                parts.append(changes(folder))
                line(f"{task} {fold}", *parts[-1])
                table = Scores.load(folder / "run" / SCORES_FOLDER).table
                tables.append(table[table["method"] == MODEL])
        line(f"**{task}**", *(np.concatenate(of) for of in zip(*parts)))
        expected, mae, energy = pd.concat(tables)[["expected_mae", "mae", "energy"]].to_numpy().T
        ranks = [ranked(expected, found)[0] for found in (mae, energy)]
        said.append(
            f"{task}, {len(mae)} groups: the expected MAE is off by {np.abs(expected - mae).mean():.4f} on average, where {mae.mean():.4f} was "
            f"found; its rank correlation with the MAE is {ranks[0]:.2f}, with the energy distance {ranks[1]:.2f}"
        )
    print("\n" + "\n".join(said))


def changes(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The predicted and measured changes of the test groups of a run, and the half widths of intervals, `(groups, features)` each."""
    model, processor = AutoModel.from_pretrained(folder / "run"), AutoProcessor.from_pretrained(folder / "run")
    intervals = RunRecord.load(folder / "run").intervals
    with contextlib.redirect_stdout(io.StringIO()):
        data, _, _ = load_data(read_run([str(folder / "run.yaml")]), None)
    real = real_cells_of(data, processor, decoded=False)
    predicted, measured, numbers = [], [], []
    for group, found in predicted_groups(model, processor, real, groups_of(data)):
        controls = real.scored(real.rows((*group[:2], processor.control), 0, len(found.cells))).mean(axis=0)
        predicted.append(found.cells.mean(axis=0) - controls)
        cells = real.scored(real.rows(group, 0, None))
        measured.append(cells.mean(axis=0) - controls)
        numbers.append((len(cells), len(found.cells)))
    low, high = intervals.around(np.stack(predicted), *np.array(numbers).T)
    return np.stack(predicted), np.stack(measured), (high - low) / 2


def line(name: str, predicted: np.ndarray, measured: np.ndarray, half: np.ndarray):
    inside = np.abs(predicted - measured) <= half
    of_groups = inside.mean(axis=1)
    large = np.abs(predicted) >= np.quantile(np.abs(predicted), 0.9, axis=1, keepdims=True)
    print(
        f"| {name} | {len(inside)} | {inside.mean():.3f} | {of_groups.min():.3f}, {of_groups.max():.3f} | "
        f"{inside[large].mean():.3f} | {half.mean() / np.abs(measured).mean():.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
