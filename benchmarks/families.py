"""
Every family of models on real data, side by side: one table.

    python benchmarks/families.py [--seeds 3] [--output docs/families_table.md]

- Kang et al. 2018: the effect of IFN-beta on each of seven cell types, held out in turn (2,000 genes).
- Papalexi et al. 2021: 25 knock-outs in a replicate that was held out.
- Norman et al. 2019: five double perturbations in K562 from the singles.

Families that take gradient steps are given about as much processor time as State takes for 200 steps: the more a step costs,
the fewer are taken. That is little time for every family. State's other settings are those of configs/, which were chosen by
looking at these folds. For the other families, one or two settings were tried on one fold (NK). Two processes of one thread
each run at a time. The seconds of a run are those of one core, for its training with loading.
"""

import argparse
import concurrent.futures
import logging
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import common
import numpy as np
import pandas as pd
import torch
import transformers
import yaml
from tqdm import tqdm


KANG_TYPES = ["B", "CD14+Mono", "CD4T", "CD8T", "Dendritic", "FCGR3A+Mono", "NK"]
DOUBLES = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]


@dataclass
class Task:
    """The data of one question, and what each fold holds out of them."""

    config: str
    file: str
    folds: list[str]
    hold_out: str
    set_size: int
    steps: int
    perturbations: list[str] | None = None


TASKS = {
    "Kang": Task("kang_zeroshot", "kang2018_pbmc_ifnb", KANG_TYPES, "test_contexts", 32, 200),
    "Papalexi": Task("papalexi_replicate", "papalexi2021_thp1_eccite", ["rep_3"], "test_contexts", 64, 200),
    "Norman": Task("norman_combinations", "norman2019_mcfaline2023", ["k562"], "contexts", 32, 200, DOUBLES),
}


@dataclass
class Family:
    """Fields of a family's config, of its training, and of its data where they differ from the task's."""

    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    # Steps as a multiple of the task's steps, and sentences of a step.
    steps: float = 1.0
    sentences: int = 8


_SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMALL |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
_COUNTS = {"input": "layers/counts", "normalize": "none"}

