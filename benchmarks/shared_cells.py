"""
Memory and time of reading cells of a file into memory, as the number of processes on the machine grows.

    python benchmarks/shared_cells.py [--cells 20000] [--genes 2000] [--processes 2 4] [--repeat 3]

The processes find one another over gloo, as those of `accelerate launch` do. Two ways are compared: "shared", that of a run, in which
each reads a part of the file into memory that all have; and "each", in which every one reads all for itself. What is shown is the
memory of all processes together beyond that before the reading (the proportional set size: a page that several have counts once; Linux
alone tells it), as a multiple of the cells' own size, and the time until the last one has read: the median memory and the best time of
`--repeat`, in which the ways take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


RUN = """
import json, sys, time
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import gather_object
from pertstate.base.cell_source import ROOM
from pertstate.data import Splits
from pertstate.data.cells import choose, read_cells
from pertstate.data.shared_arrays import SharedRoom
from pertstate.data.source import FileSource
from pertstate.processing import StateProcessor


def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


paths = [Path(sys.argv[1])]
state = PartialState(cpu=True)
source = FileSource({"screen": paths}, StateProcessor())
groups, processor = choose(source, Splits({"screen": paths}, {"screen"}))
state.wait_for_everyone()
before, start = gather_object([memory()]), time.perf_counter()
cells = read_cells(source, groups, processor, SharedRoom() if sys.argv[2] == "shared" else ROOM)
state.wait_for_everyone()
seconds, after = time.perf_counter() - start, gather_object([memory()])
state.wait_for_everyone()
if state.is_main_process:
    print(json.dumps([(sum(after) - sum(before)) / cells.features.nbytes, seconds]))
"""


def measure(path: Path, way: str, processes: int, port: int) -> tuple[float, float]:
    """Memory of all processes as a multiple of the cells', and seconds."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)} for i in range(processes)]
    words = [sys.executable, "-c", RUN, str(path), way]
    running = [
        subprocess.Popen(words, env=common | (rank if processes > 1 else {}), stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a process failed, see above")
    return tuple(json.loads(said[0].splitlines()[-1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    from pertstate.data import simulate_screen

    with tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder) / "screen.h5ad", 29_600 + time.time_ns() % 1000
        each = args.cells // 20
        simulate_screen(
            num_contexts=2, num_perturbations=9, num_genes=args.genes, cells_per_group=each, seed=1
        ).write_h5ad(path)
        print(f"{'processes':>9}  {'way':<7}{'memory / cells':>15}{'seconds':>9}")
        for processes in args.processes:
            found: dict[str, list[tuple[float, float]]] = {"each": [], "shared": []}
            for _ in range(args.repeat):
                for way, measured in found.items():
                    measured.append(measure(path, way, processes, port))
                    port += 1
            for way, measured in found.items():
                memory, seconds = zip(*measured)
                print(f"{processes:>9}  {way:<7}{statistics.median(memory):>15.2f}{min(seconds):>9.2f}", flush=True)


if __name__ == "__main__":
    main()
