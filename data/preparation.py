"""
Files to a cell store, whatever their size. Each file is read from front to back, and once more for each of these: genes
are chosen, knock-downs are judged. Its cells are dealt out to the shards that they belong to, and each shard is sorted.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
from tqdm import tqdm

from pertstate.base.anndata_source import Places, Recipe
from pertstate.base.cell_source import GROUP_KEYS, check_controls, choose_genes, settle_values
from pertstate.base.console import guard_this_process
from pertstate.base.constants import Split, Values
from pertstate.base.finite import are_finite
from pertstate.base.messages import closest, given
from pertstate.base.outputs import Kind, claimed_folder, whole_folder
from pertstate.base.processes import LostProcessError, check_guarded, end_with_parent, with_imports
from pertstate.base.processor_files import READING, is_default
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.cells import assign_splits, trained_on
from pertstate.data.cluster import check_distributed, on_cluster
from pertstate.data.knockdown import filter_knockdowns
from pertstate.data.manifest import (
    BARCODE,
    EMBEDDING,
    EXPRESSION,
    GENE_IDS,
    GENE_VALUES,
    OBS,
    STORE_FILE,
    TOTAL,
    Manifest,
    files_of,
    sha256_of,
)
from pertstate.data.reading import AnnDataFile
from pertstate.data.source import FilePart, FileSource, open_part
from pertstate.data.store import CellStore
from pertstate.processing import StateProcessor


LARGEST_COUNT = 2**32 - 1  # a store keeps counts in 32 bits at most
# What is a part of a store, and goes when another takes its place.
STORE = Kind(
    "cell store",
    (STORE_FILE,),
    lambda name: name in (STORE_FILE, "state.json", "dataset_info.json") or fnmatchcase(name, "data-*-of-*.arrow"),
)
PLACE = "place"  # of a cell in the store, while it is on its way there
_PART = ".part-"  # in the name of a file that is being written


def prepare(
    data: DataArguments,
    output: str | os.PathLike,
    options: PrepareArguments | None = None,
    num_proc: int = 1,
    quiet: bool = False,
    overwrite: bool = False,
    scheduler: str | None = None,
) -> CellStore:
    """
    Make a cell store of the files that a run names. Memory stays bounded, whatever the size of the files. A kill, an
    error or a full disk leaves no store.

    Args:
        data ([`DataArguments`]): the files, how to read them, and what is held out: genes are chosen on training cells
            alone.
        output: the folder to write. It appears whole or not at all.
        options ([`PrepareArguments`], *optional*): how the store is laid out.
        num_proc (`int`): number of processes, each of which reads one file at a time. The store does not depend on it.
        quiet (`bool`): no progress bars.
        overwrite (`bool`): replace a store that is there.
        scheduler (`str`, *optional*): address of a Dask scheduler whose workers do the work instead of processes of this machine. They
            have to see the files and the output under the same names.

    Raises:
        KeyError, ValueError, FileNotFoundError: a file, a column or a value is not what it should be.
        FileExistsError, InUseError: see [`claimed_folder`].
        OSError: the disk is full; the output is as it was.
        LostProcessError: a process was killed; the output is as it was.
    """
    check_guarded()
    options = options or PrepareArguments()
    if data.store is not None:
        raise ValueError("data.store names a store: give the files that a new one is made of, in datasets or splits")
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, found {num_proc}")
    if scheduler is not None:
        check_distributed()
        output = Path(output).absolute()
    workers = _Workers(num_proc, scheduler, quiet)
    with claimed_folder(output, STORE, overwrite), whole_folder(output, STORE) as folder:
        plan = _plan(data, options, quiet)
        runs = _write_runs(plan, folder, workers)
        shards = _write_shards(plan.layout, folder, runs, workers)
        for left in folder.glob(f"*{_PART}*"):
            left.unlink()  # by a worker that was killed
        _write_descriptions(plan, folder, shards)
    return CellStore(output)


@dataclass
class _Workers:
    """Who does the jobs: processes of this machine, or the workers of a Dask scheduler."""

    num_proc: int
    scheduler: str | None
    quiet: bool

    def named(self, file: FilePart) -> FilePart:
        """A file as workers find it: those of a cluster stand in folders of their own."""
        if self.scheduler is None or not isinstance(file.path, Path):
            return file
        return replace(file, path=file.path.absolute())

    def do(self, jobs: Sequence[Callable], sizes: list[int], what: str, inner_progress: bool = False) -> list:
        """The results of all jobs, in order, with a progress bar of cells."""
        with tqdm(total=sum(sizes), unit="cells", unit_scale=True, disable=self.quiet, desc=what) as bar:
            if self.scheduler is not None:
                return on_cluster(self.scheduler, jobs, lambda number: bar.update(sizes[number]))
            if self.num_proc == 1 or len(jobs) == 1:
                results = []
                for job, size in zip(jobs, sizes):
                    results.append(job(progress=bar.update) if inner_progress else job())
                    bar.update(0 if inner_progress else size)
                return results
            processes = min(self.num_proc, len(jobs))
            with ProcessPoolExecutor(processes, with_imports(__name__), initializer=_begin) as pool:
                futures = {pool.submit(job): i for i, job in enumerate(jobs)}
                results = [None] * len(jobs)
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = future.result()
                        bar.update(sizes[futures[future]])
                except BrokenProcessPool as error:
                    raise LostProcessError from error
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)  # the first error is that of all
                    raise
                return results


# What goes where


@dataclass
class _Layout:
    """How the cells are laid out. Every process that reads or writes cells gets a copy."""

    groups: pd.DataFrame
    sizes: np.ndarray
    recipe: Recipe
    options: PrepareArguments
    obs_columns: dict[str, str]
    cells_of_shard: int

    @property
    def cells(self) -> int:
        return int(self.sizes.sum())

    @property
    def num_shards(self) -> int:
        return -(-self.cells // self.cells_of_shard)


@dataclass
class _Plan:
    """Everything known before the cells are written."""

    source: FileSource
    layout: _Layout
    processor: StateProcessor
    highly_variable: int | None
    notes: list[str]

    def places(self) -> list[Places]:
        """For each file, the places of its cells: the cells of a group are in the order of the files."""
        places, found = Places(self.layout.sizes), []
        for file in self.source.parts:
            found.append(places.copy())
            places.pass_over(file.codes)
        return found


def _plan(data: DataArguments, options: PrepareArguments, quiet: bool) -> _Plan:
    source = data.file_source()
    splits = data.resolve_splits(source.groups, source.reader)
    notes = list(source.notes)

    def learned_from(split: bool) -> np.ndarray:
        """The groups to learn from: those for training; all, where nothing depends on the split."""
        if not split:
            return np.ones(len(source.groups), dtype=bool)
        return trained_on(assign_splits(source.groups, splits, source.reader.control), splits)

    check_controls(source.groups, source.reader)
    median = data.target_sum == "median"
    with _progress(source, "count", quiet or not median):
        values = settle_values(source, source.reader, learned_from(median), data.normalize, data.target_sum)
    if options.knockdown_filter:
        if source.expression is None:
            raise ValueError("prepare.knockdown_filter needs expression: set gene_input beside the embedding")
        with _progress(source, "judge knock-downs", quiet):
            notes += filter_knockdowns(source, options, values.target_sum)
    asked = data.chosen_genes()
    number = isinstance(asked, int)
    with _progress(source, "choose genes", quiet or not number):
        genes = choose_genes(source, values.target_sum, learned_from(number and not data.hvg_on_all), asked)
    columns = _obs_columns(source.parts, source.reader, options.obs_columns, notes)
    recipe = source.recipe(genes)
    groups = source.groups[[name for name in GROUP_KEYS if name in source.groups]]
    layout = _Layout(groups, source.sizes, recipe, options, columns, _cells_of_shard(source.parts, recipe, options))
    variable = asked if isinstance(asked, int) and source.expression is not None else None
    return _Plan(source, layout, values, variable, notes)


@contextmanager
def _progress(source: FileSource, what: str, quiet: bool) -> Iterator[None]:
    """A progress bar of the cells that are read of a source."""
    with tqdm(total=int(source.sizes.sum()), unit="cells", unit_scale=True, disable=quiet, desc=what) as bar:
        source.progress = bar.update
        try:
            yield
        finally:
            source.progress = None


def _obs_columns(sources, reader: StateProcessor, asked: list[str] | None, notes: list[str]) -> dict[str, str]:
    """The columns of `obs` to keep, each with the type that holds its values of all files, by Arrow's name for it."""
    labels = {key for key in (reader.perturbation_key, reader.context_key, reader.batch_key) if isinstance(key, str)}
    kinds: dict[str, set[str]] = {}
    for source in sources:
        with AnnDataFile(source.path) as data:
            for name in asked or ():
                if name not in data.obs_columns:
                    raise KeyError(f"{source.path}: obs has no column {name!r}; {closest(name, data.obs_columns)}")
            wanted = [c for c in (data.obs_columns if asked is None else asked) if c not in labels]
            first = data.obs_rows(slice(0, 1), wanted)
        for name in wanted:
            kinds.setdefault(name, set()).add(_kind_of_column(first[name].dtype))
        if asked is None and kinds.keys() - set(wanted):
            notes.append(
                f"columns of obs that {source.path} lacks are left out: {sorted(kinds.keys() - set(wanted))[:10]}"
            )
            kinds = {name: kind for name, kind in kinds.items() if name in wanted}
    ranks = ("bool", "int64", "uint64", "float64", "string")
    together = {}
    for name, found in kinds.items():
        mixed = len(found) > 1 and found != {"int64", "float64"}
        together[name] = "string" if mixed else max(found, key=ranks.index)
    in_all = [set(_columns_of(source)) for source in sources] if asked is None and len(sources) > 1 else []
    return {name: kind for name, kind in together.items() if all(name in columns for columns in in_all)}


