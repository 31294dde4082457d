"""The cell store: it returns what was in the files, whatever their format, and a part of a store is refused."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import pertstate.train
from pertstate.base.constants import Values
from pertstate.base.vocabulary import Vocabulary
from pertstate.cli import main
from pertstate.data import (
    CellStore,
    SentenceCollator,
    SentenceDataset,
    load_store,
    prepare,
    simulate_screen,
)
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.cells import load
from pertstate.data.manifest import STORE_FILE
from pertstate.data.store import StoredRows, StoreSource
from pertstate.data.stores import open_store, write_parquet
from pertstate.processing import StateProcessor


GENES = 80


def screen(seed=0) -> ad.AnnData:
    """Cells in random order; counts in X, log1p in a layer, an embedding, columns of every type."""
    adata = simulate_screen(
        num_contexts=3, num_perturbations=4, num_genes=GENES, cells_per_group=15, combinations=[(0, 1)], seed=seed
    )
    rng = np.random.default_rng(seed)
    adata = adata[rng.permutation(adata.n_obs)].copy()
    adata.obs_names = [f"zelle_{i}é" for i in range(adata.n_obs)]
    adata.layers["log1p"] = sp.csr_matrix(StateProcessor.fit(adata).features(adata))
    adata.obsm["X_emb"] = rng.normal(size=(adata.n_obs, 5)).astype(np.float32)
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel().astype(np.float64)
    adata.obs["rank"] = np.arange(adata.n_obs)
    adata.obs["doublet"] = rng.random(adata.n_obs) < 0.2
    adata.obs["phase"] = pd.Categorical(rng.choice(["G1", "S"], adata.n_obs), ["unused", "S", "G1"])
    adata.obs["donor"] = np.where(rng.random(adata.n_obs) < 0.5, "d", None)
    return adata


@pytest.fixture(scope="module")
def whole() -> ad.AnnData:
    return screen()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, whole) -> Path:
    """The screen as one file, and its halves as a folder of two."""
    folder = tmp_path_factory.mktemp("store")
    whole.write_h5ad(folder / "screen.h5ad")
    (folder / "halves").mkdir()
    whole[:200].write_h5ad(folder / "halves" / "a.h5ad")
    whole[200:].write_h5ad(folder / "halves" / "b.h5ad")
    return folder


def arguments(folder, **fields) -> DataArguments:
    return DataArguments(**{"datasets": {"screen": f"{folder}/halves"}, "batch_key": "batch", **fields})


@pytest.fixture(scope="module")
def store(folder) -> CellStore:
    return prepare(arguments(folder), folder / "counts.store", PrepareArguments(shard_megabytes=1), quiet=True)


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


# What comes out is what went in


def assert_holds(store: CellStore, whole: ad.AnnData, layer: str | None = None):
    """Assert that a store holds every cell of `whole` once, sorted into groups, with its values, barcode and columns."""
    found = store.to_anndata()
    assert sorted(found.obs_names) == sorted(whole.obs_names)
    expected = whole[found.obs_names]
    if store.manifest.expression is not None:
        values = expected[:, found.var_names].layers[layer] if layer else expected[:, found.var_names].X
        np.testing.assert_array_equal(dense(found.X), dense(values))
    for column in ("perturbation", "cell_type"):
        assert found.obs[column].astype(str).tolist() == expected.obs[column].astype(str).tolist()
    labels = found.obs[["dataset", "cell_type", "perturbation"]].astype(str).apply(tuple, axis=1).tolist()
    assert labels == sorted(labels)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("options", [{}, {"layout": "dense"}])
def test_a_store_holds_every_cell_once(folder, whole, tmp_path, num_proc, options):
    store = prepare(arguments(folder), tmp_path / "s", PrepareArguments(**options), num_proc=num_proc, quiet=True)
    assert_holds(store, whole)
    assert (store.manifest.expression, store.manifest.normalize, store.manifest.target_sum) == (
        "counts",
        "counts_to_log1p",
        1e4,
    )
    assert store.manifest.dtype == str(np.min_scalar_type(int(whole.X.max())))
    found, expected = store.obs(), whole.obs.loc[store.obs().index]
    assert (found["dataset"] == "screen").all()
    for name in ("depth", "rank", "doublet"):
        assert found[name].dtype == expected[name].dtype and found[name].tolist() == expected[name].tolist()
    for name in ("phase", "batch"):
        assert found[name].astype(str).tolist() == expected[name].astype(str).tolist()
    assert found["donor"].astype(object).fillna("").tolist() == expected["donor"].astype(object).fillna("").tolist()
    np.testing.assert_array_equal(store.totals(np.arange(len(store))), found["depth"])


def test_a_file_of_which_no_cell_is_wanted_adds_nothing(folder, whole, tmp_path):
    screens = tmp_path / "screens"
    screens.mkdir()
    halves = whole.copy()
    halves.obs["quality"] = np.where(np.arange(len(halves)) < 200, "good", "bad")
    halves[:200].write_h5ad(screens / "a.h5ad")
    halves[200:].write_h5ad(screens / "b.h5ad")
    wanted = arguments(folder, datasets={"screen": str(screens)}, include={"quality": ["good"]})
    store = prepare(wanted, tmp_path / "s", num_proc=2, quiet=True)
    assert_holds(store, halves[:200])
    assert not [path for path in (tmp_path / "s").iterdir() if ".part-" in path.name or path.name.startswith("run-")]


def test_the_number_of_processes_and_of_files_changes_nothing(folder, whole, tmp_path):
    several = arguments(folder, datasets={"screen": f"{folder}/halves", "again": f"{folder}/screen.h5ad"})
    for n in (1, 2):
        prepare(several, tmp_path / str(n), PrepareArguments(shard_megabytes=1), num_proc=n, quiet=True)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


@pytest.mark.parametrize("layer, matrix", [("csr", sp.csr_matrix), ("csc", sp.csc_matrix), ("dense", np.asarray)])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_every_format_of_a_matrix(whole, tmp_path, layer, matrix, suffix):
    adata = whole.copy()
    adata.layers = {layer: matrix(dense(whole.layers["log1p"]))}
    adata.X = None
    (adata.write_h5ad if suffix == "h5ad" else adata.write_zarr)(tmp_path / f"screen.{suffix}")
    data = DataArguments(datasets=str(tmp_path / f"screen.{suffix}"), input=f"layers/{layer}")
    store = prepare(data, tmp_path / "s", quiet=True)
    assert (store.manifest.expression, store.manifest.dtype) == ("log1p", "float32")
    assert_holds(store, adata, layer)


def test_a_large_csc_matrix_is_transposed_on_disk(whole, tmp_path, monkeypatch):
    from pertstate.data import matrices

    monkeypatch.setattr(matrices.RowReader, "_in_memory", 0)
    adata = whole.copy()
    adata.X = sp.csc_matrix(whole.X)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    store = prepare(DataArguments(datasets=str(tmp_path / "screen.h5ad")), tmp_path / "s", quiet=True)
    assert_holds(store, adata)


def test_an_embedding_with_expression_beside_it(folder, whole, tmp_path):
    data = arguments(folder, input="obsm/X_emb", gene_input="layers/log1p", genes=["gene_7", "gene_3"])
    store = prepare(data, tmp_path / "s", quiet=True)
    names = store.obs().index
    np.testing.assert_array_equal(store.embedding(np.arange(len(store))), whole[names].obsm["X_emb"])
    assert store.manifest.genes == ["gene_7", "gene_3"] and store.manifest.embedding_dim == 5
    np.testing.assert_array_equal(
        dense(store.to_anndata().X), dense(whole[names][:, ["gene_7", "gene_3"]].layers["log1p"])
    )
    alone = prepare(arguments(folder, input="obsm/X_emb"), tmp_path / "alone", quiet=True)
    assert alone.manifest.expression is None and alone.manifest.dtype == "float32" and alone.manifest.genes == []


def test_float16_keeps_three_digits(folder, whole, tmp_path):
    data = arguments(folder, input="layers/log1p")
    store = prepare(data, tmp_path / "s", PrepareArguments(dtype="float16"), quiet=True)
    expected = dense(whole[store.obs().index].layers["log1p"])
    np.testing.assert_array_equal(dense(store.to_anndata().X), expected.astype(np.float16).astype(np.float32))
    with pytest.raises(ValueError, match="prepare.dtype='float16': counts are stored exactly"):
        prepare(arguments(folder), tmp_path / "t", PrepareArguments(dtype="float16"), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_it_is_a_dataset(store, whole):
    cells = store.as_dataset()
    assert len(cells) == whole.n_obs
    row = cells[7]
    expected = whole[row["barcode"]]
    assert row["context"] == expected.obs["cell_type"].iloc[0] and row["batch"] == expected.obs["batch"].iloc[0]
    values = np.zeros(GENES)
    values[row["gene_ids"]] = row["gene_values"]
    np.testing.assert_array_equal(values, dense(expected.X).ravel())


def test_the_json_says_where_everything_came_from(store, folder):
    manifest = json.loads((store.path / "store.json").read_text())
    assert [Path(source["path"]).name for source in manifest["sources"]] == ["a.h5ad", "b.h5ad"]
    assert [source["cells"] for source in manifest["sources"]] == [200, len(store) - 200]
    content = (folder / "halves" / "a.h5ad").read_bytes()
    assert manifest["sources"][0]["bytes"] == len(content)
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    groups = manifest["groups"]
    assert sum(groups["length"]) == manifest["cells"] == len(store)
    assert groups["offset"] == [0, *np.cumsum(groups["length"])[:-1].tolist()]
    names = manifest["vocabularies"]
    assert names["perturbation"] == ["control", "pert_0", "pert_0+pert_1", "pert_1", "pert_2", "pert_3"]
    assert names["batch"] == ["b0", "b1"] and manifest["format_version"] == 1


# Genes


def test_genes_of_files_are_joined_by_name(whole, tmp_path):
    one, two = whole[:200, 10:].copy(), whole[200:, ::-1][:, 5:].copy()
    one.write_h5ad(tmp_path / "1.h5ad")
    two.write_h5ad(tmp_path / "2.h5ad")
    data = DataArguments(datasets={"x": str(tmp_path / "1.h5ad"), "y": str(tmp_path / "2.h5ad")})
    store = prepare(data, tmp_path / "s", quiet=True)
    assert store.manifest.genes == [f"gene_{i}" for i in range(10, GENES - 5)]
    assert store.manifest.notes == [f"15 of {GENES} genes are not in every file: left out"]
    assert_holds(store, whole)
    # A cell's total is over all genes of its file.
    totals = dict(zip(store.obs().index, store.totals(np.arange(len(store)))))
    for part in (one, two):
        for name, total in zip(part.obs_names, np.asarray(part.X.sum(axis=1)).ravel()):
            assert totals[name] == total
    with pytest.raises(KeyError, match="1 of 2 listed genes are not in the data: \\['gene_2'\\]"):
        prepare(DataArguments(datasets=str(tmp_path), genes=["gene_20", "gene_2"]), tmp_path / "t", quiet=True)


def test_genes_of_a_file(folder, tmp_path):
    (tmp_path / "genes.txt").write_text("gene_9\n\ngene_2\n", encoding="utf-8")
    named = arguments(folder, genes_file=str(tmp_path / "genes.txt"))
    assert prepare(named, tmp_path / "s", quiet=True).manifest.genes == ["gene_9", "gene_2"]
    _, processor = load(named.file_source(), named.resolve_splits(), **named.fit_options())
    assert processor.vocabulary.genes == ["gene_9", "gene_2"]
    with pytest.raises(ValueError, match="set one of `genes` and `genes_file`"):
        arguments(folder, genes_file="x", genes=3)
    for content, error, message in (
        ("\n", ValueError, "found none"),
        (None, FileNotFoundError, "no such file of gene"),
    ):
        (tmp_path / "empty.txt").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "empty.txt").write_text(content)
        with pytest.raises(error, match=message):
            arguments(folder, genes_file=str(tmp_path / "empty.txt")).chosen_genes()


def test_the_target_sum_may_be_the_median_of_training_cells(folder, whole, tmp_path):
    data = arguments(folder, target_sum="median", test_contexts=["type_1"])
    store = prepare(data, tmp_path / "s", quiet=True)
    training = whole[whole.obs["cell_type"] != "type_1"]
    median = float(np.median(np.asarray(training.X.sum(axis=1))))
    assert store.manifest.target_sum == median
    plain = prepare(arguments(folder), tmp_path / "plain", quiet=True)
    for opened, asked in ((store, None), (plain, "median")):
        _, processor = load_store(opened, data.resolve_splits(opened.groups), target_sum=asked)
        assert processor.target_sum == median and processor.normalize == "counts_to_log1p"
    with pytest.raises(
        ValueError, match="target_sum='median' is what counts are scaled to, but layers/log1p is used as"
    ):
        prepare(arguments(folder, input="layers/log1p", target_sum="median"), tmp_path / "t", quiet=True)


def test_a_run_normalises_as_the_store_says_unless_it_says_else(folder, store, tmp_path):
    raw = prepare(arguments(folder, normalize="none"), tmp_path / "raw", quiet=True)
    splits = arguments(folder).resolve_splits()
    for opened, asked, values in (
        (store, "auto", ("counts_to_log1p", "log1p")),
        (store, "none", ("none", "counts")),
        (raw, "auto", ("none", "counts")),
        (raw, "counts_to_log1p", ("counts_to_log1p", "log1p")),
    ):
        cells, processor = load_store(opened, splits, normalize=asked)
        assert (processor.normalize, processor.values) == values
        whole = np.allclose(cells.features[:], np.rint(cells.features[:]))
        assert whole == (values[1] == "counts")


def test_variable_genes_are_those_of_training_cells_in_memory(folder, tmp_path):
    held = {"test_contexts": ["type_1"], "genes": 25}
    store = prepare(arguments(folder, **held), tmp_path / "s", quiet=True)
    data = arguments(folder, **held)
    _, expected = load(data.file_source(), data.resolve_splits(), **data.fit_options())
    assert store.manifest.genes == expected.vocabulary.genes and store.manifest.highly_variable == 25
    everything = prepare(arguments(folder), tmp_path / "all", quiet=True)
    _, chosen = load(
        StoreSource(everything, data.contexts, data.features()),
        data.resolve_splits(everything.groups),
        **data.fit_options(),
    )
    assert chosen.vocabulary == expected.vocabulary
    other = prepare(arguments(folder, **held, hvg_on_all=True), tmp_path / "t", quiet=True)
    assert other.manifest.genes != store.manifest.genes


# Ineffective knock-downs


def knockdown_screen() -> ad.AnnData:
    """Two contexts; the knock-down of `g0` works in A alone, `g1` in half of the cells, `g2` nowhere, `g3` is silent."""
    rng = np.random.default_rng(0)
    rows, matrix = [], []
    for context in "AB":
        for name, cells in (
            ("control", 60),
            ("g0", 40),
            ("g1", 60),
            ("g2", 40),
            ("g3", 40),
            ("drug", 40),
            ("g0+g1", 40),
        ):
            counts = rng.poisson(20, (cells, 8))
            counts[:, 3] = 0
            if "g0" in name and context == "A":
                counts[:, 0] = 0
            if name == "g1":
                counts[: cells // 2 + 5, 1], counts[cells // 2 + 5 :, 1] = 0, 12
            if name == "g0+g1":
                counts[:, 1] = 0
            matrix.append(counts)
            rows += [(context, name)] * cells
    obs = pd.DataFrame(rows, columns=["cell_type", "perturbation"], index=[f"c{i}" for i in range(len(rows))])
    return ad.AnnData(
        sp.csr_matrix(np.concatenate(matrix).astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(8)]),
    )


def test_ineffective_knockdowns_are_left_out(tmp_path):
    adata = knockdown_screen()
    adata = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    options = PrepareArguments(knockdown_filter=True)
    store = prepare(DataArguments(datasets=str(tmp_path / "a.h5ad")), tmp_path / "s", options, quiet=True)

    # The rule, cell by cell.
    amounts = adata.X.toarray() / adata.X.toarray().sum(axis=1, keepdims=True)
    keep = []
    for context in "AB":
        here = (adata.obs["cell_type"] == context).to_numpy()
        control = amounts[here & (adata.obs["perturbation"] == "control").to_numpy()].mean(axis=0)
        for name in ("control", "drug", "g3"):
            keep += adata.obs_names[here & (adata.obs["perturbation"] == name).to_numpy()].tolist()
        for name in ("g0", "g1", "g2", "g0+g1"):
            cells = np.flatnonzero(here & (adata.obs["perturbation"] == name).to_numpy())
            targets = [int(part[1:]) for part in name.split("+")]
            if not all(amounts[cells, t].mean() <= 0.3 * control[t] for t in targets):
                continue
            low = cells[np.all([amounts[cells, t] <= 0.5 * control[t] for t in targets], axis=0)]
            if len(low) >= 30:
                keep += adata.obs_names[low].tolist()
    assert sorted(store.obs().index) == sorted(keep)
    kept = set(zip(store.groups["context"], store.groups["perturbation"]))
    assert {("A", "g0"), ("A", "g1"), ("A", "g0+g1"), ("B", "g1")} <= kept
    assert not {("B", "g0"), ("A", "g2"), ("B", "g2"), ("B", "g0+g1")} & kept
    notes = "\n".join(store.manifest.notes)
    assert (
        "all of 4 perturbations in their context: ['a / A / g2', 'a / B / g0', 'a / B / g0+g1', 'a / B / g2']" in notes
    )
    assert "kept 1 perturbation without a gene in the data: ['drug']" in notes
    assert "kept 1 perturbation where the controls of a context do not express the target: ['g3']" in notes


# A run reads the same from a store as from files


RUNS = [
    {},
    {"test_contexts": ["type_1"], "val_perturbations": ["pert_0+pert_1"], "genes": 30},
    {"genes": ["gene_9", "gene_2", "gene_40"], "contexts": ["type_0", "type_2"]},
    {"normalize": "none"},
    {"input": "layers/log1p"},
    {"input": "obsm/X_emb", "gene_input": "X", "genes": 12},
    {"input": "obsm/X_emb"},
]


@pytest.mark.parametrize("fields", RUNS)
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_cells_and_processor_equal_those_of_the_files(folder, tmp_path, fields, layout):
    data = arguments(folder, **fields)
    stored = {name: value for name, value in fields.items() if name in ("input", "gene_input")}
    store = prepare(
        arguments(folder, **stored), tmp_path / "s", PrepareArguments(layout=layout, shard_megabytes=1), quiet=True
    )
    cells, processor = load(data.file_source(), data.resolve_splits(), **data.fit_options())
    from_store, fitted = load(
        StoreSource(store, data.contexts, data.features()), data.resolve_splits(store.groups), **data.fit_options()
    )
    assert fitted.vocabulary == processor.vocabulary and fitted.to_dict() == processor.to_dict()
    columns = [name for name in cells.groups.columns if name not in ("start", "stop")]
    assert from_store.groups[columns].equals(cells.groups[columns])
    rows = np.concatenate([np.arange(a, b) for a, b in zip(from_store.groups["start"], from_store.groups["stop"])])
    np.testing.assert_array_equal(from_store.features[rows], cells.features)
    assert from_store.obs.equals(cells.obs)
    if cells.genes is not None:
        np.testing.assert_array_equal(from_store.genes[rows], cells.genes)


def test_any_rows_in_any_order(store):
    processor = load_store(store, arguments(store.path.parent).resolve_splits(store.groups))[1]
    features = StoredRows(store, processor)
    assert len(store._pieces) == 1
    rng = np.random.default_rng(0)
    # The same cells in several files and record batches.
    table = [batch for batches in store.batches_of_shards() for batch in batches][0]
    import pyarrow as pa

    many = store.path.parent / "pieces.arrow"
    with pa.OSFile(str(many), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        for start in range(0, len(store), 37):
            writer.write_batch(table.slice(start, 37))
    split = CellStore.of_files(store.path, store.manifest, [many])
    assert len(split._pieces) == -(-len(store) // 37)
    in_pieces = StoredRows(split, processor)
    whole = features[:]
    for rows in ([0], [], list(rng.integers(0, len(store), 50)), [len(store) - 1, 0, 5, 5], list(range(30, 90))):
        for reader in (features, in_pieces):
            np.testing.assert_array_equal(reader[np.array(rows, dtype=np.int64)], whole[rows])
    np.testing.assert_array_equal(in_pieces[:], whole)
    assert (split.expression(np.array([70, 3, 36])) != store.expression(np.array([70, 3, 36]))).nnz == 0
    with pytest.raises(IndexError, match=f"of a store of {len(store)} cells"):
        features[np.array([len(store)])]


def datasets_of(store, **options) -> SentenceDataset:
    data = DataArguments(store=str(store.path), test_contexts=["type_1"], batch_key="batch")
    cells, processor = load_store(store, data.resolve_splits(store.groups))
    return SentenceDataset(cells, processor, "train", 6, **options)


def test_sentences_are_those_of_the_cells_in_memory(store, folder):
    data = arguments(folder, test_contexts=["type_1"])
    cells, processor = load(data.file_source(), data.resolve_splits(), **data.fit_options())
    for options in ({"seed": 3}, {"control_matching": "batch", "sentences_per_group": "equal"}):
        stored, in_memory = datasets_of(store, **options), SentenceDataset(cells, processor, "train", 6, **options)
        for epoch in (0, 1):
            stored.set_epoch(epoch)
            in_memory.set_epoch(epoch)
            assert len(stored) == len(in_memory)
            for one, other in zip(stored, in_memory):
                assert one.keys() == other.keys()
                for key in one:
                    np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_stream(store, workers):
    dataset = datasets_of(store)
    alone, shared = (
        DataLoader(dataset, batch_size=4, collate_fn=SentenceCollator(), num_workers=n) for n in (0, workers)
    )
    count = 0
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        count += len(one["labels"])
    assert count == len(dataset)


def test_workers_that_live_on_draw_each_epoch_anew(store):
    dataset, alone = datasets_of(store), datasets_of(store)
    options = {"batch_size": 4, "collate_fn": SentenceCollator()}
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, **options)
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        for one, other in zip(DataLoader(alone, **options), loader, strict=True):
            assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_share_out_the_sentences(store, processes):
    dataset = datasets_of(store, multiple_of=4 * processes)
    batches = BatchSampler(SequentialSampler(dataset), 4, drop_last=False)
    drawn = [i for rank in range(processes) for batch in BatchSamplerShard(batches, processes, rank) for i in batch]
    assert sorted(drawn) == list(range(len(dataset)))


def test_a_store_travels_to_another_process(store):
    datasets_of(store)[0]
    dataset = datasets_of(store)
    copy = pickle.loads(pickle.dumps(dataset))
    assert "_pieces" not in copy.cells.features.store.__dict__
    np.testing.assert_array_equal(copy[5]["labels"], dataset[5]["labels"])


RUN = """
data: {{datasets: {{screen: {folder}/halves}}, batch_key: batch, test_contexts: [type_1], genes: 40}}
prepare: {{shard_megabytes: 1}}
model: {{preset: tiny, set_size: 8}}
training: {{output_dir: {folder}/run, max_steps: 4, per_device_train_batch_size: 2, disable_tqdm: true, use_cpu: true}}
"""


def test_a_run_from_a_store_learns_what_one_from_files_does(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(RUN.format(folder=folder))
    config = ["--config", str(tmp_path / "run.yaml")]
    assert main(["prepare", *config, "--output", str(tmp_path / "s"), "--genes", "null", "--quiet"]) == 0
    assert "80 genes, " in capsys.readouterr().out
    scores = []
    for name, flags in (("files", []), ("store", ["--store", str(tmp_path / "s")])):
        scores.append(pertstate.train.main([*config, "--output_dir", str(tmp_path / name), *flags]))
    files, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "store"))
    vocabularies = [(tmp_path / name / "vocabulary.json").read_text() for name in ("files", "store")]
    assert vocabularies[0] == vocabularies[1]
    cards = [(tmp_path / name / "README.md").read_text() for name in ("files", "store")]
    for card in cards:
        for file in ("a", "b"):
            content = (folder / "halves" / f"{file}.h5ad").read_bytes()
            assert f"`{file}.h5ad`" in card and f"SHA-256 `{hashlib.sha256(content).hexdigest()}`" in card
    for name in files:
        assert torch.equal(files[name], stored[name]), name
    for name in scores[0]:
        if "per_second" not in name and "runtime" not in name:
            assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-9), name


def test_perturbations_as_vectors_from_a_store(store, folder, tmp_path):
    names = [f"pert_{i}" for i in range(4)]
    np.savez(tmp_path / "vectors.npz", **{name: np.eye(4, 6)[i] for i, name in enumerate(names)})
    fields = {"perturbation_features": str(tmp_path / "vectors.npz"), "test_perturbations": ["pert_3"]}
    data = arguments(folder, **fields)
    expected, processor = load(data.file_source(), data.resolve_splits(), **data.fit_options())
    cells, fitted = load(
        StoreSource(store, data.contexts, data.features()), data.resolve_splits(store.groups), **data.fit_options()
    )
    assert fitted.vocabulary == processor.vocabulary and "pert_3" not in fitted.vocabulary.perturbations
    one, other = (SentenceDataset(c, p, "test", 6, seed=1) for c, p in ((expected, processor), (cells, fitted)))
    for key, value in one[0].items():
        np.testing.assert_array_equal(value, other[0][key], err_msg=key)
    assert one[0]["perturbation_features"].tolist() == [0, 0, 0, 1, 0, 0]
    np.savez(tmp_path / "fewer.npz", **{name: np.ones(6) for name in names[:2]})
    lacking = arguments(folder, perturbation_features=str(tmp_path / "fewer.npz"))
    with pytest.raises(ValueError, match="2 of 4 perturbations of the training cells have no vector"):
        load(
            StoreSource(store, features=lacking.features()),
            lacking.resolve_splits(store.groups),
            **lacking.fit_options(),
        )


def test_what_contradicts_the_store_is_said(store, folder, tmp_path):
    run = DataArguments(store=str(store.path), context_key="line")
    with pytest.raises(ValueError, match="data.context_key='line', but the store was prepared with 'cell_type'"):
        run.check_store(store.manifest, {"store", "context_key"})
    # A field that the run does not set is the store's, whatever its default is. A field that it sets counts even at its default.
    run.check_store(store.manifest, {"store"})
    default = DataArguments(store=str(store.path), batch_key=None, control="control")
    default.check_store(store.manifest, {"store", "control"})
    assert store.manifest.reading["batch_key"] == "batch"
    with pytest.raises(ValueError, match="data.batch_key=None, but the store was prepared with 'batch'; leave it out"):
        default.check_store(store.manifest, {"store", "batch_key"})
    with pytest.raises(ValueError, match="datasets names \\['other'\\], the store was made of \\['screen'\\]"):
        DataArguments(store=str(store.path), datasets={"other": "gone.h5ad"}).resolve_splits(store.groups)
    splits = DataArguments(store=str(store.path)).resolve_splits(store.groups)
    for options, error, message in (
        ({"genes": ["gene_1", "actb"]}, KeyError, "1 of 2 listed genes are not in the data: \\['actb'\\]"),
        ({"genes": 500}, ValueError, "genes=500: expected between 1 and the 80 genes"),
        ({"genes": "gene_1"}, ValueError, "expected a number of highly variable genes, or a list"),
        ({"normalize": "log2"}, ValueError, "normalize='log2'; expected"),
        ({"contexts": ["type_9"]}, ValueError, "contexts names 'type_9', which is not in the data"),
    ):
        with pytest.raises(error, match=message):
            load_store(store, splits, **options)
    with pytest.raises(ValueError, match="data.store names a store"):
        prepare(DataArguments(store=str(store.path), datasets="x"), tmp_path / "s")
    (tmp_path / "splits.toml").write_text('[training]\nscreen = "train"\n[zeroshot]\n"screen.type_2" = "test"\n')
    of_toml = DataArguments(store=str(store.path), splits=str(tmp_path / "splits.toml")).resolve_splits(store.groups)
    assert of_toml.zeroshot == {("screen", "type_2"): "test"}


# A part of a store is no store


def test_an_error_leaves_nothing(whole, tmp_path):
    bad = whole.copy()
    bad.X = bad.X.copy()
    bad.X.data[-1] = np.nan
    bad.write_h5ad(tmp_path / "bad.h5ad")
    cell = bad.obs_names[np.searchsorted(bad.X.indptr, bad.X.nnz - 1, side="right") - 1]
    with pytest.raises(ValueError, match=f"X holds nan in cell '{cell}', gene 'gene_"):
        prepare(DataArguments(datasets=str(tmp_path / "bad.h5ad")), tmp_path / "s", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.h5ad"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists and is not an empty folder; name a new one, or replace it"):
        prepare(DataArguments(datasets=str(tmp_path / "bad.h5ad")), tmp_path / "taken", quiet=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        prepare(DataArguments(datasets=str(tmp_path / "bad.h5ad")), tmp_path / "gone" / "s", quiet=True)


def command(folder, output) -> list[str]:
    config = folder / "prepare.yaml"
    config.write_text(RUN.format(folder=folder))
    return [
        "-m",
        "pertstate.cli",
        "prepare",
        "--config",
        str(config),
        "--output",
        str(output),
        "--quiet",
    ]


# Ends the process when it opens, renames or removes the n-th file of the store.
SABOTAGE = """
import os, sys
count, limit, where = [0], int(sys.argv.pop(1)), sys.argv[sys.argv.index("--output") + 1]
def audit(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and isinstance(args[0], (str, os.PathLike)):
        # The store, and what is written beside it.
        folder, name = os.path.split(where)
        count[0] += str(args[0]).startswith((where, os.path.join(folder, f".{name}.")))
    if count[0] >= limit:
        os._exit(137)
sys.addaudithook(audit)
from pertstate.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_anywhere_no_store_is_a_part_and_a_rerun_is_whole(folder, whole, tmp_path):
    output = tmp_path / "s"
    words = command(folder, output)[2:]
    kill_at, finished = 1, False
    while not finished:
        done = launches.run(["-c", SABOTAGE, kill_at, *words])
        finished = done.returncode == 0
        assert finished or done.returncode == 137, done.stderr[-2000:]
        if output.exists():  # or it was killed while it looked at what it had made
            finished = True
        else:
            assert not finished
            with pytest.raises(FileNotFoundError, match="is no cell store"):
                CellStore(output)
        kill_at += 3 if kill_at < 7 else 9  # when the folder is made, and at times through the rest
    assert kill_at > 20
    assert_holds(CellStore(output), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # nothing of the killed ones


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(folder, tmp_path):
    """A process that is killed cannot tell the others to end."""
    code = "import os, time, data_jobs\nfrom functools import partial\nfrom pertstate.data import preparation\n"
    code += "preparation._Workers(2, None, True).do([partial(data_jobs.wait, i) for i in range(2)], [1, 1], 'wait')"
    (tmp_path / "data_jobs.py").write_text(
        "import os, time\ndef wait(number):\n    os.write(1, f'{os.getpid()}\\n'.encode())\n    time.sleep(600)\n"
    )
    environment = launches.environment(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        # The pipe ends when no process holds it any more.
        assert len(set(workers)) == 2 and process.stdout.read() == ""


def test_two_at_once_do_not_meet(folder, tmp_path):
    output = tmp_path / "s"
    slow = "import sys, time; import pertstate.data.preparation as p; run = p._write_runs\n"
    slow += "p._write_runs = lambda *a: (print('writing', flush=True), sys.stdin.readline(), run(*a))[2]\n"
    slow += "from pertstate.cli import main; raise SystemExit(main(sys.argv[1:]))"
    words = command(folder, output)
    first = launches.start(["-c", slow, *words[2:]])
    assert first.stdout.readline() == "writing\n"
    second = launches.run(words)
    assert second.returncode == 1 and f"{output} is being written by process {first.pid} on " in second.stderr
    assert first.communicate("\n").returncode == 0
    CellStore(output)


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    words = command(folder, tmp_path / "s")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    limit += "from pertstate.cli import main; raise SystemExit(main(sys.argv[1:]))"
    done = launches.run(["-c", limit, *words[2:]])
    assert done.returncode == 1, done.stderr
    assert f"{tmp_path / 's'}: cannot be written, nothing is left of it: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_damage_is_one_clear_error(store, tmp_path):
    copy = tmp_path / "s"

    def fresh() -> Path:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store.path, copy)
        return copy

    [shard] = [path.name for path in store.path.glob("data-*.arrow")]
    content = (store.path / shard).read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 1):
        (fresh() / shard).write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"expected {len(content):,} bytes, found {end:,}; copy the store again"):
            CellStore(copy)
    (fresh() / shard).unlink()
    with pytest.raises(ValueError, match="found no file; copy the store again"):
        CellStore(copy)
    (fresh() / shard).write_bytes(b"x" * len(content))
    with pytest.raises(ValueError, match="cannot be read as Arrow"):
        CellStore(copy).obs()
    text = (store.path / "store.json").read_text()
    for broken, message in (
        (text[: len(text) // 2], "is not a whole JSON file"),
        ("[]", "expected the fields"),
        (json.dumps({**json.loads(text), "format_version": 99}), "is of format 99, this version reads up to 1"),
        (json.dumps({**json.loads(text), "cells": 7}), "7 cells, but the groups hold"),
        (
            json.dumps({**json.loads(text), "shards": [{**json.loads(text)["shards"][0], "file": f"../s/{shard}"}]}),
            "shards",
        ),
    ):
        (fresh() / "store.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            CellStore(copy)
    with pytest.raises(FileNotFoundError, match="is no cell store: it has no store.json"):
        CellStore(tmp_path)


@pytest.mark.parametrize(
    "fields, options",
    [
        ({"input": "layers/log1p"}, {}),
        ({"input": "layers/log1p"}, {"layout": "dense"}),
        ({"input": "layers/log1p"}, {"dtype": "float16"}),
        ({"input": "obsm/X_emb"}, {}),
        ({"input": "obsm/X_emb"}, {"dtype": "float16"}),
        ({}, {}),  # the totals of counts
    ],
)
def test_a_store_with_values_that_are_no_numbers_is_refused(folder, tmp_path, fields, options):
    made = prepare(arguments(folder, **fields), tmp_path / "s", PrepareArguments(**options), quiet=True)
    [shard] = made.path.glob("data-*.arrow")
    rows, kind = np.arange(len(made)), np.float16 if options.get("dtype") == "float16" else np.float32
    if made.manifest.embedding_dim is not None:
        value = kind(made.embedding(rows)[7, 2])
    elif made.manifest.expression == "counts":
        value = made.totals(rows)[7]
    else:
        value = kind(made.expression(rows)[7].data.max())
    content = shard.read_bytes()
    bad = value.dtype.type(np.nan).tobytes()
    assert value.tobytes() in content
    shard.write_bytes(content.replace(value.tobytes(), bad))
    source = StoreSource(CellStore(made.path))
    processor = StateProcessor(
        vocabulary=Vocabulary(made.manifest.genes),
        values=Values.EMBEDDING if made.manifest.embedding_dim else Values.LOG1P,
        feature_dim=made.manifest.embedding_dim,
    )
    with pytest.raises(ValueError, match=rf"{shard.name}: .*(found nan in cell|sums to nan)"):
        StoredRows(source.store, processor)[:]
    with (
        pytest.raises(ValueError, match=rf"{shard.name}: .*(found nan in cell|sums to nan)"),
        source.blocks() as blocks,
    ):
        [read() for _, read in blocks]


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({"sources": [{"path": -1, "cells": 2}]}, "sources"),
        ({"sources": [{"path": "a.h5ad", "cells": {"a": 1}}]}, "sources"),
        ({"sources": [{"path": "a.h5ad", "cells": 2, "sha256": [1]}]}, "sources"),
        # They add up to 10 in 64 bits.
        ({"cells": 10, "lengths": [2**63 - 1, 2**63 - 1, 12]}, "groups"),
        ({"cells": 10, "lengths": [10**30, 1, 1]}, "groups"),
    ],
    ids=range(5),
)
def test_numbers_and_types_of_a_manifest_are_checked_before_they_are_used(store, tmp_path, change, wrong):
    content = json.loads((store.path / STORE_FILE).read_text())
    if "lengths" in change:
        lengths = change.pop("lengths")
        groups = {name: column[: len(lengths)] for name, column in content["groups"].items()}
        content["groups"] = groups | {"length": lengths, "offset": [sum(lengths[:i]) for i in range(len(lengths))]}
    (tmp_path / STORE_FILE).write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=rf"these fields are damaged or contradict one another: \['{wrong}'\]"):
        CellStore(tmp_path)