FAMILIES = {
    "state": Family(),
    "state-embed-sum": Family({"preset": "published"}, {"learning_rate": 1e-3}, steps=0.75),
    "state-neural-ot": Family(_SMALL, {"learning_rate": 1e-3}, steps=0.5),
    "state-pseudobulk": Family(_SMALL, {"learning_rate": 1e-3}),
    "state-cpa": Family(
        {"hidden_size": 128, "latent_dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 1}
        | {"adversary_warmup_steps": 50, "adversary_ramp_steps": 50, "adversarial_weight": 5},
        {"learning_rate": 1e-3},
    ),
    "state-scvi": Family(
        {"hidden_size": 128, "latent_dim": 32, "kl_warmup_steps": 40},
        {"learning_rate": 1e-3},
        _COUNTS,
        steps=0.4,
    ),
    "state-scgpt": Family(
        {"perturbation_type": "chemical", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"attention_dropout": 0, "initializer_range": 0.07, "genes_per_step": 250, "set_size": 8},
        {"learning_rate": 1e-3},
        steps=0.25,
        sentences=4,
    ),
    "state-decoder-only": Family({}, {"learning_rate": 1e-3}, {"input": "obsm/X_pca", "gene_input": "X"}),
    "state-perturbation-mean": Family(),
    "state-log-fold-change": Family(),
    "state-context-mean": Family(),
    "state-linear": Family(),
    "state-additive": Family(),
}


def settings(task: Task, name: str, fold: str, seed: int, data: Path, folder: str) -> dict:
    """The sections of a run file, with the task's data and the family's model and training."""
    family = FAMILIES[name]
    run = yaml.safe_load(Path("configs", f"{task.config}.yaml").read_text())
    run["data"] |= {"datasets": {"data": str(data)}, task.hold_out: [fold], **family.data}
    if name != "state":  # State's settings are those of the configuration
        run["model"] = {"model_type": name, "set_size": task.set_size, **family.model}
        run["training"] = {"lr_scheduler_type": "linear", **family.training}
    run["training"] |= {
        "output_dir": folder,
        "max_steps": round(task.steps * family.steps),
        "per_device_train_batch_size": family.sentences,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 10_000,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return run


def run_one(job: tuple[str, str, str, int], data: Path) -> list[dict]:
    """The scores of one run, with a row for each (context, perturbation, method)."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    name, question, fold, seed = job
    task = TASKS[question]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "run.yaml")
        config.write_text(yaml.safe_dump(settings(task, name, fold, seed, data, folder)))
        table, seconds, parameters = common.train_predict_score(str(config), data, [], [fold], task.perturbations)
    labels = {"family": name, "task": question, "fold": fold, "seed": seed}
    return [{**labels, "seconds": seconds, "parameters": parameters, **row} for row in table.to_dict("records")]


def prepared(task: Task, shared: Path, folder: Path) -> Path:
    """Write the file of a task with principal components, which the ceiling of decoding reads, and without other cell lines."""
    import scanpy as sc

    adata = ad.read_h5ad(shared / f"{task.file}.h5ad")
    if task.hold_out == "contexts":
        adata = adata[adata.obs["cell_type"].isin(task.folds)].copy()
    sc.pp.pca(adata, n_comps=50, random_state=0)
    path = folder / f"{task.file}.h5ad"
    adata.write_h5ad(path)
    return path


def markdown(runs: pd.DataFrame, seeds: int) -> str:
    """The table, with a row for each family and baseline: means over folds, and standard deviations over seeds."""
    questions = [name for name in TASKS if name in set(runs["task"])]
    lines = [
        "| |" + "".join(f" {q}: Pearson | MAE | energy | seconds |" for q in questions) + " parameters |",
        "|---|" + "---|" * (4 * len(questions) + 1),
    ]
    models = runs[runs["method"].str.startswith("model")].assign(row=lambda t: t["family"])
    baselines = runs[~runs["method"].str.startswith("model") & (runs["family"] == "state")]
    baselines = baselines.assign(row=lambda t: t["method"])
    for table in (models, baselines):
        for row, part in table.groupby("row", sort=False):
            cells = []
            for question in questions:
                of = part[part["task"] == question]
                per_seed = of.groupby("seed")[common.METRICS].mean()
                cells += [_figure(per_seed[metric], seeds) for metric in common.METRICS]
                is_model = len(of) and of["method"].iloc[0].startswith("model")
                cells.append(f"{of.groupby(['fold', 'seed'])['seconds'].first().mean():.0f}" if is_model else "")
            label = f"**{row}** (a ceiling)" if part["method"].str.contains("ceiling").any() else row
            of_kang = part[part["task"] == questions[0]]["parameters"]
            size = f"{int(of_kang.iloc[0]):,}" if table is models and len(of_kang) else ""
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {size} |")
    return "\n".join(lines)


def _figure(values: pd.Series, seeds: int) -> str:
    if values.isna().all():
        return "-"
    digits = 3 if abs(values.mean()) >= 0.1 else 4
    spread = f" ± {values.std(ddof=0):.{digits}f}" if seeds > 1 and values.std(ddof=0) >= 0.5 * 10**-digits else ""
    return f"{values.mean():.{digits}f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of the three files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--runs", type=Path, help="CSV of all figures; runs that it holds already are not repeated")
    parser.add_argument("--output", type=Path, help="also write the table there, as Markdown")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = pd.read_csv(args.runs) if args.runs and args.runs.exists() else pd.DataFrame()
    known = set(done[["family", "task", "fold", "seed"]].itertuples(index=False, name=None)) if len(done) else set()
    jobs = [
        (name, question, fold, seed)
        for seed in range(args.seeds)
        for question in args.tasks
        for fold in TASKS[question].folds
        for name in args.families
    ]
    start = time.perf_counter()
    rows = done.to_dict("records")
    with tempfile.TemporaryDirectory() as folder:
        files = {question: prepared(TASKS[question], args.shared, Path(folder)) for question in args.tasks}
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max_workers=2, mp_context=spawn) as pool:
            waiting = {pool.submit(run_one, job, files[job[1]]): job for job in jobs if job not in known}
            for future in tqdm(concurrent.futures.as_completed(waiting), total=len(waiting), unit="runs"):
                rows += future.result()
                if args.runs:
                    pd.DataFrame(rows).to_csv(args.runs, index=False)
    runs = pd.DataFrame(rows)
    runs = runs[runs["family"].isin(args.families) & runs["task"].isin(args.tasks) & (runs["seed"] < args.seeds)]
    order = {name: i for i, name in enumerate(FAMILIES)}
    runs = runs.sort_values("family", key=lambda names: names.map(order), kind="stable")
    table = markdown(runs, args.seeds)
    print(table)
    print(
        f"\n{len(waiting)} runs in {(time.perf_counter() - start) / 60:.0f} minutes; seeds: {np.arange(args.seeds).tolist()}"
    )
    if args.output:
        args.output.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
