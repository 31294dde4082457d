"""
The readers that `loader.py` compares. Each runs in a process of its own:

    python benchmarks/loader_readers.py READER JOB.json RESULT.json

A job is a JSON object of the fields of [`Job`]. A reader opens the job's file and gives, epoch by epoch, batches of two
tensors (B, S, genes), dense float32: control cells and perturbed cells. Every reader imports what it needs and nothing
else, so that the readers of other packages run in an environment without pertstate.
"""

import importlib
import importlib.util
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


SENTENCES = 8
WARM_UP_SECONDS = 1.0
SECONDS_BETWEEN_LOOKS_AT_WORKERS = 0.5
SEED = 0

# The names in the simulated files.
PERTURBATION, CELL_TYPE, BATCH, CONTROL = "perturbation", "cell_type", "batch", "control"
DENSE, COUNTS = "X_hvg", "counts"
TARGET_SUM = 1e4
CELL_TYPES = 3
# The first genes encode the group of a cell by which of them are expressed, in counts, log1p values and the dense copy.
MARK_GENES = 12


def group_code(cell_type, perturbation):
    """The number of a group, from the numbers of its cell type and its perturbation (0 is the control)."""
    return 1 + cell_type + CELL_TYPES * perturbation


def groups_of(cells: np.ndarray) -> np.ndarray:
    """The group of every cell, from its first genes: (..., genes) to (...)."""
    return (cells[..., :MARK_GENES] > 0) @ (1 << np.arange(MARK_GENES))


@dataclass(frozen=True)
class Job:
    """
    One measurement.

    Args:
        file (`str`): the `.h5ad`, cells in random order.
        prepared (`str`): folder for what the reader makes from the file once, before it reads.
        genes, set_size (`int`): genes of a cell, cells of a sentence.
        dense (`bool`): read the dense `obsm` entry, not the sparse `X`.
        task (`str`): what is measured.

            - `"prepare"`: the preparation: seconds, peak memory, bytes on disk
            - `"speed"`: batches for `seconds`, after the warm-up: cells, seconds, peak memory
            - `"epochs"`: the resident memory after each of `epochs`
        seconds (`float`): of `"speed"`.
        epochs (`int`): of `"epochs"`.
    """

    file: str
    prepared: str
    genes: int
    set_size: int
    dense: bool
    task: str
    seconds: float
    epochs: int


# A function from the number of an epoch to its batches of control and perturbed cells, (B, S, genes) each.
Epochs = Callable[[int], Iterable[tuple]]


@dataclass(frozen=True)
class Reader:
    """
    Args:
        open: opens the job's file.
        modules: the modules that the reader needs; they are imported before memory is first measured.
        peer: whether the reader is another package's, which may have its own interpreter.
        sentences: whether its batches are cell sentences. If not, they are cells in any order, an easier task.
        prepare: makes what `open` reads, in `job.prepared`. Readers with the same function share what it makes.
    """

    open: Callable[[Job], Epochs]
    modules: tuple[str, ...]
    peer: bool = False
    sentences: bool = True
    prepare: Callable[[Job], None] | None = None


def in_memory(job: Job) -> Epochs:
    from pertstate.data import Splits, load_cells

    splits = Splits(datasets={"screen": [Path(job.file)]}, training={"screen"})
    cells, processor = load_cells(splits, input=f"obsm/{DENSE}" if job.dense else "X", batch_key=BATCH)
    return _pertstate_epochs(cells, processor, job, workers=0)