def test_a_flipped_bit_is_found_where_it_is_looked_for(store, tmp_path, capsys):
    copy = tmp_path / "s"
    shutil.copytree(store.path, copy)
    assert main(["info", str(copy), "--verify"]) == 0
    assert "verified: every file is what was written" in capsys.readouterr().out
    [shard] = copy.glob("data-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    CellStore(copy)  # reading all would cost what a memory map saves
    assert main(["info", str(copy), "--verify"]) == 1
    assert f"1 file damaged: ['{shard.name}']" in capsys.readouterr().err


# Parquet


def test_parquet_is_the_same_store(store, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_parquet(store, tmp_path / "p", "lab/screen")
    again = open_store(tmp_path / "p")
    assert again.obs().equals(store.obs()) and (again.to_anndata().X != store.to_anndata().X).nnz == 0
    assert [source["path"] for source in again.manifest.sources] == ["a.h5ad", "b.h5ad"]  # no folders of ours
    one, other = datasets_of(store), datasets_of(again)
    for key, value in one[3].items():
        np.testing.assert_array_equal(value, other[3][key])
    streamed = datasets.load_dataset(str(tmp_path / "p"), split="train", streaming=True)
    assert [row["barcode"] for row in streamed] == store.obs().index.tolist()
    for path in (tmp_path / "p" / "data").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file, but store.json names it"):
        open_store(tmp_path / "p")


# pertstate info


def test_info_of_a_store_a_file_and_a_checkpoint(store, folder, whole, tmp_path, capsys):
    def info(*words) -> str:
        assert main(["info", *map(str, words)]) == 0
        return capsys.readouterr().out

    said = info(store.path)
    assert f"cell store of {len(store):,} cells" in said and "sparse counts (uint8) of 80 genes" in said
    assert "3 contexts x 5 perturbations" in said and said.splitlines()[-1].startswith(
        "ready: pertstate train RUN.yaml"
    )
    sizes = whole.obs.groupby(["cell_type", "perturbation"], observed=True).size()
    row = next(line.split() for line in said.splitlines() if line.startswith("type_2"))
    assert row[1] == str(sizes["type_2", "control"]) and row[-1] == str(sizes["type_2"].sum())

    said = info(folder / "screen.h5ad")
    median = np.median(np.asarray(whole.X.sum(axis=1)))
    assert f"X: counts, {median:,.0f} per cell (median)" in said and 'control: "control"' in said
    assert "has: X, layers/log1p, obsm/X_emb" in said and 'batch_key: "batch"' in said
    assert "layers/log1p: log1p of 10,000 counts per cell" in info(folder / "screen.h5ad", "--input", "layers/log1p")
    pertstate.train.main(
        ["--config", command(folder, "")[4], "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    )
    capsys.readouterr()
    said = info(tmp_path / "run")
    assert (
        "checkpoint of state" in said
        and "reads: counts, scaled to 10,000 per cell and log1p from X, 40 features" in said
    )


def test_info_says_what_is_missing(whole, tmp_path, capsys):
    adata = whole.copy()
    adata.obs = adata.obs.rename(columns={"perturbation": "what"})
    adata.layers["scaled"] = whole.layers["log1p"].toarray() - 1
    adata.write_h5ad(tmp_path / "a.h5ad")
    main(["info", str(tmp_path / "a.h5ad"), "--input", "layers/scaled"])
    said = capsys.readouterr().out
    assert "before a model can be trained on it:" in said
    assert "no column found for perturbation_key; obs has ['what'" in said and "layers/scaled is scaled" in said
    main(["info", str(tmp_path / "a.h5ad"), "--perturbation-key", "what", "--control", "pert_9"])
    assert "no cell is a control ('pert_9'): found" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "gone.h5ad")]) == 1
    assert "gone.h5ad: no such file" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 1
    message = (
        "expected a cell store (store.json), a checkpoint (config.json or adapter_config.json) or a .zarr, found none"
    )
    assert message in capsys.readouterr().err