def _columns_of(source: FilePart) -> list[str]:
    with AnnDataFile(source.path) as data:
        return data.obs_columns


def _kind_of_column(dtype) -> str:
    if dtype == np.uint64:
        return "uint64"
    kind = dtype.kind if isinstance(dtype, np.dtype) else "O"
    return {"b": "bool", "i": "int64", "u": "int64", "f": "float64"}.get(kind, "string")


def _cells_of_shard(sources: list[FilePart], recipe: Recipe, options: PrepareArguments) -> int:
    """How many cells make a shard of the size that is asked for, judged by the first cells of each file."""
    of_cell, cells = 0.0, 0
    for source in sources:
        with open_part(source, recipe) as reading:
            block = next((block for _, block in reading.blocks()), None)
        if block is None:
            continue
        size = 128 if block.embedding is None else 128 + 4 * block.embedding.shape[1]
        if block.expression is not None:
            dense = options.layout == "dense"
            size += 4 * len(recipe.genes) if dense else 8 * block.expression.nnz / block.expression.shape[0]
        number = int((source.codes >= 0).sum())
        of_cell, cells = of_cell + size * number, cells + number
    return max(1, int(options.shard_megabytes * 2**20 / (of_cell / cells)))


# From files to runs: the cells of one file, dealt out by shard


