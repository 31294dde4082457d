"""
Ways to feed cell sentences to a model, measured side by side in one run: cells per second and memory.

    python benchmarks/loader.py
    python benchmarks/loader.py --peers-python ENVIRONMENT/bin/python

Every reader gives model-ready batches: 8 sentences of S perturbed cells and S matching control cells, two dense float32
tensors (8, S, genes). A cell, in cells per second, is a perturbed cell; the control cell that comes with it is not
counted. The first batch of every reader is checked: its shape, its values, and that each sentence holds one group and
controls of its cell type.

"store" is a cell store that `pertstate prepare` made: of log1p values, or, "of counts", of counts that are normalised as
they are read. Pages of its files that are mapped count as resident memory.

The files are simulated: 40,000 cells x 2,000 genes (one in ten expressed) with the same values in a dense `obsm` entry,
and 20,000 cells x 18,000 genes (one in twelve). They are read through the page cache, warm.

Each reader runs in a process of its own, in turns with the others, `--repeats` times: the best figure stands first, the
worst in parentheses. Peak memory is the largest resident set. It has the interpreter and its packages (at start), pages
of mapped files, and memory that workers do not share. Workers live on between epochs. After
the timing, five whole epochs of a quarter of the cells show whether memory grows.

cell-load keeps its defaults: its sentences of control cells count as cells. "scDataset, blocks" has an easier task: cells
in any order, which are not sentences. Readers fetch as many cells at once as they would from larger files: one that
fetches 16,384 cells holds a larger part of these files than of a screen of millions.

Other packages' readers need `pip install cell-load scDataset psutil`, here or in the environment of `--peers-python`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loader_readers import READERS, SENTENCES


HERE = Path(__file__).parent
BASELINE = "cell-load, random order"
MIB = 2**20
# Each file: genes, the share of them that a cell expresses, cells as a share of --cells, and whether there is a dense copy.
FILES = {2000: (0.1, 1.0, True), 18000: (0.08, 0.5, False)}
SET_SIZES = (64, 512)
SMALLEST = 20000
LAYOUTS = ((2000, "dense"), (2000, "sparse"), (18000, "sparse"))
PART_FOR_EPOCHS = 1 / 4
EPOCHS = 5


def write_files(folder: Path, cells: int) -> dict[int, tuple[Path, int]]:
    """Write the file of each number of genes, and count its cells. Like the readers, it runs in a process of its own."""
    files = {}
    for genes, (density, part, dense) in FILES.items():
        path = folder / f"{genes}_genes.h5ad"
        command = [sys.executable, str(HERE / "loader_data.py"), str(path), "--cells", str(int(cells * part))]
        command += ["--genes", str(genes), "--density", str(density)] + ["--dense"] * dense
        files[genes] = path, int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return files


class Runner:
    """Runs readers, each in a process of its own, and prepares once for each file what they need."""

    def __init__(self, readers: list[str], peers_python: str, folder: Path):
        self.readers, self.peers_python, self.folder = readers, peers_python, folder
        self.preparations: dict[Path, dict] = {}
        self.failed = False

    def run(self, name: str, file: Path, **job) -> dict:
        """What the reader measured, `{"missing": package}`, or `{"failed": its last lines}`."""
        prepare = READERS[name].prepare
        layout = "dense" if job["dense"] else "sparse"
        prepared = file.with_suffix("") / (f"{prepare.__name__}, {layout}" if prepare else "nothing")
        job = {"file": str(file), "prepared": str(prepared), "seconds": 0, "epochs": 0, **job}
        if prepare and not prepared.exists():
            prepared.mkdir(parents=True)
            self.preparations[prepared.relative_to(self.folder)] = self._measure(name, {**job, "task": "prepare"})
        return self._measure(name, job)

    def _measure(self, name: str, job: dict) -> dict:
        # This process stays small: on Linux a child's peak memory starts from that of the process that started it.
        job_file, result_file = self.folder / "job.json", self.folder / "result.json"
        job_file.write_text(json.dumps(job))
        result_file.unlink(missing_ok=True)
        python = self.peers_python if READERS[name].peer else sys.executable
        command = [python, str(HERE / "loader_readers.py"), name, str(job_file), str(result_file)]
        process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            self.failed = True
            print(f"{name} failed on {job}:\n{process.stderr[-3000:]}", file=sys.stderr)
            return {"failed": process.stderr.strip().splitlines()[-1]}
        return json.loads(result_file.read_text())

    def speeds(self, seconds: float, repeats: int, **job) -> dict[str, list[dict]]:
        results = {name: [] for name in self.readers}
        for _ in range(repeats):
            for name, runs in results.items():
                runs.append(self.run(name, task="speed", seconds=seconds, **job))
        return results

    def epochs(self, **job) -> dict[str, dict]:
        return {name: self.run(name, task="epochs", epochs=EPOCHS, **job) for name in self.readers}


def unmeasured(results: list[dict]) -> str | None:
    for result in results:
        if "missing" in result:
            return f"not installed ({result['missing']})"
        if "failed" in result:
            return "failed"
    return None


def best_and_worst(values: list[float], digits: int, largest: bool) -> str:
    ordered = sorted(values, reverse=largest)
    text = f"{ordered[0]:,.{digits}f}"
    return text if len(ordered) == 1 else f"{text} ({ordered[-1]:,.{digits}f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned as text, too."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def show(line):
        return "| " + " | ".join([line[0].ljust(widths[0]), *(w.rjust(n) for w, n in zip(line[1:], widths[1:]))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (n + 1) + ":" for n in widths[1:])]) + "|"
    return "\n".join([show(header), rule, *map(show, rows)])


def speed_table(results: dict[str, list[dict]]) -> str:
    header = ["reader", "cells/s", "x cell-load random", "first batch (s)", "at start (MiB)", "peak (MiB)"]
    speeds = {
        name: [result["cells"] / result["seconds"] for result in runs]
        for name, runs in results.items()
        if unmeasured(runs) is None
    }
    rows = []
    for name, runs in results.items():
        if name not in speeds:
            rows.append([name, unmeasured(runs), *["-"] * (len(header) - 2)])
            continue
        ratio = f"{max(speeds[name]) / max(speeds[BASELINE]):.2f}" if BASELINE in speeds else "-"
        rows.append(
            [
                name,
                best_and_worst(speeds[name], 0, largest=True),
                ratio,
                best_and_worst([run["first_batch_seconds"] for run in runs], 1, largest=False),
                f"{min(run['resident_at_start'] for run in runs) / MIB:,.0f}",
                best_and_worst([run["resident_peak"] / MIB for run in runs], 0, largest=False),
            ]
        )
    return table(header, rows)


def epochs_table(results: dict[str, dict], epochs: int) -> str:
    header = ["reader", "at start (MiB)", "after epoch 1", f"after epoch {epochs}", f"growth, epochs 2-{epochs} (%)"]
    rows = []
    for name, result in results.items():
        reason = unmeasured([result])
        if reason is not None:
            rows.append([name, reason, *["-"] * (len(header) - 2)])
            continue
        first, *_, last = result["resident_after_epochs"]
        figures = [f"{value / MIB:,.0f}" for value in (result["resident_at_start"], first, last)]
        rows.append([name, *figures, f"{100 * (last / first - 1):+.1f}"])
    return table(header, rows)


def preparation_table(preparations: dict[Path, dict]) -> str:
    rows = []
    for path, result in preparations.items():
        if unmeasured([result]) is not None:
            rows.append([str(path), unmeasured([result]), "-", "-"])
        else:
            sizes = [f"{result[key] / MIB:,.0f}" for key in ("resident_peak", "bytes")]
            rows.append([str(path), f"{result['seconds']:.1f}", *sizes])
    return table(["file, preparation", "seconds", "peak (MiB)", "on disk (MiB)"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=40000, help="of the smaller number of genes; the larger has half")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed, of each reader and repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), metavar="READER")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for other packages' readers")
    parser.add_argument(
        "--quick", action="store_true", help=f"{SMALLEST:,} cells, 1 second, 1 repeat, no epochs: does it run?"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cells, arguments.seconds, arguments.repeats = SMALLEST, 1.0, 1
    if arguments.cells < SMALLEST:
        parser.error(
            f"--cells {arguments.cells}: a batch of {SENTENCES} sentences of {SET_SIZES[-1]} needs {SMALLEST:,}"
        )

    begin = time.perf_counter()
    load = os.getloadavg()[0]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start, Python {platform.python_version()}\n"
        f"A cell is one perturbed cell of a batch of {SENTENCES} sentences; the control cell with it is not counted. Best of "
        f"{arguments.repeats} (worst), {arguments.seconds:g} s each. On a machine that also does other work the figures are "
        "provisional."
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner = Runner(arguments.readers, arguments.peers_python, folder)
        files = write_files(folder, arguments.cells)
        for genes, layout in LAYOUTS:
            file, cells = files[genes]
            for set_size in SET_SIZES:
                job = {"file": file, "genes": genes, "set_size": set_size, "dense": layout == "dense"}
                results = runner.speeds(arguments.seconds, arguments.repeats, **job)
                batch = 2 * SENTENCES * set_size * genes * 4 / MIB
                print(f"\n## S = {set_size}, {genes:,} genes, {layout}\n")
                print(f"{cells:,} cells; a batch is {batch:,.0f} MiB.\n\n{speed_table(results)}", flush=True)
        if not arguments.quick:
            files = write_files(folder / "epochs", int(arguments.cells * PART_FOR_EPOCHS))
            for genes, layout in LAYOUTS[::2]:
                file, cells = files[genes]
                results = runner.epochs(file=file, genes=genes, set_size=SET_SIZES[0], dense=layout == "dense")
                print(f"\n## Memory over epochs, S = {SET_SIZES[0]}, {genes:,} genes, {layout}, {cells:,} cells\n")
                print(epochs_table(results, EPOCHS), flush=True)
        if runner.preparations:
            print(f"\n## Preparation, once a file\n\n{preparation_table(runner.preparations)}")
    print(f"\nwhole run: {time.perf_counter() - begin:.0f} s")
    sys.exit(1 if runner.failed else 0)


if __name__ == "__main__":
    main()
