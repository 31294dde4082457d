"""Streams give the cells of the files and no others, with bounded memory, and continue with the very next sentence."""

import json
import math
import os
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from datasets import load_dataset
from datasets.packaged_modules.parquet.parquet import Parquet
from torch.utils.data import DataLoader
from transformers import TrainerState

from pertstate import StateForPerturbation, StateProcessor
from pertstate.configuration_state import StateConfig
from pertstate.data import (
    SentenceCollator,
    SentenceDataset,
    Splits,
    simulate_screen,
)
from pertstate.data.cell_pool import CellPool, CellRows, Reservoirs
from pertstate.data.group_sums import GroupSums
from pertstate.data.stream_reading import CellStream, StreamColumns, read_gene_names
from pertstate.data.stream_state import read_stream_state
from pertstate.data.stream_survey import StreamSurvey, survey_stream
from pertstate.data.streaming import SentenceStream
from pertstate.training import StateTrainer, StateTrainingArguments


STORE = StreamColumns("perturbation", "context", "batch", gene_ids="gene_ids", gene_values="gene_values")
ATLAS = StreamColumns("drug", "cell_line_id", "plate", gene_ids="genes", gene_values="expressions", marker=-2.0)
UINT16 = pa.uint16()
TOKENS = 3 * np.arange(60) + 5  # ids of the atlas' genes


@cache
def screen() -> ad.AnnData:
    """720 cells of 3 contexts, 4 perturbations (and a combination) and 2 batches, shuffled."""
    data = simulate_screen(
        num_contexts=3, num_perturbations=4, num_genes=60, cells_per_group=30, combinations=[(0, 1)], seed=1
    )
    data = data[np.random.default_rng(0).permutation(data.n_obs)].copy()
    data.X.sort_indices()
    data.obsm["X_emb"] = np.random.default_rng(1).normal(size=(data.n_obs, 7)).astype(np.float32)
    return data


def lists(values: np.ndarray, ends: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, kind))


def store_table(data: ad.AnnData, values: pa.DataType = UINT16, **more) -> pa.Table:
    """A table in the form of our own stores."""
    matrix = sp.csr_matrix(data.X)
    columns = {
        "dataset": ["screen"] * data.n_obs,
        "perturbation": data.obs["perturbation"].astype(str).tolist(),
        "context": data.obs["cell_type"].astype(str).tolist(),
        "batch": data.obs["batch"].astype(str).tolist(),
        "gene_ids": lists(matrix.indices, matrix.indptr, pa.int32()),
        "gene_values": lists(matrix.data.astype(values.to_pandas_dtype()), matrix.indptr, values),
    }
    return pa.table(columns | more)


def atlas_table(data: ad.AnnData) -> pa.Table:
    """A table in the form of the published atlas: gene tokens, and a first entry that is not a gene."""
    matrix = sp.csr_matrix(data.X)
    ends = matrix.indptr + np.arange(data.n_obs + 1)
    ids = np.insert(TOKENS[matrix.indices], matrix.indptr[:-1], 1)
    values = np.insert(matrix.data, matrix.indptr[:-1], -2.0)
    return pa.table(
        {
            "genes": lists(ids, ends, pa.int64()),
            "expressions": lists(values, ends, pa.float32()),
            "drug": data.obs["perturbation"].astype(str).replace("control", "DMSO_TF").tolist(),
            "sample": [f"smp_{i}" for i in range(data.n_obs)],
            "cell_line_id": data.obs["cell_type"].astype(str).tolist(),
            "plate": pa.array(data.obs["batch"].astype(str).tolist()).dictionary_encode(),
        }
    )


def write(folder: Path, table: pa.Table, shards: int = 3, row_group_size: int = 64):
    """Parquet files as a stream."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(np.array_split(np.arange(len(table)), shards)):
        pq.write_table(table.slice(rows[0], len(rows)), folder / f"{i:03d}.parquet", row_group_size=row_group_size)
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def store(folder: Path, table: pa.Table | None = None, shards: int = 3, columns=STORE, block_size=50, **options):
    stream = write(folder, store_table(screen()) if table is None else table, shards)
    options.setdefault("genes", screen().var_names.tolist())
    return CellStream(stream, columns, block_size=block_size, **options)


def survey(source: CellStream, splits=None, **options) -> StreamSurvey:
    return survey_stream(source, splits, progress=False, **options)


def holding_out(zeroshot=(), fewshot=None) -> Splits:
    held = {} if fewshot is None else {("stream", "type_0"): fewshot}
    return Splits({"stream": []}, {"stream"}, {("stream", context): "test" for context in zeroshot}, held)


class Known:
    """Finds which cell of the screen a row of features is."""

    def __init__(self, features: np.ndarray):
        self.number = {row.tobytes(): i for i, row in enumerate(features)}
        assert len(self.number) == len(features)

    def __call__(self, rows: np.ndarray) -> list[int]:
        return [self.number[row.tobytes()] for row in rows]


def known(processor: StateProcessor, data: ad.AnnData | None = None) -> Known:
    """The features of the same cells, read through AnnData."""
    data = screen() if data is None else data
    return Known(StateProcessor(processor.vocabulary, normalize=processor.normalize).features(data))


def same(first: list[dict], second: list[dict]) -> bool:
    """Assert that sentences are equal to the last bit."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second)
    )


# What the sentences hold


