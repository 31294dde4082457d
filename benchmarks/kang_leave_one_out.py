"""
Zero-shot prediction of IFN-beta's effect: each of the seven cell types of Kang et al. 2018 held out in turn.

    python benchmarks/kang_leave_one_out.py [--hvg-on-all] [--residual hidden] [--seeds 3] [--no-heldout-controls]

Prints the figures of the model (mean over seeds) and of the baselines, for each cell type and on average over the seven.
The run is configs/kang_zeroshot.yaml, with the same settings for all folds.
"""

import argparse
import logging

import common
import numpy as np
import pandas as pd
import transformers


TYPES = ["B", "CD14+Mono", "CD4T", "CD8T", "Dendritic", "FCGR3A+Mono", "NK"]
# What a user must beat, on 2000 genes that scanpy chose on all cells (`--hvg-on-all`): Pearson, MAE, energy distance.
FOR_ORIENTATION = {
    "known research code, 800 steps": (0.789, 0.0588, 0.799),
    "split half of the real cells": (0.734, float("nan"), 0.62),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/kang_zeroshot.yaml")
    parser.add_argument("--data", default="../shared/data/kang2018_pbmc_ifnb.h5ad")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each fold")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--hvg-on-all", action="store_true", help="choose genes on all cells, held-out ones too")
    parser.add_argument(
        "--no-heldout-controls", action="store_true", help="keep the held-out type's controls out of training"
    )
    parser.add_argument("--threads", type=int)
    args, flags = parser.parse_known_args()
    common.threads(args.threads)
    logging.disable(logging.INFO)
    transformers.utils.logging.disable_progress_bar()

    flags = [*flags, "--datasets", args.data, "--hvg_on_all", str(args.hvg_on_all).lower()]
    flags += ["--heldout_controls", str(not args.no_heldout_controls).lower()]
    tables, seconds = [], []
    for held_out in args.types:
        for seed in range(args.seeds):
            table, took, _ = common.train_predict_score(
                args.config, args.data, [*flags, "--test_contexts", held_out, "--seed", str(seed)], [held_out]
            )
            tables.append(table.assign(seed=seed))
            seconds.append(took)
        print(f"\n{common.show(pd.concat(tables[-args.seeds :]), ['context', 'method'])}", flush=True)
    table = pd.concat(tables)
    print(
        f"\nmean over {len(args.types)} held-out cell types and {args.seeds} seeds; 2000 HVGs chosen on "
        f"{'all' if args.hvg_on_all else 'training'} cells; control cells of the held-out type "
        f"{'not used' if args.no_heldout_controls else 'among the training sentences'}; "
        f"{np.mean(seconds):.0f} s a training run"
    )
    print(common.show(table, ["method"]))
    per_seed = table[table["method"] == "model"].groupby("seed")[common.METRICS].mean()
    spread = ", ".join(f"{m} {per_seed[m].min():.4f} to {per_seed[m].max():.4f}" for m in common.METRICS)
    print(f"model, averages of single seeds: {spread}")
    if args.hvg_on_all:
        for name, figures in FOR_ORIENTATION.items():
            print(f"{name:34}" + "  ".join("-" if f != f else f"{f:.4g}" for f in figures))


if __name__ == "__main__":
    main()
