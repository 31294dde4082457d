"""
How good a run is that says nothing of its model or training, beside every baseline, on real data.

    python benchmarks/truth.py --data ../shared/data [--tasks kang papalexi norman unseen] [--seeds 3] [--write docs/truth.md]

Each task holds out test groups and trains `pertstate train` on a file that has a data section alone. No test cell takes part:
the number of steps is chosen on training groups that are held out in turn. The figures of a group are means over the seeds;
intervals are by the bootstrap over cells and groups, paired with the baselines. Runs are kept in `--keep`, and are not done
again.
"""

import argparse
import contextlib
import io
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import transformers
import yaml
from transformers import AutoModel, AutoProcessor

import pertstate.train
from pertstate.data.record import RunRecord
from pertstate.evaluation.group_scores import baselines_of, groups_of, real_cells_of
from pertstate.evaluation.metrics import CEILING, METRICS, MODEL
from pertstate.evaluation.pooling import over_seeds
from pertstate.evaluation.predicted_groups import predicted_groups
from pertstate.evaluation.scoring import GroupResult, methods_of, score_groups
from pertstate.evaluation.verdict import averages_of, verdict_of
from pertstate.training.run import load_data, read_run


KANG = ["B", "CD14+Mono", "CD4T", "CD8T", "Dendritic", "FCGR3A+Mono", "NK"]
DOUBLES = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]


# Knock-outs of Papalexi whose gene is in the data. Of the singles of Norman that holds for one alone, TMSB4X.
MEASURED = ["CMTM6", "IFNGR2", "JAK2", "NFKBIA", "STAT1", "STAT2", "STAT3", "TNFRSF14", "UBE2L6"]


@dataclass
class Task:
    """A question, in words, the file that it is asked of, and the data section of each of its runs, by name."""

    question: str
    file: str
    folds: dict[str, dict]