@pytest.mark.parametrize("layout", ["store", "atlas"])
def test_sentences_hold_each_training_cell_once_with_controls_of_its_context(tmp_path, layout):
    if layout == "store":
        source = store(tmp_path)
    else:
        names = {int(token): name for token, name in zip(TOKENS, screen().var_names)}
        source = CellStream(write(tmp_path, atlas_table(screen())), ATLAS, names, block_size=50)
    control = "control" if layout == "store" else "DMSO_TF"
    looked = survey(source, control=control)
    processor, cell = looked.processor, known(looked.processor)
    assert (processor.values, processor.normalize, processor.batch_key) == (
        "log1p",
        "counts_to_log1p",
        source.columns.batch,
    )
    obs = screen().obs
    seen = []
    for sentence in SentenceStream(source, looked, 8):
        targets, controls = cell(sentence["labels"]), cell(sentence["control_cells"])
        seen += targets
        of = obs.iloc[targets][["perturbation", "cell_type"]].drop_duplicates()
        assert len(of) == 1
        name, context = of.iloc[0]
        parts = [] if name == "control" else name.split("+")
        ids = [processor.vocabulary.perturbations.index(part) for part in parts]
        assert sentence["perturbation_ids"].tolist() == ids + [-1] * (2 - len(ids))
        assert sentence["context_ids"] == processor.vocabulary.contexts.index(context)
        matched = obs.iloc[controls]
        assert len(set(controls)) == len(controls) == len(targets) <= 8
        assert set(matched["perturbation"]) == {"control"} and set(matched["cell_type"]) == {context}
        assert [processor.vocabulary.batches[i] for i in sentence["batch_ids"]] == matched["batch"].tolist()
    assert sorted(seen) == list(range(len(obs)))


def test_sentences_have_the_form_of_those_of_the_dataset(tmp_path):
    source = store(tmp_path)
    looked = survey(source, baseline_cells=50)
    made = SentenceDataset(looked.to_cells("train"), looked.processor, "train", 8)
    one, other = made[0], next(iter(SentenceStream(source, looked, 8)))
    assert list(one) == list(other)
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape[1:] == other[key].shape[1:], key
    batch = SentenceCollator()([other, one])
    assert batch["control_cells"].shape[::2] == (2, 60) and batch["perturbation_ids"].shape == (2, 2)


def test_the_model_genes_are_chosen_and_ordered_and_the_library_is_of_all_genes(tmp_path):
    source = store(tmp_path)
    genes = ["gene_41", "gene_3", "gene_17", "gene_8", "gene_59", "gene_0"] + [f"gene_{i}" for i in range(20, 38)]
    looked = survey(source, genes=genes)
    assert looked.processor.vocabulary.genes == genes
    cell = known(looked.processor)
    assert sorted(i for s in SentenceStream(source, looked, 8) for i in cell(s["labels"])) == list(
        range(screen().n_obs)
    )


def test_totals_of_the_whole_cell_are_used_where_genes_were_left_out(tmp_path):
    data = screen()
    totals = pa.array(np.asarray(data.X.sum(axis=1), dtype=np.float64).ravel())
    columns = StreamColumns("perturbation", "context", gene_ids="gene_ids", gene_values="gene_values", total="total")
    part = data[:, :40]
    source = store(tmp_path, store_table(part, total=totals), columns=columns, genes=part.var_names.tolist())
    looked = survey(source)
    whole = known(looked.processor, data)  # normalised with all 60 genes, then 40 of them
    assert sorted(i for s in SentenceStream(source, looked, 8) for i in whole(s["labels"])) == list(range(data.n_obs))
    wrong = store(tmp_path / "wrong", store_table(data, total=pa.array(np.full(data.n_obs, 3.0))), columns=columns)
    with pytest.raises(ValueError, match=r"'total' holds 3 in shard \d of 3 .*expected the counts of the whole cell"):
        survey(wrong)


@pytest.mark.parametrize("values, normalize", [("log1p", "auto"), ("counts", "none")])
def test_values_that_are_not_normalised_stay_as_they_are(tmp_path, values, normalize):
    data = screen().copy()
    if values == "log1p":
        data.X.data = np.log1p(data.X.data)
    source = store(tmp_path, store_table(data, pa.float32()))
    looked = survey(source, normalize=normalize)
    assert (looked.processor.values, looked.processor.normalize) == (values, "none")
    cell = Known(data.X.toarray())
    assert sorted(i for s in SentenceStream(source, looked, 8) for i in cell(s["labels"])) == list(range(data.n_obs))


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_embeddings_and_the_genes_of_their_decoder(tmp_path, decoder, fixed):
    data = screen()
    embedding = data.obsm["X_emb"]
    column = pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), 7)
    column = column if fixed else column.cast(pa.list_(pa.float32()))
    columns = StreamColumns(
        "perturbation",
        "context",
        gene_ids="gene_ids" if decoder else None,
        gene_values="gene_values" if decoder else None,
        embedding="embedding",
    )
    genes = data.var_names.tolist() if decoder else None
    source = store(tmp_path, store_table(data, embedding=column), columns=columns, genes=genes)
    looked = survey(source, input="obsm/X_emb", gene_input="X" if decoder else None)
    assert (looked.processor.values, looked.processor.feature_dim) == ("embedding", 7)
    cell = Known(embedding)
    reference = looked.processor.gene_features(data) if decoder else None
    seen = []
    for sentence in SentenceStream(source, looked, 8):
        targets = cell(sentence["labels"])
        assert data.obs["perturbation"].iloc[cell(sentence["control_cells"])].eq("control").all()
        if decoder:
            assert np.array_equal(sentence["gene_labels"], reference[targets])
        seen += targets
    assert sorted(seen) == list(range(data.n_obs))
    assert ("gene_labels" in sentence) is decoder


