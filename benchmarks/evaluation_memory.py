"""
Peak memory of an evaluation in training, as the number of evaluated cells grows.

    python benchmarks/evaluation_memory.py [--cells 2000 8000] [--genes 1000]

Each evaluation is a process of its own, of a small model that was never trained. Two ways are compared: "streamed", the Trainer's, which
scores each group when its last sentence has come; and "kept", which keeps the predictions of all sentences and scores them at the
end. What is shown is the peak of the process during the evaluation beyond its memory before (Linux alone tells it), and the largest
difference between the figures of the two ways.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


RUN = """
import json, sys, tempfile
from contextlib import contextmanager
from pathlib import Path
import torch
from pertstate import StateConfig, StateForPerturbation
from pertstate.data import SentenceDataset, Splits, load_cells, simulate_screen
from pertstate.evaluation.group_scores import GroupScores
from pertstate.training import StateTrainer, StateTrainingArguments, trainer

way, cells, genes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
groups = 10


class AtTheEnd(GroupScores):
    def __call__(self, prediction, compute_result=True):
        return super().__call__(prediction, compute_result)


class Kept(StateTrainer):
    @contextmanager
    def _evaluating(self, dataset):
        yield


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "screen.h5ad"
    screen = simulate_screen(num_contexts=3, num_perturbations=groups, num_genes=genes, cells_per_group=cells // groups, seed=1)
    screen.write_h5ad(path)
    del screen
    loaded, processor = load_cells(Splits({"screen": [path]}, {"screen"}, {("screen", "type_2"): "val"}))
    torch.manual_seed(0)
    sizes = {"input_dim": processor.feature_dim, "num_perturbations": groups}
    model = StateForPerturbation(StateConfig.from_preset("tiny", **sizes))
    args = StateTrainingArguments(output_dir=folder, use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4)
    data = [SentenceDataset(loaded, processor, split, 32, shuffle=split == "train") for split in ("train", "val")]
    if way == "kept":
        trainer.GroupScores = AtTheEnd
    made = (Kept if way == "kept" else StateTrainer)(model, args, *data, processing_class=processor)
    made.learned_means()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    metrics = made.evaluate()
    peak = memory("VmHWM") - before
timed = ("time", "per_second")
print(json.dumps({"peak": peak, "figures": {name: value for name, value in metrics.items() if not name.endswith(timed)}}))
"""


def evaluation(way: str, cells: int, genes: int) -> dict:
    done = subprocess.run([sys.executable, "-c", RUN, way, str(cells), str(genes)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[2000, 8000], help="evaluated cells")
    parser.add_argument("--genes", type=int, default=1000)
    args = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        parser.error("the peak memory of an evaluation is read from /proc, which only Linux has")
    print(f"{'cells':>8}{'predicted':>12}{'kept':>12}{'streamed':>12}{'of kept':>9}{'difference':>12}")
    for cells in args.cells:
        kept, streamed = (evaluation(way, cells, args.genes) for way in ("kept", "streamed"))
        difference = max(abs(kept["figures"][name] - value) for name, value in streamed["figures"].items())
        sizes = "".join(
            f"{size:>8,.0f} MiB" for size in (cells * args.genes * 4 / 2**20, kept["peak"], streamed["peak"])
        )
        print(f"{cells:>8,}{sizes}{streamed['peak'] / kept['peak']:>9.2f}{difference:>12g}")


if __name__ == "__main__":
    main()
