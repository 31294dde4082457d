"""
Double perturbations from singles in K562 (Norman et al. 2019): five doubles whose singles are both measured.

    python benchmarks/norman_combinations.py [--seeds 3]

Prints the figures of the model (mean over seeds), of no change, and of the additive baseline (control cells plus both
single changes, clipped at 0), for each double and on average. The run is configs/norman_combinations.yaml.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import common
import pandas as pd
import transformers

from pertstate.data.reading import read_h5ad


DOUBLES = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/norman_combinations.yaml")
    parser.add_argument("--data", default="../shared/data/norman2019_mcfaline2023.h5ad")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args, flags = parser.parse_known_args()
    common.threads(args.threads)
    logging.disable(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        # The baselines learn from what the model learned from: only K562, not the glioma lines of the file.
        k562 = Path(folder, "k562.h5ad")
        screen = read_h5ad(args.data)
        screen[screen.obs["cell_type"] == "k562"].write_h5ad(k562)
        for seed in range(args.seeds):
            flags_of_run = [*flags, "--datasets", str(k562), "--seed", str(seed)]
            table, _, _ = common.train_predict_score(args.config, k562, flags_of_run, ["k562"], DOUBLES)
            # A double that was never trained on has no mean change of its own: that row would repeat "no change".
            tables.append(table[table["method"] != "perturbation mean"])
    table = pd.concat(tables)
    print(common.show(table, ["perturbation", "method"]))
    print(f"\nmean over {len(DOUBLES)} doubles and {args.seeds} seeds")
    print(common.show(table, ["method"]))


if __name__ == "__main__":
    main()