def test_the_processor_is_that_of_the_training_cells(tmp_path):
    data = screen()
    splits = holding_out(["type_1"], {"val": ["pert_2"], "test": ["pert_0+pert_1"]})
    looked = survey(store(tmp_path), splits)
    obs = data.obs
    held = (obs["cell_type"] == "type_1") | (
        (obs["cell_type"] == "type_0") & obs["perturbation"].isin(["pert_2", "pert_0+pert_1"])
    )
    fitted = StateProcessor.fit(data[~held.to_numpy()], "perturbation", "control", "cell_type", "batch")
    assert looked.processor.vocabulary == fitted.vocabulary
    own, other = looked.processor.to_dict(), fitted.to_dict()
    assert own.pop("context_key") == "context" and other.pop("context_key") == "cell_type" and own == other
    again = survey(store(tmp_path), splits, processor=looked.processor)
    assert again.processor.to_dict() == looked.processor.to_dict() and again.counts == looked.counts
    assert again.processor.vocabulary == looked.processor.vocabulary


def test_genes_and_median_of_the_sample_are_those_of_the_training_cells(tmp_path):
    """The sample holds every cell here, so it must give what the cells themselves give."""
    data = screen()
    splits = holding_out(["type_1"])
    looked = survey(
        store(tmp_path),
        splits,
        genes=20,
        target_sum="median",
        reservoir_cells=1000,
        baseline_cells=1000,
        eval_cells=1000,
    )
    training = data[(data.obs["cell_type"] != "type_1").to_numpy()]
    fitted = StateProcessor.fit(training, batch_key="batch", genes=20, target_sum="median")
    assert looked.processor.vocabulary == fitted.vocabulary and len(fitted.vocabulary.genes) == 20
    assert looked.processor.target_sum == fitted.target_sum != 10_000
    cells = looked.to_cells("train")
    # The control cells of the held-out context are among them.
    assert {tuple(row) for row in fitted.features(training)} < {tuple(row) for row in cells.features}


# What is held out


@pytest.mark.parametrize(
    "options, controls_of",
    [
        ({}, {"type_0", "type_1", "type_2"}),
        ({"heldout_controls": False}, {"type_0", "type_2"}),
        ({"control_sentences": False}, set()),
    ],
)
def test_held_out_cells_are_never_in_training(tmp_path, options, controls_of):
    splits = holding_out(["type_1"], {"val": ["pert_2"], "test": ["pert_0+pert_1"]})
    source = store(tmp_path)
    looked = survey(source, splits, eval_cells=1000)
    cell, obs = known(looked.processor), screen().obs
    seen = [i for s in SentenceStream(source, looked, 8, **options) for i in cell(s["labels"])]
    expected = [
        i
        for i, (name, context) in enumerate(zip(obs["perturbation"], obs["cell_type"]))
        if (context in controls_of if name == "control" else splits.split_of("stream", context, name) == "train")
    ]
    assert sorted(seen) == expected
    for split in ("val", "test"):
        evaluated = looked.to_cells(split)
        wanted = [splits.split_of("stream", c, p) == split for c, p in zip(obs["cell_type"], obs["perturbation"])]
        got = evaluated.obs["split"].eq(split).to_numpy()
        assert (
            sorted(cell(evaluated.features[got]))
            == np.flatnonzero(np.array(wanted) & obs["perturbation"].ne("control").to_numpy()).tolist()
        )
        rows = cell(evaluated.features)
        for ours, theirs in (("perturbation", "perturbation"), ("context", "cell_type"), ("batch", "batch")):
            assert evaluated.obs[ours].tolist() == obs[theirs].iloc[rows].tolist()
        made = SentenceDataset(evaluated, looked.processor, split, 8)
        assert sum(len(made[i]["labels"]) for i in range(len(made))) == sum(got)


def test_evaluation_cells_are_bounded(tmp_path):
    looked = survey(store(tmp_path), holding_out(["type_1"]), eval_cells=4, reservoir_cells=9)
    assert looked.to_cells("test").obs["split"].value_counts().to_dict() == {"control": 27, "test": 20}
    assert looked.to_cells("val") is None


# Memory


def test_waiting_cells_are_bounded_and_the_fullest_groups_give_way(tmp_path):
    source = store(tmp_path)
    looked = survey(source)
    stream = SentenceStream(source, looked, 64, buffer_cells=100, shuffle_sentences=2)
    cell = known(looked.processor)
    sentences = list(stream)
    assert sorted(i for s in sentences for i in cell(s["labels"])) == list(range(screen().n_obs))
    assert 50 < stream.progress["pending"] <= 100
    assert max(len(s["labels"]) for s in sentences) < 30  # 18 groups share 100 places
    wide = SentenceStream(source, looked, 64)
    assert sorted(len(s["labels"]) for s in wide) == [30] * 15 + [60] * 3 and wide.progress["pending"] > 500


