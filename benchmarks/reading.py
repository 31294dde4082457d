"""
Processor time and memory of reading, of this checkout beside another one: `fit` and the cells of a run, `prepare`, `info`, `predict`, and
a training of 20 steps.

Each measurement runs in a process of its own; the two checkouts take turns, and the best of `--repeat` is shown. The files
are those of `--data`, and a simulated screen of 3,000 perturbations of 1 to 3 cells.

    git worktree add /tmp/before COMMIT
    python benchmarks/reading.py --other /tmp/before --data ../shared/data
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


JOB = r"""
import contextlib, inspect, io, json, logging, resource, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
job, path, folder, options = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
from pertstate.data import prepare
from pertstate.data.arguments import DataArguments
from pertstate.data.info import describe

def used():
    usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)

def cells():
    data = DataArguments(datasets=path, **options)
    if hasattr(data, "file_source"):
        from pertstate.data.cells import load
        source = data.file_source()
        return load(source, data.resolve_splits(source.groups), **data.fit_options())
    from pertstate.data.cells import load_cells
    return load_cells(data.resolve_splits(), contexts=data.contexts, hvg_on_all=data.hvg_on_all, **data.processor_options())

def predicted():
    import torch
    from pertstate import StateConfig, StateForPerturbation, StateProcessor
    from pertstate.evaluation.prediction import predict
    from pertstate.processing import Vocabulary
    import anndata as ad
    genes = ad.read_h5ad(path, backed="r").var_names.tolist()
    names = [f"p{i}" for i in range(3000)]
    processor = StateProcessor(Vocabulary(genes, names, ["line"], []), values="log1p", normalize="counts_to_log1p", set_size=64)
    torch.manual_seed(0)
    model = StateForPerturbation(StateConfig.from_preset("tiny", input_dim=len(genes), num_perturbations=3000, num_contexts=1))
    anew = {"overwrite": True} if "overwrite" in inspect.signature(predict).parameters else {}
    def run():
        start = used()
        done = predict(model, processor, path, folder / "p.h5ad", quiet=True, **anew, **options)
        return used() - start, done["cells"]
    return run

def trained():
    from pertstate import train
    run = {"data": {"datasets": path, **options}, "model": {"preset": "tiny"}, "training": {"max_steps": 20, "use_cpu": True,
           "disable_tqdm": True, "save_strategy": "no", "report_to": "none", "output_dir": str(folder / f"run{time.time_ns()}")}}
    file = folder / "run.yaml"
    file.write_text(json.dumps(run))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(file)])

if job == "predict":
    run = predicted()
    run()
    seconds, number = run()
else:
    work = {"cells": cells, "train": trained, "info": lambda: describe(path), "prepare": lambda: prepare(
        DataArguments(datasets=path, **options), folder / f"store{time.time_ns()}", quiet=True)}[job]
    work()  # imports
    start = used()
    work()
    seconds, number = used() - start, 0
print(json.dumps([seconds, number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def measure(checkout: Path, job: str, path: Path, options: dict) -> tuple[float, int, float]:
    """Seconds of processor time, cells and peak MiB of a job that runs with the package of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pertstate").symlink_to(checkout.resolve())
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", JOB, job, str(path), folder, json.dumps(options)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, cwd=folder)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def many_perturbations(path: Path, perturbations: int = 3000, genes: int = 60):
    """A screen of many perturbations, each of 1 to 3 cells, and 500 control cells."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    r = np.random.default_rng(0)
    names = ["control"] * 500 + [f"p{i}" for i in range(perturbations) for _ in range(r.integers(1, 4))]
    obs = pd.DataFrame({"perturbation": names, "cell_type": "line"}, index=[f"c{i}" for i in range(len(names))])
    counts = r.poisson(r.gamma(1, 2, genes), (len(names), genes)).astype(np.float32)
    ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])).write_h5ad(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="another checkout of the package")
    parser.add_argument("--data", type=Path, required=True, help="folder of .h5ad files")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        screen = Path(folder) / "many.h5ad"
        many_perturbations(screen)
        jobs = [
            (job, path, options)
            for path in sorted(args.data.glob("*.h5ad"))
            for job, options in (("cells", {}), ("cells", {"genes": 200}), ("prepare", {}), ("info", {}), ("train", {}))
        ]
        jobs += [("predict", screen, {"cells_per_perturbation": number}) for number in (1, 3)]
        jobs += [("predict", screen, {"perturbations": ["p0", "p1", "p2", "p3"]})]
        print(
            f"{'job':<9}{'file':<34}{'options':<36}{'other s':>9}{'here s':>9}{'ratio':>7}{'other MiB':>11}{'here MiB':>10}"
        )
        for job, path, options in jobs:
            best: dict[Path, list[float]] = {}
            for _ in range(args.repeat):
                for checkout in (args.other, here):
                    seconds, _, peak = measure(checkout, job, path, options)
                    known = best.setdefault(checkout, [seconds, peak])
                    best[checkout] = [min(known[0], seconds), min(known[1], peak)]
            (other, other_peak), (own, own_peak) = best[args.other], best[here]
            shown = json.dumps(options) if options else ""
            print(
                f"{job:<9}{path.name:<34}{shown:<36}{other:>9.3f}{own:>9.3f}{own / other:>7.2f}{other_peak:>11.0f}{own_peak:>10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