def _pertstate_epochs(cells, processor, job: Job, workers: int) -> Epochs:
    """The batches that training would see, without control sentences: only perturbed cells are counted."""
    from torch.utils.data import DataLoader

    from pertstate.base.constants import CONTROL_CELLS, LABELS
    from pertstate.data import SentenceCollator, SentenceDataset

    dataset = SentenceDataset(cells, processor, "train", set_size=job.set_size, seed=SEED, control_sentences=False)
    loader = DataLoader(
        dataset,
        batch_size=SENTENCES,
        collate_fn=SentenceCollator(),
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def epoch(number: int):
        dataset.set_epoch(number)
        for batch in loader:
            yield batch[CONTROL_CELLS], batch[LABELS]

    return epoch


def make_store(job: Job):
    """Make a cell store of what the job reads."""
    _make_store(job, f"obsm/{DENSE}" if job.dense else "X")


def make_store_of_counts(job: Job):
    """Make a cell store of counts, which serves any model."""
    _make_store(job, f"layers/{COUNTS}")


def _make_store(job: Job, source: str):
    from pertstate.data import prepare
    from pertstate.data.arguments import DataArguments

    arguments = DataArguments(datasets=job.file, batch_key=BATCH, input=source)
    prepare(arguments, Path(job.prepared, "store"), quiet=True)


def store(job: Job) -> Epochs:
    return _store(job, workers=0)


def store_two_workers(job: Job) -> Epochs:
    return _store(job, workers=2)


def _store(job: Job, workers: int) -> Epochs:
    from pertstate.data import CellStore, Splits, load_store

    cells = CellStore(Path(job.prepared, "store"))
    [name] = cells.groups["dataset"].unique()
    return _pertstate_epochs(*load_store(cells, Splits({name: []}, {name})), job, workers)


def h5py_rows(job: Job) -> Epochs:
    """What a `Dataset` of single cells does: it reads row by row, in the order drawn."""
    import h5py
    import torch

    file = h5py.File(job.file, "r")
    groups = _groups(file["obs"])
    if job.dense:
        matrix = file[f"obsm/{DENSE}"]

        def read(row: int, out: np.ndarray):
            out[:] = matrix[row]
    else:
        data, indices, indptr = file["X/data"], file["X/indices"], file["X/indptr"][:]

        def read(row: int, out: np.ndarray):
            stored = slice(indptr[row], indptr[row + 1])
            out[indices[stored]] = data[stored]

    def epoch(number: int):
        for controls, perturbed in _sentence_batches(groups, job.set_size, number):
            batch = np.zeros((2, *controls.shape, job.genes), dtype=np.float32)
            for row, out in zip(np.stack([controls, perturbed]).ravel(), batch.reshape(-1, job.genes)):
                read(row, out)
            yield torch.from_numpy(batch[0]), torch.from_numpy(batch[1])

    return epoch


def _groups(obs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of the perturbed cells of every (cell type, perturbation), and of the control cells of its cell type."""
    cell_type, perturbation = obs[f"{CELL_TYPE}/codes"][:], obs[f"{PERTURBATION}/codes"][:]
    names = obs[f"{PERTURBATION}/categories"].asstr()[:]
    is_control = names[perturbation] == CONTROL
    groups = []
    for line in np.unique(cell_type):
        controls = np.flatnonzero(is_control & (cell_type == line))
        for code in np.flatnonzero(names != CONTROL):
            groups.append((np.flatnonzero((perturbation == code) & (cell_type == line)), controls))
    return groups


def _sentence_batches(groups, set_size: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Control and perturbed rows (B, S) of each batch of an epoch. Every perturbed cell once; groups divide evenly."""
    generator = np.random.default_rng([SEED, epoch])
    sentences = [
        (generator.choice(controls, set_size, replace=False), part)
        for perturbed, controls in groups
        for part in generator.permutation(perturbed).reshape(-1, set_size)
    ]
    order = generator.permutation(len(sentences))
    for start in range(0, len(order), SENTENCES):
        chosen = [sentences[i] for i in order[start : start + SENTENCES]]
        yield np.stack([controls for controls, _ in chosen]), np.stack([perturbed for _, perturbed in chosen])


def cell_load_random(job: Job) -> Epochs:
    return _cell_load(job, job.file, consecutive=False)


def group_cells(job: Job):
    """Make the copy that consecutive loading needs, with cells grouped by (cell type, perturbation)."""
    import anndata as ad

    cells = ad.read_h5ad(job.file)
    order = cells.obs.sort_values([CELL_TYPE, PERTURBATION], kind="stable").index
    cells[order].write_h5ad(Path(job.prepared, "grouped.h5ad"))


def cell_load_consecutive(job: Job) -> Epochs:
    return _cell_load(job, str(Path(job.prepared, "grouped.h5ad")), consecutive=True)


def _cell_load(job: Job, path: str, consecutive: bool) -> Epochs:
    """cell-load with its defaults, control sentences included. Only names of columns, sizes and workers are set."""
    from cell_load.data_modules import PerturbationDataModule

    config = Path(path).with_suffix(f".{os.getpid()}.toml")
    config.write_text(f'[datasets]\nscreen = "{path}"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
    module = PerturbationDataModule(
        toml_config_path=str(config),
        embed_key=DENSE if job.dense else None,
        pert_col=PERTURBATION,
        cell_type_key=CELL_TYPE,
        batch_col=BATCH,
        control_pert=CONTROL,
        batch_size=SENTENCES,
        cell_sentence_len=job.set_size,
        num_workers=0,
        use_consecutive_loading=consecutive,
    )
    module.setup()
    config.unlink()
    loader = module.train_dataloader()

    def epoch(number: int):
        for batch in loader:
            shape = (-1, job.set_size, job.genes)
            yield batch["ctrl_cell_emb"].view(shape), batch["pert_cell_emb"].view(shape)

    return epoch


# The setting of scDataset's paper: blocks of 16 cells, 16,384 cells a fetch (256 x 64 there, 16 x 1,024 and 2 x 8,192 here).
BLOCK_SIZE = 16
CELLS_OF_FETCH = 16384


def scdataset_blocks(job: Job) -> Epochs:
    """The shuffled blocks of scDataset, as in its documentation. Half of a batch counts as the cells, half as their controls."""
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    source, read, to_tensor = _scdataset_source(job)
    batch_size = 2 * SENTENCES * job.set_size
    dataset = scDataset(
        source,
        BlockShuffling(block_size=BLOCK_SIZE),
        batch_size=batch_size,
        fetch_factor=max(1, CELLS_OF_FETCH // batch_size),
        drop_last=True,
        fetch_callback=read,
        batch_transform=to_tensor,
    )

    def epoch(number: int):
        for cells in DataLoader(dataset, batch_size=None, num_workers=0):
            batch = cells.view(2, SENTENCES, job.set_size, job.genes)
            yield batch[0], batch[1]

    return epoch


def scdataset_sentences(job: Job) -> Epochs:
    """
    The batched fetching of scDataset, with a sentence as the item. Its shuffled blocks are not used, because they mix perturbations.

    The cells of many sentences are read at once, in sorted order, and `batch_callback` deals them out to the sentences.
    """
    import h5py
    from scdataset import Streaming, scDataset
    from torch.utils.data import DataLoader

    source, read, to_tensor = _scdataset_source(job)
    with h5py.File(job.file, "r") as file:
        groups = _groups(file["obs"])

    def fetch(sentences, chosen):
        rows, places = np.unique(sentences[chosen], return_inverse=True)
        return read(source, rows), places

    def select(fetched, chosen):
        cells, places = fetched
        return cells[places[chosen].swapaxes(0, 1).ravel()]

    def epoch(number: int):
        batches = _sentence_batches(groups, job.set_size, number)
        sentences = np.concatenate([np.stack(batch, axis=1) for batch in batches])
        dataset = scDataset(
            sentences,
            Streaming(),
            batch_size=SENTENCES,
            fetch_factor=max(1, CELLS_OF_FETCH // (2 * SENTENCES * job.set_size)),
            fetch_callback=fetch,
            batch_callback=select,
            batch_transform=to_tensor,
        )
        for cells in DataLoader(dataset, batch_size=None, num_workers=0):
            batch = cells.view(2, -1, job.set_size, job.genes)
            yield batch[0], batch[1]

    return epoch


def _scdataset_source(job: Job):
    """What scDataset reads from, how sorted rows of it are read, and how the cells become a tensor."""
    import anndata as ad
    import h5py
    import torch

    if job.dense:
        # A backed AnnData reads `obsm` whole into memory; this stays on disk.
        return h5py.File(job.file, "r")[f"obsm/{DENSE}"], lambda source, rows: source[rows], torch.from_numpy
    backed = ad.read_h5ad(job.file, backed="r")
    return backed, lambda source, rows: source[rows].X, lambda cells: torch.from_numpy(cells.toarray())


PERTSTATE = ("psutil", "torch", "pertstate.data")
CELL_LOAD = ("psutil", "torch", "cell_load.data_modules")
SCDATASET = ("psutil", "torch", "anndata", "h5py", "scdataset")

READERS = {
    "store": Reader(store, PERTSTATE, prepare=make_store),
    "store, 2 workers": Reader(store_two_workers, PERTSTATE, prepare=make_store),
    "store of counts": Reader(store, PERTSTATE, prepare=make_store_of_counts),
    "in-memory": Reader(in_memory, PERTSTATE),
    "h5py rows": Reader(h5py_rows, ("psutil", "torch", "h5py")),
    "cell-load, random order": Reader(cell_load_random, CELL_LOAD, peer=True),
    "cell-load, consecutive": Reader(cell_load_consecutive, CELL_LOAD, peer=True, prepare=group_cells),
    "scDataset, sentences": Reader(scdataset_sentences, SCDATASET, peer=True),
    "scDataset, blocks": Reader(scdataset_blocks, SCDATASET, peer=True, sentences=False),
}


def missing_package(reader: Reader) -> str | None:
    """The first package of a reader that is not installed."""
    packages = [module.split(".")[0] for module in reader.modules]
    return next((package for package in packages if importlib.util.find_spec(package) is None), None)


def check(control, perturbed, job: Job, reader: Reader):
    """ValueError unless a batch is dense float32 sentences of the right shape, cells and values."""
    import torch

    for name, cells in (("control", control), ("perturbed", perturbed)):
        expected = (SENTENCES, job.set_size, job.genes)
        if tuple(cells.shape) != expected or cells.dtype != torch.float32 or cells.layout != torch.strided:
            raise ValueError(
                f"{name} cells: expected dense float32 {expected}, found {cells.layout} {cells.dtype} {tuple(cells.shape)}"
            )
        # Only a few cells are summed, so that this is not the peak of memory.
        totals = torch.expm1(cells[0, :8].double()).sum(-1)
        if not torch.allclose(totals, torch.full_like(totals, TARGET_SUM), rtol=1e-4):
            raise ValueError(f"{name} cells: expected log1p of counts that sum to 10,000, found sums like {totals[:3]}")
    if not reader.sentences:
        return
    perturbed, control = groups_of(perturbed.numpy()), groups_of(control.numpy())
    if (perturbed != perturbed[:, :1]).any():
        raise ValueError(f"expected cells of one group in a sentence, found groups {np.unique(perturbed[0])}")
    cell_type = (perturbed[:, :1] - 1) % CELL_TYPES
    if (control != group_code(cell_type, 0)).any():
        raise ValueError("expected control cells of the sentence's cell type, found others")


def resident() -> int:
    """The bytes of this process, and those of its workers that are not shared with it."""
    import psutil

    process = psutil.Process()
    return process.memory_info().rss + _of_workers(process)


def _of_workers(process) -> int:
    return sum(worker.memory_full_info().uss for worker in process.children(recursive=True))


def endless(epoch: Epochs) -> Iterator[tuple]:
    for number in itertools.count():
        batch = None
        for batch in epoch(number):
            yield batch
        if batch is None:
            raise ValueError(f"epoch {number} has no batch: the file holds too few cells for {SENTENCES} sentences")


def peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_preparation(reader: Reader, job: Job) -> dict:
    start = time.perf_counter()
    reader.prepare(job)
    seconds = time.perf_counter() - start
    files = [path for path in Path(job.prepared).rglob("*") if path.is_file()]
    return {"seconds": seconds, "resident_peak": peak_memory(), "bytes": sum(path.stat().st_size for path in files)}


def measure_epochs(reader: Reader, job: Job) -> dict:
    at_start, after = resident(), []
    epoch = reader.open(job)
    for number in range(job.epochs):
        for _batch in epoch(number):
            pass
        del _batch
        after.append(resident())
    return {"resident_at_start": at_start, "resident_after_epochs": after}


def measure_speed(reader: Reader, job: Job) -> dict:
    import psutil

    process = psutil.Process()
    at_start = resident()
    start = time.perf_counter()
    batches = endless(reader.open(job))
    opened = time.perf_counter()
    batch = next(batches)
    first = time.perf_counter() - start
    check(*batch, job, reader)
    while time.perf_counter() - opened < WARM_UP_SECONDS:
        batch = next(batches)
    cells, of_workers = 0, _of_workers(process)
    start = now = looked = time.perf_counter()
    while now - start < job.seconds:
        batch = next(batches)
        cells += batch[1].shape[0] * batch[1].shape[1]
        now = time.perf_counter()
        if now - looked > SECONDS_BETWEEN_LOOKS_AT_WORKERS:
            of_workers, looked = max(of_workers, _of_workers(process)), now
    return {
        "cells": cells,
        "seconds": now - start,
        "first_batch_seconds": first,
        "resident_at_start": at_start,
        "resident_peak": peak_memory() + of_workers,
    }


TASKS = {"prepare": measure_preparation, "speed": measure_speed, "epochs": measure_epochs}


def main():
    name, job_file, result_file = sys.argv[1:]
    reader, job = READERS[name], Job(**json.loads(Path(job_file).read_text()))
    package = missing_package(reader)
    if package is None:
        # Imported before memory is first measured, so that "at start" has the memory of the packages.
        for module in reader.modules:
            importlib.import_module(module)
        result = TASKS[job.task](reader, job)
    else:
        result = {"missing": package}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