def test_memory_does_not_depend_on_the_length_of_the_stream(tmp_path):
    held = []
    for repeats in (1, 6):
        table = pa.concat_tables([store_table(screen())] * repeats)
        source = store(tmp_path / str(repeats), table, shards=3 * repeats)
        looked = survey(source, reservoir_cells=20, control_matching="batch")
        assert {len(np.concatenate(list(parts.values()))) for parts in looked.control_rows.values()} == {20}
        stream = SentenceStream(source, looked, 8, buffer_cells=100, shuffle_sentences=4)
        most = 0
        for _ in stream:
            most = max(most, stream._pass.pool.held - stream._pass.pool._slack)
        held.append((len(looked.controls), stream.progress["pending"] <= 100, most <= 1000))
        assert stream.progress["rows"] == repeats * screen().n_obs
    assert held[0] == held[1] == (60, True, True)


def test_a_pool_gives_back_what_it_was_given():
    generator = np.random.default_rng(0)
    pool, kept, number = CellPool(), {}, 0
    pool._slack = 10
    for _ in range(200):
        size = int(generator.integers(1, 8))
        values = number + np.arange(size)
        number += size
        features = sp.csr_matrix(np.stack([values, values % 2], axis=1).astype(np.float32))
        for slot, value in zip(pool.add(CellRows(features, None, values)), values):
            assert slot not in kept
            kept[int(slot)] = int(value)
        gone = generator.choice(list(kept), max(0, len(kept) - 20), replace=False)
        pool.remove(gone)
        for slot in gone:
            del kept[int(slot)]
        asked = generator.permutation(list(kept))
        taken = pool.take(asked)
        assert np.array_equal(taken.features.toarray(), pool.dense(asked)[0])
        assert taken.batches.tolist() == pool.dense(asked)[0][:, 0].tolist() == [kept[int(slot)] for slot in asked]
        assert len(pool) == len(kept) and pool.held <= 2 * 20 + 10 + 2 * 8


def test_a_reservoir_is_a_uniform_sample_also_after_it_was_thinned():
    drawn = np.zeros((2, 60))
    for seed in range(1500):
        reservoirs = Reservoirs(12, np.random.default_rng(seed))
        # 60 cells of part a, the first 25 before part b turns up, and 60 of part b.
        for part, rows in (("a", (0, 10)), ("a", (10, 25)), ("b", (0, 30)), ("a", (25, 60)), ("b", (30, 60))):
            rows = np.arange(*rows)
            reservoirs.offer([("owner", part, rows)], lambda rows: CellRows(rows[:, None].astype(np.float32)))
        for i, part in enumerate("ab"):
            kept = reservoirs.pool.take(reservoirs.parts("owner")[part]).features[:, 0].astype(int)
            assert len(set(kept)) == 6
            drawn[i, kept] += 1
        assert len(reservoirs.pool) == 12
    # Each cell is kept with probability 0.1: 150 times, standard deviation 11.6.
    assert np.abs(drawn - 150).max() < 5 * 11.6
    assert abs(np.corrcoef(drawn[0], np.arange(60))[0, 1]) < 0.4


def test_batches_share_the_reservoir_of_their_context(tmp_path):
    looked = survey(store(tmp_path), control_matching="batch", reservoir_cells=21)
    assert {b: len(rows) for b, rows in looked.control_rows["stream", "type_0"].items()} == {"b0": 10, "b1": 10}
    for parts in looked.control_rows.values():
        for batch, rows in parts.items():
            assert {looked.batch_names[i] for i in looked.controls.batches[rows]} == {batch}
    with pytest.raises(ValueError, match="has more than 1 batch.*raise reservoir_cells"):
        survey(store(tmp_path), control_matching="batch", reservoir_cells=1)


def test_controls_match_by_batch_and_fall_back_to_the_context(tmp_path, caplog):
    data = screen()
    obs = data.obs
    lost = ((obs["cell_type"] == "type_2") & (obs["batch"] == "b1") & (obs["perturbation"] == "control")).to_numpy()
    data = data[~lost]
    source = store(tmp_path, store_table(data))
    looked = survey(source, control_matching="batch")
    cell = known(looked.processor, data)
    stream = SentenceStream(source, looked, 8)
    fell_back, seen = 0, []
    for sentence in stream:
        targets, controls = data.obs.iloc[cell(sentence["labels"])], data.obs.iloc[cell(sentence["control_cells"])]
        seen += cell(sentence["labels"])
        assert targets["batch"].nunique() == 1 and set(targets["cell_type"]) == set(controls["cell_type"])
        if (targets["cell_type"].iloc[0], targets["batch"].iloc[0]) == ("type_2", "b1"):
            fell_back += 1
        else:
            assert set(targets["batch"]) == set(controls["batch"])
    assert sorted(seen) == list(range(data.n_obs))
    assert stream.progress["fallbacks"] == fell_back > 0
    assert caplog.text.count("no control cell of batch 'b1' of stream / type_2") == 5  # its perturbations


def test_sentences_are_as_short_as_their_reservoir(tmp_path):
    source = store(tmp_path)
    looked = survey(source, reservoir_cells=5)
    sizes = [len(s["labels"]) for s in SentenceStream(source, looked, 8)]
    assert sum(sizes) == screen().n_obs and set(sizes) == {5}


# Order


def test_an_epoch_is_the_same_for_the_same_seed_and_mixes_groups(tmp_path):
    source = store(tmp_path, block_size=300)
    looked = survey(source)
    stream = SentenceStream(source, looked, 8, seed=3, shuffle_sentences=30)
    first = list(stream)
    assert same(first, list(stream)) and same(
        first, list(SentenceStream(source, looked, 8, seed=3, shuffle_sentences=30))
    )
    stream.set_epoch(1)
    assert not same(first, list(stream))
    stream.set_epoch(0)
    assert same(first, list(stream))
    assert not same(first, list(SentenceStream(source, looked, 8, seed=4, shuffle_sentences=30)))
    neighbours = [tuple(s["perturbation_ids"]) + (int(s["context_ids"]),) for s in first]
    assert np.mean([a == b for a, b in zip(neighbours, neighbours[1:])]) < 0.2


