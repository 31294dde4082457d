"""
Does reading a store cost more, the more cells it holds? Stores of more and more simulated cells are made and read as a training reads them.

    python benchmarks/scaling.py [--cells 1000000 3000000 10000000] [--genes 2000] [--density 0.1] [--set_size 512] [--seconds 60]

A file of `--cells_of_file` cells is written once. A store holds it again and again, each time as a data set of its own: its cells and its
groups grow alike. Each row has the size of the store, how fast `pertstate prepare` made it, how long a training takes to open
it, how many cells a second it gives in batches of 8 sentences (a cell is one perturbed cell with its control, dense float32), and the
largest memory of the reading process: its own, and the pages of the store that it shares with the system's cache.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prepare import write_screen


SENTENCES = 8
WARM_UP_SECONDS = 2.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--cells_of_file", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--set_size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="make the stores here")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read(args.read, args.set_size, args.seconds)))
        return
    print(
        "| cells | groups | store | bytes a cell | made, cells/s | opened in | read, cells/s | own memory | shared pages |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_screen(folder / "screen.h5ad", args.cells_of_file, args.genes, args.density, seed=0)
        for cells in args.cells:
            row(folder, cells, args)


def row(folder: Path, cells: int, args: argparse.Namespace):
    """Make a store of so many cells, read it, print the figures and remove it."""
    copies = max(1, cells // args.cells_of_file)
    datasets = {f"screen_{i}": str(folder / f"screen_{i}.h5ad") for i in range(copies)}
    for path in map(Path, datasets.values()):
        if not path.exists():
            os.link(folder / "screen.h5ad", path)
    (folder / "data.yaml").write_text(json.dumps({"data": {"datasets": datasets}}))
    store = folder / "store"
    words = ["--config", folder / "data.yaml", "--output", store, "--num-proc", args.num_proc, "--quiet", "--overwrite"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pertstate.cli", "prepare", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )
    made = time.perf_counter() - start
    size = sum(path.stat().st_size for path in store.iterdir())
    reading = [sys.executable, __file__, "--read", store, "--set_size", args.set_size, "--seconds", args.seconds]
    found = json.loads(subprocess.run([*map(str, reading)], check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"| {found['cells']:,} | {found['groups']:,} | {size / 1e9:.2f} GB | {size / found['cells']:.0f} | {found['cells'] / made:,.0f} | "
        f"{found['opened']:.1f} s | {found['rate']:,.0f} | {found['own']:,.0f} MiB | {found['shared']:,.0f} MiB |",
        flush=True,
    )


def read(store: Path, set_size: int, seconds: float) -> dict[str, float]:
    """Open a store and take batches for some seconds, as a training does."""
    from torch.utils.data import DataLoader

    from pertstate.base.constants import CELL_MASK, CONTROL_CELLS
    from pertstate.data import CellStore, SentenceCollator, SentenceDataset, Splits, load_store

    start = time.perf_counter()
    cells = CellStore(store)
    names = cells.groups["dataset"].unique()
    data, processor = load_store(cells, Splits({name: [] for name in names}, set(names)))
    dataset = SentenceDataset(data, processor, "train", set_size=set_size, seed=0, control_sentences=False)
    loader = DataLoader(dataset, batch_size=SENTENCES, collate_fn=SentenceCollator())

    def epochs():
        for epoch in itertools.count():
            dataset.set_epoch(epoch)
            yield from loader

    batches = epochs()
    next(batches)
    opened = time.perf_counter() - start
    warm = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < warm:
        next(batches)
    taken, start = 0, time.perf_counter()
    for batch in batches:
        mask = batch.get(CELL_MASK)
        taken += batch[CONTROL_CELLS].shape[:2].numel() if mask is None else int(mask.sum())
        if time.perf_counter() - start > seconds:
            break
    taken_in = time.perf_counter() - start
    memory = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "cells": cells.manifest.cells,
        "groups": len(cells.groups),
        "opened": opened,
        "rate": taken / taken_in,
        "own": int(memory["RssAnon"].split()[0]) / 2**10,
        "shared": int(memory["RssFile"].split()[0]) / 2**10,
    }


if __name__ == "__main__":
    main()