TASKS = {
    "kang": Task(
        "IFN-beta in a cell type that was never seen stimulated: each of seven held out in turn (Kang et al. 2018)",
        "kang2018_pbmc_ifnb.h5ad",
        {name: {"test_contexts": [name], "genes": 2000} for name in KANG},
    ),
    "papalexi": Task(
        "Knock-outs of 25 genes in a replicate that was not trained on: each of three held out in turn (Papalexi et al. 2021)",
        "papalexi2021_thp1_eccite.h5ad",
        {f"rep_{i}": {"context_key": "batch", "test_contexts": [f"rep_{i}"]} for i in (1, 2, 3)},
    ),
    "norman": Task(
        "Pairs of activated genes, both of which were measured alone: five pairs (Norman et al. 2019)",
        "norman2019_mcfaline2023.h5ad",
        {"pairs": {"contexts": ["k562"], "test_perturbations": DOUBLES}},
    ),
    "unseen": Task(
        "Knock-outs that were never measured, of the nine genes whose expression is: a third held out in turn (Papalexi et al. 2021)",
        "papalexi2021_thp1_eccite.h5ad",
        {
            "+".join(MEASURED[i::3]): {
                "context_key": "batch",
                "include": {"perturbation": ["control", *MEASURED]},
                "perturbation_features": "coexpression",
                "test_perturbations": MEASURED[i::3],
            }
            for i in range(3)
        },
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("build/truth"), help="folder of the runs' figures")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    parser.add_argument("--threads", type=int)
    args, flags = parser.parse_known_args()
    common.threads(args.threads)
    logging.disable(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    sections = []
    for name in args.tasks:
        runs = {}
        for fold in TASKS[name].folds:
            for seed in range(args.seeds):
                runs[fold, seed] = kept(args.keep, name, fold, seed, args.data, flags)
                print(f"{name} {fold} seed {seed}: {runs[fold, seed][1]['seconds']:.0f} s", flush=True)
        sections.append(section(TASKS[name], runs))
        print(sections[-1], flush=True)
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        before, _, rest = page.partition("<!-- tables -->\n")
        after = rest.partition("<!-- end of tables -->")[2]
        text = "\n".join(sections)
        args.write.write_text(f"{before}<!-- tables -->\n{text}<!-- end of tables -->{after}", encoding="utf-8")


def kept(folder: Path, task: str, fold: str, seed: int, data: Path, flags: list[str]) -> tuple[list[GroupResult], dict]:
    """The results of a run and what it took, from its folder or made anew."""
    run = folder / task / fold / str(seed)
    arrays, about = run / "figures.npz", run / "about.json"
    if not about.is_file():
        results, facts = trained(run, TASKS[task], fold, seed, data, flags)
        np.savez(arrays, **{f"{i}|{m}": f for i, r in enumerate(results) for m, f in r.figures.items()})
        facts["groups"] = [[*result.group] for result in results]
        about.write_text(json.dumps(facts))
    facts, figures = json.loads(about.read_text()), np.load(arrays)
    results = [
        GroupResult(
            group=tuple(group),
            reasons={},
            numbers={},
            means={},
            figures={name.partition("|")[2]: figures[name] for name in figures.files if name.startswith(f"{i}|")},
        )
        for i, group in enumerate(facts["groups"])
    ]
    return results, facts


def trained(
    folder: Path, task: Task, fold: str, seed: int, data: Path, flags: list[str]
) -> tuple[list[GroupResult], dict]:
    """Train a run and score its test groups as the run itself does."""
    words, seconds = run_of(folder, task, fold, seed, data, flags)
    model, processor = AutoModel.from_pretrained(folder / "run"), AutoProcessor.from_pretrained(folder / "run")
    cells, _, _ = load_data(read_run(words), None)
    record, clip = RunRecord.load(folder / "run"), model.config.nonnegative_output
    real = real_cells_of(cells, processor, decoded=False)
    own = predicted_groups(model, processor, real, groups_of(cells))
    results = list(score_groups(real, own, processor.control, baselines_of(record.means, processor, clip), seed=0))
    settings = json.loads((folder / "run" / "training_args.json").read_text())
    steps = {name: settings[name] for name in ("max_steps", "schedule_steps")}
    return results, {"seconds": seconds, "parameters": model.num_parameters(), **steps}


def run_of(folder: Path, task: Task, fold: str, seed: int, data: Path, flags: list[str]) -> tuple[list[str], float]:
    """Train a run in a folder. Returns the words of its command, and the seconds of processor time that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "run.yaml"
    section = {"datasets": {"screen": str(data / task.file)}, **task.folds[fold]}
    config.write_text(yaml.safe_dump({"data": section}))
    words = [str(config), "--output_dir", str(folder / "run"), "--seed", str(seed), "--overwrite", *flags]
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        pertstate.train.main([*words, "--disable_tqdm", "true"])
    return words, time.process_time() - start


def section(task: Task, runs: dict[tuple[str, int], tuple[list[GroupResult], dict]]) -> str:
    """The table and the verdict of a task, as Markdown."""
    folds = list(dict.fromkeys(fold for fold, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    pooled = [result for fold in folds for result in over_seeds([runs[fold, seed][0] for seed in seeds])]
    averages = averages_of(pooled)
    lines = [f"## {task.question}", "", f"| | {' | '.join(METRICS)} |", "|---|" + "---|" * len(METRICS)]
    for method in methods_of(pooled):
        row = []
        for metric in METRICS:
            found = averages[(averages["method"] == method) & (averages["metric"] == metric)]
            row.append("-" if found.empty else figure(*found.iloc[0][["value", "low", "high"]]))
        name = "**a run with no model section**" if method == MODEL else "ceiling" if method == CEILING else method
        lines.append(f"| {name} | {' | '.join(row)} |")
    single = [averages_of([r for fold in folds for r in runs[fold, seed][0]]) for seed in seeds]
    spread = []
    for metric in METRICS:
        values = [of[(of["method"] == MODEL) & (of["metric"] == metric)]["value"].iloc[0] for of in single]
        spread.append(f"{metric} {min(values):.4f} to {max(values):.4f}")
    facts = [about for _, about in runs.values()]
    steps = ", ".join(f"{fold} {'/'.join(str(runs[fold, seed][1]['max_steps']) for seed in seeds)}" for fold in folds)
    lines += [
        "",
        f"{verdict_of(pooled)} Single seeds: {', '.join(spread)}. Steps chosen, by seed: {steps}. "
        f"{np.mean([about['seconds'] for about in facts]):.0f} s of processor time a run, the choice of steps included.",
        "",
    ]
    return "\n".join(lines)


def figure(value: float, low: float, high: float) -> str:
    return f"{value:.4f}" if low != low else f"{value:.4f} [{low:.4f}, {high:.4f}]"


if __name__ == "__main__":
    main()