def test_an_endless_stream_is_its_epochs_one_after_the_other(tmp_path):
    source = store(tmp_path)
    looked = survey(source)
    single = SentenceStream(source, looked, 8)
    expected = []
    for epoch in range(3):
        single.set_epoch(epoch)
        expected += list(single)
    endless = iter(SentenceStream(source, looked, 8, endless=True))
    assert same(expected, [next(endless) for _ in expected])


@pytest.mark.parametrize("shards", [1, 3, 5])
@pytest.mark.parametrize("world_size, workers", [(2, 0), (3, 0), (1, 2), (2, 2), (4, 0)])
def test_ranks_and_workers_share_the_cells(tmp_path, shards, world_size, workers):
    source = store(tmp_path, shards=shards)
    looked = survey(source)
    cell, seen = known(looked.processor), []
    for rank in range(world_size):
        stream = SentenceStream(source, looked, 8, rank=rank, world_size=world_size)
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        mine = [i for s in loader for i in cell(np.asarray(s["labels"]))]
        assert mine
        seen += mine
    assert sorted(seen) == list(range(screen().n_obs))


def test_one_worker_reads_what_no_worker_reads_and_workers_follow_the_epoch(tmp_path):
    source = store(tmp_path)
    looked = survey(source)
    stream = SentenceStream(source, looked, 8)
    alone = {}
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        alone[epoch] = list(stream)
    worked = SentenceStream(source, looked, 8)
    loader = DataLoader(worked, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        worked.set_epoch(epoch)
        labels = [np.asarray(s["labels"]) for s in loader]
        assert len(labels) == len(alone[epoch])
        assert all(np.array_equal(a, b["labels"]) for a, b in zip(labels, alone[epoch]))


# Continuing


@pytest.mark.parametrize("matching", ["context", "batch"])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2), (2, 4)])
def test_a_saved_stream_goes_on_with_the_very_next_sentence(tmp_path, matching, rank, world_size):
    splits = holding_out(["type_1"])
    source = store(tmp_path / "cells")
    looked = survey(source, splits, control_matching=matching, reservoir_cells=40, eval_cells=3)
    options = {"buffer_cells": 120, "shuffle_sentences": 5, "rank": rank, "world_size": world_size, "endless": True}
    stream = iter(whole := SentenceStream(source, looked, 8, **options))
    expected = [next(stream) for _ in range(150)]
    assert whole.epoch >= 1
    for stop in (0, 1, 7, 40, 111):
        stream = SentenceStream(source, looked, 8, **options)
        iterator = iter(stream)
        head = [next(iterator) for _ in range(stop)]
        stream.save_state(tmp_path / "state")
        # Another process has nothing but the files.
        state = read_stream_state(tmp_path / "state", rank, world_size)
        other = store(tmp_path / "cells")
        restored = StreamSurvey.from_state(state, looked.processor, splits)
        resumed = SentenceStream(other, restored, 8, **options)
        resumed.load_state_dict(state)
        resumed.set_epoch(0)  # what a Trainer calls
        iterator = iter(resumed)
        assert same(expected, head + [next(iterator) for _ in range(150 - stop)])
        assert restored.counts == looked.counts
        assert restored.to_cells("test").obs.equals(looked.to_cells("test").obs)
        assert np.array_equal(restored.to_cells("test").features, looked.to_cells("test").features)


def test_a_state_that_is_loaded_can_be_saved_and_a_finished_pass_is_finished(tmp_path):
    source = store(tmp_path)
    looked = survey(source)
    stream = SentenceStream(source, looked, 8)
    iterator = iter(stream)
    for _ in range(10):
        next(iterator)
    state = stream.state_dict()
    rest = list(iterator)
    again = SentenceStream(source, looked, 8)
    again.load_state_dict(state)
    third = SentenceStream(source, looked, 8)
    third.load_state_dict(again.state_dict())
    assert same(rest, list(third)) and same(rest, list(again))
    again.load_state_dict(third.state_dict())
    assert list(again) == []
    again.set_epoch(1)
    assert again.state_dict()["pass"]["epoch"] == 1 and again.state_dict()["pass"]["sentences"] == 0
    assert len(list(again)) > 10