@dataclass
class _Run:
    """The cells of one file in an Arrow file: one record batch for each block and shard."""

    path: Path
    shard_of_batch: list[int]
    largest: float


def _write_runs(plan: _Plan, folder: Path, workers: _Workers) -> list[_Run]:
    jobs = [
        partial(_write_run, workers.named(file), places, folder / f"run-{i}.arrow", plan.layout)
        for i, (file, places) in enumerate(zip(plan.source.parts, plan.places()))
    ]
    sizes = [len(file.codes) for file in plan.source.parts]
    return workers.do(jobs, sizes, "read", inner_progress=True)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A place to write to, which takes its name when it is whole: two workers may do the same job."""
    partial_path = path.with_name(f"{path.name}{_PART}{uuid4().hex}")
    try:
        yield partial_path
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def _write_run(file: FilePart, places: Places, path: Path, layout: _Layout, progress=None) -> _Run:
    shards, largest, writer = [], 0.0, None
    with open_part(file, layout.recipe) as reading, ExitStack() as stack:
        for rows, block in reading.blocks():
            order = np.argsort(block.codes, kind="stable")
            place = places.take(block.codes)[order]
            if block.expression is not None and block.expression.nnz:
                largest = max(largest, float(block.expression.data.max()))
                if layout.recipe.kind == Values.COUNTS and largest > LARGEST_COUNT:
                    raise ValueError(
                        f"{layout.recipe.expression} holds a count of {largest:.0f} in cells {rows.start} to {rows.stop - 1}; "
                        f"expected at most {LARGEST_COUNT:,} (2^32 - 1)"
                    )
            batch = _arrow_of(block, reading.data.obs_rows(rows, list(layout.obs_columns)), rows.start, order, layout)
            batch = batch.append_column(PLACE, pa.array(place))
            if writer is None:
                sink = stack.enter_context(pa.OSFile(str(stack.enter_context(_written(path))), "wb"))
                writer = stack.enter_context(pa.ipc.new_file(sink, batch.schema))
            shard = place // layout.cells_of_shard
            edges = np.flatnonzero(np.r_[True, shard[1:] != shard[:-1], True])
            for start, stop in zip(edges[:-1], edges[1:]):
                writer.write_batch(batch.slice(start, stop - start))
                shards.append(int(shard[start]))
            if progress is not None:
                progress(rows.stop - rows.start)
    return _Run(path, shards, largest)


def _arrow_of(block, obs: pd.DataFrame, first: int, order: np.ndarray, layout: _Layout) -> pa.RecordBatch:
    """The cells of a block in another order."""
    columns: dict[str, pa.Array] = {}
    obs = obs.iloc[block.rows[order] - first]
    if block.expression is not None:
        part = block.expression[order]
        values = part.data.astype(np.uint32 if layout.recipe.kind == Values.COUNTS else np.float32)
        if layout.options.layout == "dense":
            dense = sp.csr_matrix((values, part.indices, part.indptr), shape=part.shape).toarray()
            columns[EXPRESSION] = pa.FixedSizeListArray.from_arrays(pa.array(dense.ravel()), part.shape[1])
        else:
            offsets = pa.array(part.indptr.astype(np.int32))
            columns[GENE_IDS] = pa.ListArray.from_arrays(offsets, pa.array(part.indices.astype(np.int32)))
            columns[GENE_VALUES] = pa.ListArray.from_arrays(offsets, pa.array(values))
        if block.totals is not None:
            columns[TOTAL] = pa.array(block.totals[order])
    if block.embedding is not None:
        flat = pa.array(np.ascontiguousarray(block.embedding[order]).ravel())
        columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(flat, block.embedding.shape[1])
    columns[BARCODE] = pa.array(obs.index.astype(str), type=pa.string())
    for name, kind in layout.obs_columns.items():
        values = obs[name].astype(object).where(obs[name].notna(), None)
        if kind == "string":
            values = [None if value is None else str(value) for value in values]
        columns[OBS + name] = pa.array(values, type=pa.type_for_alias(kind))
    return pa.RecordBatch.from_pydict(columns)


# From runs to shards


def _write_shards(layout: _Layout, folder: Path, runs: list[_Run], workers: _Workers) -> list[dict]:
    value_type = _value_type(layout, max(run.largest for run in runs))
    cells = layout.cells
    jobs, sizes = [], []
    for shard in range(layout.num_shards):
        rows = range(shard * layout.cells_of_shard, min((shard + 1) * layout.cells_of_shard, cells))
        path = folder / f"data-{shard:05d}-of-{layout.num_shards:05d}.arrow"
        jobs.append(partial(_write_shard, shard, rows, path, runs, layout, value_type))
        sizes.append(len(rows))
    shards = workers.do(jobs, sizes, "write")
    for run in runs:
        run.path.unlink(missing_ok=True)
    return shards


def _value_type(layout: _Layout, largest: float) -> pa.DataType:
    if layout.recipe.kind == Values.COUNTS:
        if layout.options.dtype != "auto":
            raise ValueError(
                f"prepare.dtype={layout.options.dtype!r}: counts are stored exactly, as whole numbers; use 'auto'"
            )
        return pa.from_numpy_dtype(np.min_scalar_type(int(largest)))
    return pa.float16() if layout.options.dtype == "float16" else pa.float32()


def _write_shard(
    shard: int, rows: range, path: Path, runs: list[_Run], layout: _Layout, value_type: pa.DataType
) -> dict:
    parts = []
    for run in runs:
        numbers = [i for i, of in enumerate(run.shard_of_batch) if of == shard]
        if numbers:
            file = pa.ipc.open_file(pa.memory_map(str(run.path)))
            parts += [file.get_batch(i) for i in numbers]
    table = pa.Table.from_batches(parts)
    order = np.argsort(table[PLACE].to_numpy())
    if not np.array_equal(table[PLACE].to_numpy()[order], np.arange(rows.start, rows.stop)):
        raise ValueError("the files changed while they were read; prepare the store again")
    batch = table.drop_columns([PLACE]).combine_chunks().to_batches()[0].take(pa.array(order))
    del table, parts
    columns = {name: _final(batch.column(name), name, value_type) for name in batch.schema.names}
    codes = np.searchsorted(np.cumsum(layout.sizes), np.arange(rows.start, rows.stop), side="right")
    for name in layout.groups.columns:
        names, of_group = np.unique(layout.groups[name].to_numpy(), return_inverse=True)
        columns[name] = pa.DictionaryArray.from_arrays(of_group[codes].astype(np.int32), names)
    final = pa.RecordBatch.from_pydict(columns)
    with (
        _written(path) as place,
        pa.OSFile(str(place), "wb") as sink,
        pa.ipc.new_stream(sink, final.schema) as writer,
    ):
        writer.write_batch(final)
    return {"file": path.name, "cells": len(rows), "bytes": path.stat().st_size, "sha256": sha256_of([path])}


def _final(column: pa.Array, name: str, value_type: pa.DataType) -> pa.Array:
    """A column in the type that it has in the store."""
    if name == GENE_VALUES:
        return pa.ListArray.from_arrays(column.offsets, _half(column.values, name, value_type))
    if name in (EXPRESSION, EMBEDDING):
        of = value_type if name == EXPRESSION or value_type == pa.float16() else pa.float32()
        return pa.FixedSizeListArray.from_arrays(_half(column.flatten(), name, of), column.type.list_size)
    if name.startswith(OBS) and column.type == pa.string():
        return column.dictionary_encode()
    return column


def _half(numbers: pa.Array, name: str, value_type: pa.DataType) -> pa.Array:
    """Numbers in the type of the store. ValueError where one is infinite in float16."""
    cast = numbers.cast(value_type)
    if value_type == pa.float16() and not are_finite(cast.to_numpy(zero_copy_only=False)):
        largest = np.abs(numbers.to_numpy(zero_copy_only=False)).max()
        raise ValueError(
            f"prepare.dtype='float16' holds numbers up to 65,504, found {largest:g} in {name}; use 'float32'"
        )
    return cast


# The files that describe the store


def _write_descriptions(plan: _Plan, folder: Path, shards: list[dict]):
    """Write `store.json`, and the two files by which `datasets.load_from_disk` knows the folder."""
    vocabularies, groups = {}, {}
    for name in plan.layout.groups.columns:
        names, codes = np.unique(plan.layout.groups[name].to_numpy(), return_inverse=True)
        vocabularies[name], groups[name] = names.tolist(), codes.tolist()
    groups["offset"] = (np.cumsum(plan.layout.sizes) - plan.layout.sizes).tolist()
    groups["length"] = plan.layout.sizes.tolist()
    schema = pa.ipc.open_stream(pa.memory_map(str(folder / shards[0]["file"]))).schema
    recipe = plan.layout.recipe
    values = next(
        schema.field(name).type.value_type for name in (GENE_VALUES, EXPRESSION, EMBEDDING) if name in schema.names
    )
    manifest = Manifest(
        cells=plan.layout.cells,
        genes=recipe.genes,
        reading={name: value for name in READING if not is_default(name, value := getattr(plan.processor, name))},
        expression=recipe.kind,
        layout="dense" if plan.layout.options.layout == "dense" else "sparse",
        dtype=np.dtype(values.to_pandas_dtype()).name,
        embedding_dim=schema.field(EMBEDDING).type.list_size if EMBEDDING in schema.names else None,
        normalize=plan.processor.normalize,
        target_sum=given("target_sum", plan.processor.target_sum),
        vocabularies=vocabularies,
        groups=groups,
        shards=shards,
        sources=[_describe(file) for file in plan.source.parts],
        highly_variable=plan.highly_variable,
        scale=plan.processor.scale,
        notes=plan.notes,
    )
    _describe_for_datasets(schema, shards, folder)
    manifest.write(folder / STORE_FILE)


def _describe(source: FilePart) -> dict:
    files = files_of(source.path)
    return {
        "dataset": source.dataset,
        "path": source.path.name,
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": sha256_of(files),
        "cells": int((source.codes >= 0).sum()),
        "genes": len(source.var_names),
    }


def _describe_for_datasets(schema: pa.Schema, shards: list[dict], folder: Path):
    from datasets import DatasetInfo, Features

    DatasetInfo(features=Features.from_arrow_schema(schema)).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": Split.TRAIN,
    }
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def _begin():
    """A worker process ends when its parent is killed. Otherwise it would wait for work for ever."""
    guard_this_process()
    end_with_parent()
