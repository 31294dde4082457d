"""
From the command to the first optimisation step: `pertstate train FILE --test_contexts X`, beside imports alone.

    python benchmarks/first_step.py [--repeat 3] [--threads 2]

The step is the first of any kind; a run that chooses its number of steps takes it on an inner fold. The seconds are of a new
process, from its start. Imports of the same packages alone are measured in turn with the runs:

- `torch`: import torch
- `torch + transformers`: import torch, transformers, which loads few of transformers' modules
- `Trainer`: from transformers import Trainer, which every training with it needs
- `pertstate.train`: the modules of the command

The best of `--repeat` rounds is shown, and its ratio to that of `torch + transformers`. Processor seconds are those of all threads,
and depend less on what else the machine does.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


# The command, ended by a hook after the first step of an optimiser. As the command does, it keeps Python from looking for
# garbage among what is imported.
_COMMAND = """
import gc
gc.disable()
import os
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(17))
from pertstate.cli import main
main({words!r})
"""
_STEPPED = 17
_IMPORTS = {
    "torch": "import torch",
    "torch + transformers": "import torch, transformers",
    "Trainer": "from transformers import Trainer",
    "pertstate.train": "import gc; gc.disable(); import pertstate.train",
}
UNIT = "torch + transformers"


def seconds_of(code: str, expected: int = 0) -> tuple[float, float]:
    """Seconds and processor seconds of a new process that runs `code` and ends with the code `expected`."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise SystemExit(f"expected the exit code {expected}, found {done.returncode}: {done.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch (default: 2)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    from pertstate.data.simulator import simulate_screen

    with tempfile.TemporaryDirectory() as folder:
        codes = {name: (code, 0) for name, code in _IMPORTS.items()}
        screens = {
            "small file": simulate_screen(3, 4, num_genes=100, cells_per_group=20, seed=1),
            "demo screen": simulate_screen(seed=0),
        }
        for name, screen in screens.items():
            path = Path(folder, f"{name.replace(' ', '_')}.h5ad")
            screen.write_h5ad(path)
            words = ["train", str(path), "--test_contexts", screen.obs["cell_type"].unique()[-1]]
            words += ["--output_dir", str(Path(folder, "run")), "--overwrite", "--use_cpu", "true"]
            codes[f"first step, {name} ({screen.n_obs:,} x {screen.n_vars})"] = (
                _COMMAND.format(words=words),
                _STEPPED,
            )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
        for _ in range(args.repeat):
            for name, (code, expected) in codes.items():
                found[name].append(seconds_of(code, expected))
    print("| | seconds | ratio | processor seconds | ratio |\n|---|---|---|---|---|")
    for name, rounds in found.items():
        figures = []
        for i in range(2):
            best, unit = (min(of[i] for of in several) for several in (rounds, found[UNIT]))
            figures += [f"{best:.1f}", f"{best / unit:.2f}"]
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