def test_continuing_reads_the_current_shard_and_what_follows(tmp_path, monkeypatch):
    source = store(tmp_path, shards=8)
    looked = survey(source)
    rows = []
    generate = Parquet._generate_tables

    def counted(self, *args, **kwargs):
        for key, table in generate(self, *args, **kwargs):
            rows.append(len(table))
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", counted)
    stream = SentenceStream(store(tmp_path, shards=8), looked, 8, shuffle_sentences=4)
    iterator = iter(stream)
    while stream.progress["rows"] < 0.75 * screen().n_obs:
        next(iterator)
    read = stream.progress["rows"]
    assert sum(rows) >= read
    resumed = SentenceStream(store(tmp_path, shards=8), looked, 8, shuffle_sentences=4)
    resumed.load_state_dict(stream.state_dict())
    rows.clear()
    left = list(resumed)
    assert sum(rows) <= screen().n_obs - read + -(-screen().n_obs // 8)
    assert same(left, list(iterator))


def test_a_state_is_whole_or_not_there(tmp_path, monkeypatch):
    source = store(tmp_path / "cells")
    looked = survey(source)
    stream = SentenceStream(source, looked, 8)
    stream.save_state(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("stream_state*")) == ["stream_state.json", "stream_state.safetensors"]
    before = read_stream_state(tmp_path)
    iterator = iter(stream)
    for _ in range(70):
        next(iterator)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            stream.save_state(tmp_path)
    after = read_stream_state(tmp_path)
    assert after["pass"] == before["pass"] and not list(tmp_path.glob("*.partial"))
    replaced = []

    def killed(source, target):
        replaced.append(target)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        return replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            stream.save_state(tmp_path)
    with pytest.raises(FileNotFoundError):  # new arrays beside old values would be a state that never was
        read_stream_state(tmp_path)
    stream.save_state(tmp_path)
    assert read_stream_state(tmp_path)["pass"]["sentences"] == 70
    (tmp_path / "stream_state.safetensors").write_bytes((tmp_path / "stream_state.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="the stream's state is not whole"):
        read_stream_state(tmp_path)
    (tmp_path / "stream_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected the state of rank 0 of 1"):
        read_stream_state(tmp_path)
    json.dumps({name: value for name, value in stream.state_dict().items() if name != "arrays"})


def test_states_are_refused_where_they_would_be_wrong(tmp_path):
    source = store(tmp_path)
    looked = survey(source)
    stream = SentenceStream(source, looked, 8)
    state = stream.state_dict()
    with pytest.raises(ValueError, match="the saved stream had set_size=8, this one has 16"):
        SentenceStream(source, looked, 16).load_state_dict(state)
    with pytest.raises(ValueError, match="had num_shards=3, this one has 2"):
        SentenceStream(store(tmp_path / "two", shards=2), looked, 8).load_state_dict(state)
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"set_epoch\(2\): the loaded state is in epoch 0"):
        stream.set_epoch(2)
    with pytest.raises(ValueError, match="continued with num_workers=0 alone, found 2 workers"):
        list(DataLoader(stream, batch_size=None, num_workers=2))
    stream = SentenceStream(source, looked, 8)
    list(DataLoader(stream, batch_size=None, num_workers=2))
    with pytest.raises(ValueError, match="use num_workers=0 where a run is to be continued"):
        stream.state_dict()
    count = len(list(stream))
    assert stream.state_dict()["pass"]["sentences"] == count


# What is refused


def edited(column: str, change) -> pa.Table:
    """The table with one column passed through Python."""
    table = store_table(screen(), pa.float32())
    values = table.column(column).to_pylist()
    change(values)
    return table.set_column(table.column_names.index(column), column, pa.array(values, table.column(column).type))


def set_entry(row: int, place: int, value):
    return lambda values: values[row].__setitem__(place, value)


def set_cell(row: int, value):
    return lambda values: values.__setitem__(row, value)


@pytest.mark.parametrize(
    "column, change, message",
    [
        ("perturbation", set_cell(300, None), r"'perturbation' is empty in 1 cell, first in shard 1 of 3 .*row 90"),
        ("context", set_cell(5, "  "), r"'context' is blank in shard 0 of 3 \(from 0\), row 5"),
        ("gene_ids", set_entry(250, 0, 60), r"ids of no known gene: \['60'\], first in shard 1 of 3 .*row 40"),
        ("gene_ids", set_entry(250, 0, -1), r"ids of no known gene: \['-1'\]"),
        ("gene_ids", set_cell(7, None), r"'gene_ids' is empty in 1 cell, first in shard 0 of 3 .*row 7"),
        ("gene_ids", set_entry(7, 2, None), r"'gene_ids' has an empty entry in shard 0 of 3 .*row 7"),
        ("gene_ids", lambda values: values[12].pop(), r"row 12: \d+ entries in 'gene_ids' and \d+ in 'gene_values'"),
        (
            "gene_values",
            set_entry(250, 1, np.nan),
            r"'gene_values' holds nan in shard 1 of 3 .*row 40 .*expected finite",
        ),
        ("gene_values", set_entry(250, 1, -2.0), r"holds -2.0 in shard 1 of 3 .*announced with marker="),
        ("gene_values", set_entry(250, 1, 1.5), "expected counts, found fractional values"),
    ],
)
def test_wrong_cells_are_named(tmp_path, column, change, message):
    source = store(tmp_path, edited(column, change))
    looked = survey(store(tmp_path / "right"))
    with pytest.raises(ValueError, match=message):
        list(SentenceStream(source, looked, 8))


def test_a_gene_that_stands_twice_is_named(tmp_path):
    def twice(values):
        values[250][3] = values[250][0]

    source = store(tmp_path, edited("gene_ids", twice))
    gene = screen().var_names[sp.csr_matrix(screen().X)[250].indices[0]]
    with pytest.raises(ValueError, match=rf"gene '{gene}' stands twice in shard 1 of 3 .*row 40"):
        list(SentenceStream(source, survey(store(tmp_path / "right")), 8))


def test_a_marker_is_there_where_it_is_announced(tmp_path):
    announced = StreamColumns("perturbation", "context", gene_ids="gene_ids", gene_values="gene_values", marker=-2.0)
    with pytest.raises(ValueError, match="expected the marker -2 as first entry of 'gene_values', found none"):
        survey(store(tmp_path, columns=announced))
    names = {int(token): name for token, name in zip(TOKENS, screen().var_names)}
    silent = StreamColumns("drug", "cell_line_id", gene_ids="genes", gene_values="expressions")
    with pytest.raises(ValueError, match="holds -2.0 .*a first entry that is no gene is announced with marker="):
        survey(CellStream(write(tmp_path / "atlas", atlas_table(screen())), silent, names), control="DMSO_TF")


def test_contexts_without_controls_are_named(tmp_path):
    data = screen()
    lost = ((data.obs["cell_type"] == "type_2") & (data.obs["perturbation"] == "control")).to_numpy()
    table = store_table(data[~lost])
    with pytest.raises(ValueError, match=r"1 context with training cells .*\['stream / type_2'\]; raise fill_cells"):
        survey(store(tmp_path, table))
    source = store(tmp_path, table, contexts=["type_0", "type_1"])
    looked = survey(source)
    cell = known(looked.processor, data)
    seen = [i for s in SentenceStream(source, looked, 8) for i in cell(s["labels"])]
    assert sorted(seen) == np.flatnonzero(data.obs["cell_type"].ne("type_2")).tolist()
    with pytest.raises(ValueError, match="contexts names 'type_9', which is not in the data"):
        survey(store(tmp_path, table, contexts=["type_0", "type_9"]))
    # Cells of a context that the first look did not meet.
    with pytest.raises(ValueError, match=r"no control cells: \['stream / type_2'\]|stream / type_2.*raise fill_cells"):
        list(SentenceStream(store(tmp_path, table), looked, 8))


def test_a_first_look_that_stops_early_says_what_it_did_not_see(tmp_path):
    data = screen()
    late = (data.obs["perturbation"] == "pert_3").to_numpy()
    table = store_table(data[np.argsort(late, kind="stable")])
    source = store(tmp_path, table, shards=1)
    looked = survey(source, fill_cells=330)
    assert (looked.cells, looked.complete) == (350, False)
    assert looked.processor.vocabulary.perturbations == ["pert_0", "pert_1", "pert_2"]
    with pytest.raises(
        ValueError, match="perturbation 'pert_3' was not among the 350 rows of the first look; raise fill_"
    ):
        list(SentenceStream(source, looked, 8))
    assert survey(source).complete


def test_what_does_not_fit_together_is_refused(tmp_path):
    source = store(tmp_path)
    looked = survey(source)
    stream = write(tmp_path, store_table(screen()))
    genes = screen().var_names.tolist()
    with pytest.raises(TypeError, match="expected a datasets.IterableDataset, found list"):
        CellStream([], STORE, genes)
    with pytest.raises(KeyError, match="the stream has no column 'gene_id'; did you mean"):
        CellStream(
            stream, StreamColumns("perturbation", "context", gene_ids="gene_id", gene_values="gene_values"), genes
        )
    with pytest.raises(ValueError, match="gene names are not unique"):
        CellStream(stream, STORE, [*genes[:-1], genes[0]])
    with pytest.raises(ValueError, match="expected the names behind gene_ids"):
        CellStream(stream, STORE)
    with pytest.raises(ValueError, match="expected both columns or neither"):
        StreamColumns("perturbation", "context", gene_ids="gene_ids")
    with pytest.raises(ValueError, match="no values: name the columns"):
        StreamColumns("perturbation", "context")
    with pytest.raises(KeyError, match=r"1 of the model's 2 genes are missing from the stream: \['gene_77'\]"):
        survey(source, genes=["gene_1", "gene_77"])
    with pytest.raises(ValueError, match="no control cells among 630 rows.*say which label marks"):
        survey(source, control="DMSO")
    with pytest.raises(ValueError, match="expected counts, found fractional"):
        survey(store(tmp_path / "log", store_table(log_screen(), pa.float32())), normalize="counts_to_log1p")
    with pytest.raises(ValueError, match="'type_7' of 'stream', which is not there"):
        survey(source, holding_out(["type_7"]))
    with pytest.raises(ValueError, match="is of dataset 'stream', which the splits do not name"):
        survey(source, Splits({"other": []}, {"other"}))
    with pytest.raises(ValueError, match="the splits leave no cell for training"):
        survey(source, holding_out(["type_0", "type_1", "type_2"]))
    with pytest.raises(ValueError, match="1 perturbation held out for test without a training cell"):
        survey(
            source,
            Splits({"stream": []}, {"stream"}, {}, {("stream", f"type_{i}"): {"test": ["pert_3"]} for i in range(3)}),
        )
    with pytest.raises(ValueError, match="buffer_cells=49: expected at least the 50 cells of a block"):
        SentenceStream(source, looked, 8, buffer_cells=49)
    with pytest.raises(ValueError, match="rank=2: expected 0 to 1"):
        SentenceStream(source, looked, 8, rank=2, world_size=2)
    assert SentenceStream(source, looked, 8).training_cells() is None  # none were asked for


def log_screen() -> ad.AnnData:
    data = screen().copy()
    data.X.data = np.log1p(data.X.data)
    return data


def test_gene_names_from_files(tmp_path):
    frame = pd.DataFrame({"token_id": [5, 3], "gene_symbol": ["B", "A"]})
    frame.to_csv(tmp_path / "genes.csv")
    frame.to_parquet(tmp_path / "genes.parquet")
    (tmp_path / "ids.json").write_text('{"5": "B", "3": "A"}')
    (tmp_path / "names.json").write_text('["A", "B"]')
    for name in ("genes.csv", "genes.parquet", "ids.json"):
        assert read_gene_names(tmp_path / name, "token_id", "gene_symbol") == {5: "B", 3: "A"}
    assert read_gene_names(tmp_path / "names.json") == {0: "A", 1: "B"}
    with pytest.raises(KeyError, match="has no column 'id'"):
        read_gene_names(tmp_path / "genes.csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_gene_names(tmp_path / "none.csv")
    pd.concat([frame, frame]).to_csv(tmp_path / "twice.csv")
    with pytest.raises(ValueError, match="expected one name for each gene id"):
        read_gene_names(tmp_path / "twice.csv", "token_id", "gene_symbol")


# Training


def arguments(folder: Path, **options) -> StateTrainingArguments:
    return StateTrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, **options
    )


def model(processor: StateProcessor) -> StateForPerturbation:
    torch.manual_seed(0)
    vocabulary = processor.vocabulary
    return StateForPerturbation(
        StateConfig.from_preset(
            "tiny",
            input_dim=processor.feature_dim,
            num_perturbations=len(vocabulary.perturbations),
            num_contexts=len(vocabulary.contexts),
            num_batches=len(vocabulary.batches),
        )
    )


def test_a_model_trains_on_a_stream_and_is_evaluated(tmp_path):
    source = store(tmp_path / "cells")
    looked = survey(source, holding_out(["type_1"]), eval_cells=20, baseline_cells=20)
    held_out = SentenceDataset(looked.to_cells("test"), looked.processor, "test", 8)
    trained = model(looked.processor)
    before = {name: value.clone() for name, value in trained.named_parameters()}
    stream = SentenceStream(source, looked, 8)
    trainer = StateTrainer(trained, arguments(tmp_path, max_steps=40, save_strategy="no"), stream, held_out)
    trainer.train()
    assert trainer.state.global_step == 40 and stream.epoch > 0
    moved = [name for name, value in trained.named_parameters() if not torch.equal(value, before[name])]
    assert moved == list(before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    figures = [name for name in metrics if name.startswith("eval_perturbation_mean_")]
    assert figures and all(np.isfinite(metrics[name]) for name in figures)


def test_a_trainer_continues_a_stream_from_its_last_checkpoint(tmp_path):
    source = store(tmp_path / "cells")
    looked = survey(source)

    def run(folder: Path, steps: int, resume: bool) -> dict[str, torch.Tensor]:
        stream = SentenceStream(source, looked, 8, endless=True)
        trainer = StateTrainer(model(looked.processor), arguments(folder, max_steps=steps, save_steps=10), stream)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole", 20, False)
    run(tmp_path / "parts", 10, False)
    continued = run(tmp_path / "parts", 20, True)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_stream_and_a_dataset_answer_alike(tmp_path):
    """From the same cells, both give as many sentences in an epoch, and the shares of several processes add up to the whole."""
    source = store(tmp_path / "cells")
    looked = survey(source, reservoir_cells=1000, baseline_cells=1000)
    cells = looked.to_cells("train")
    options = {"seed": 0, "control_sentences": False}
    dataset = SentenceDataset(cells, looked.processor, "train", 10, **options)
    stream = SentenceStream(source, looked, 10, **options)
    assert dataset.num_sentences == stream.num_sentences == len(dataset)
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    for drop_last, batches in ((False, math.ceil(len(dataset) / 4)), (True, len(dataset) // 4)):
        args.dataloader_drop_last = drop_last
        assert dataset.steps_per_epoch(args) == stream.steps_per_epoch(args) == math.ceil(batches / 4)
    state = TrainerState(epoch=0.3, global_step=5)
    assert dataset.epoch_of(args, state) == 0.3
    assert stream.epoch_of(args, state) == 5 / stream.steps_per_epoch(args)
    whole = dataset.group_sums()
    assert whole.num_cells == len(cells)
    for data in (dataset, stream):
        merged = GroupSums.merged([data.group_sums(part, 3) for part in range(3)])
        assert merged.counts == whole.counts
        for key, total in whole.sums.items():
            np.testing.assert_allclose(merged.sums[key], total, rtol=1e-12)
    assert not dataset.load_state(tmp_path) and dataset.loader(args, SentenceCollator()) is None
    taught, own = stream.training_cells(), dataset.training_cells()
    assert taught.groups.equals(own.groups) and np.array_equal(taught.features, own.features)


class StreamTrainer(StateTrainer):
    """A trainer that reads no batch ahead, so that the state of the stream is that of the last step."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator)


def test_a_training_that_is_continued_is_the_training_that_was_not_stopped(tmp_path):
    source = store(tmp_path / "cells")
    looked = survey(source)

    def run(steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        stream = SentenceStream(source, looked, 8, endless=True)
        options = {"max_steps": steps, "save_steps": 10, "ignore_data_skip": True, "gradient_accumulation_steps": 2}
        trainer = StreamTrainer(model(looked.processor), arguments(tmp_path / "run", **options), stream)
        if resume is not None:
            stream.load_state_dict(read_stream_state(resume))
        trainer.train(resume_from_checkpoint=resume)
        stream.save_state(tmp_path / "run" / f"checkpoint-{steps}")
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}, stream.epoch

    whole, epoch = run(20)
    assert epoch >= 1
    run(10)
    continued, _ = run(20, str(tmp_path / "run" / "checkpoint-10"))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
