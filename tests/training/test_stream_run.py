"""Runs that train on a stream, from a cell store or from named columns, and that are stopped and continued."""

import json
import shutil
import signal
from pathlib import Path

import launches
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pertstate.train
from pertstate.data import prepare, simulate_screen
from pertstate.data.arguments import DataArguments, PrepareArguments, StreamArguments
from pertstate.data.stores import write_parquet
from pertstate.data.stream_state import read_stream_state
from pertstate.data.stream_survey import survey_stream
from pertstate.data.streaming import SentenceStream
from pertstate.data.streams import open_stream


RUN = """
data: {{val_contexts: [type_1], test_contexts: [type_3], test_perturbations: [pert_0+pert_1], control_matching: batch}}
stream: {{path: {folder}/parquet, eval_cells: 16, block_size: 64, buffer_cells: 256, shuffle_sentences: 8}}
model: {{preset: tiny, set_size: 8}}
training:
  output_dir: {folder}/run
  max_steps: 12
  save_steps: 4
  eval_steps: 6
  logging_steps: 1
  load_best_model_at_end: false
  per_device_train_batch_size: 4
  learning_rate: 1.0e-3
  disable_tqdm: true
  use_cpu: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store in five shards, and the same as parquet."""
    folder = tmp_path_factory.mktemp("stream")
    adata = simulate_screen(
        num_contexts=4, num_perturbations=3, num_genes=60, cells_per_group=20, combinations=[(0, 1)], seed=1
    )
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    adata.write_h5ad(folder / "screen.h5ad")
    data = DataArguments(datasets={"screen": str(folder / "screen.h5ad")}, batch_key="batch")
    from pertstate.data import preparation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_cells_of_shard", lambda *_: 100)
        store = prepare(data, folder / "store", PrepareArguments(), quiet=True)
    assert len(store.manifest.shards) == 5
    write_parquet(store, folder / "parquet")
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return folder


def run(folder, output, *flags) -> dict:
    return pertstate.train.main(["--config", str(folder / "run.yaml"), "--output_dir", str(output), *flags])


@pytest.fixture(scope="module")
def unbroken(folder) -> Path:
    metrics = run(folder, folder / "unbroken")
    assert {"test_pearson", "test_energy", "test_no_change_energy", "test_perturbation_mean_energy"} <= set(metrics)
    return folder / "unbroken"


def assert_same_weights(one: Path, other: Path):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_folder_is_that_of_any_run(unbroken):
    vocabulary = json.loads((unbroken / "vocabulary.json").read_text())
    assert vocabulary["contexts"] == ["type_0", "type_2"] and vocabulary["perturbations"] == [
        "pert_0",
        "pert_1",
        "pert_2",
    ]
    assert len(vocabulary["genes"]) == 60 and vocabulary["batches"] == ["b0", "b1"]
    history = json.loads((unbroken / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_energy" in entry for entry in history) == 2
    assert not list(unbroken.rglob("*.partial"))
    assert "- `parquet`, " in (unbroken / "README.md").read_text()


def test_arrow_and_parquet_are_the_same_stream(folder, unbroken):
    run(folder, folder / "arrow", "--stream.path", str(folder / "store"))
    assert_same_weights(folder / "arrow", unbroken)


def test_killed_and_continued_it_ends_with_the_same_weights(folder, unbroken, tmp_path):
    words = [launches.TRAIN, "--config", folder / "run.yaml", "--output_dir", tmp_path]
    process = launches.start(words)
    for line in process.stderr:
        if "  loss " in line and (tmp_path / "checkpoint-4").exists():
            break
    assert process.kill().returncode == -signal.SIGKILL
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept and "config.json" not in kept
    state = read_stream_state(tmp_path / "checkpoint-4")
    assert state["pass"]["sentences"] >= 16
    done = launches.run([*words, "--resume_from_checkpoint", "last"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from" in done.stderr
    assert_same_weights(tmp_path, unbroken)


def test_batches_by_cells_of_a_stream_are_continued_exactly(folder, tmp_path):
    flags = ["--cells_per_batch", "28", "--save_total_limit", "3"]
    run(folder, tmp_path / "whole", *flags)
    state = read_stream_state(tmp_path / "whole" / "checkpoint-4")
    # At least 21 cells each: another sentence might not have fitted.
    assert 4 * 3 <= state["pass"]["sentences"] <= 4 * 28
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "part" / "checkpoint-8")
    run(folder, tmp_path / "part", *flags, "--resume_from_checkpoint", "last")
    assert_same_weights(tmp_path / "part", tmp_path / "whole")


def test_two_processes_read_a_stream_once(folder, tmp_path):
    words = [launches.TRAIN, "--config", folder / "run.yaml", "--output_dir", tmp_path]
    done = launches.run_together([*words, "--max_steps", "4"])
    assert done.returncode == 0, done.stderr[-3000:]
    positions = [read_stream_state(tmp_path / "checkpoint-4", rank, 2)["pass"]["position"] for rank in (0, 1)]
    assert all(rows > 0 for *_, rows in positions)
    with pytest.raises(FileNotFoundError, match="expected the state of rank 0 of 1"):
        run(folder, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-4"))


def test_the_learning_rate_decays_by_epochs_of_a_stream(folder, tmp_path):
    run(folder, tmp_path, "--lr_decay_epochs", "1", "--max_steps", "19", "--save_steps", "19", "--eval_strategy", "no")
    state = json.loads((tmp_path / "checkpoint-19" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    # 2 x 3 perturbed groups of 20 cells and 4 x 40 control cells: 35 sentences of 8, 4 to a step.
    np.testing.assert_allclose(rates, [1e-3] * 9 + [9e-4] * 9 + [8.1e-4], rtol=1e-12)
    with pytest.raises(ValueError, match=r"the first look at it ended after \d+ cells.*lr_decay_epochs: null"):
        run(folder, tmp_path, "--lr_decay_epochs", "1", "--fill_cells", "400", "--overwrite")


def test_columns_are_named(folder, tmp_path):
    """The layout is that of the published drug atlas: a marker first, gene ids from a table, other names of labels."""
    import anndata as ad
    import pyarrow as pa
    import pyarrow.parquet as pq

    adata = ad.read_h5ad(folder / "screen.h5ad")
    adata.obs["drug"] = adata.obs["perturbation"].astype(str).replace("control", "DMSO_TF")
    rows = []
    for cell, obs in zip(adata.X, adata.obs.itertuples()):
        genes, values = [1, *(cell.indices + 100).tolist()], [-2.0, *cell.data.tolist()]
        rows.append({"genes": genes, "expressions": values, "drug": obs.drug, "cell_line_id": obs.cell_type})
    (tmp_path / "atlas").mkdir()
    for i in range(2):
        pq.write_table(pa.Table.from_pylist(rows[i::2]), tmp_path / "atlas" / f"{i}.parquet")
    names = pa.table({"token_id": list(range(100, 160)), "gene_symbol": adata.var_names.tolist()})
    pq.write_table(names, tmp_path / "genes.parquet")
    (tmp_path / "genes.txt").write_text("\n".join(adata.var_names[:40]) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"""
data: {{control: DMSO_TF, test_contexts: [type_3], genes_file: {tmp_path}/genes.txt}}
stream:
  path: {tmp_path}/atlas
  columns: {{perturbation: drug, context: cell_line_id, gene_ids: genes, gene_values: expressions, marker: -2}}
  gene_names: {tmp_path}/genes.parquet
  gene_id_column: token_id
  gene_name_column: gene_symbol
  block_size: 64
model: {{preset: tiny, set_size: 8}}
training: {{output_dir: {tmp_path}/run, max_steps: 3, disable_tqdm: true, use_cpu: true}}
"""
    )
    metrics = pertstate.train.main(["--config", str(tmp_path / "run.yaml")])
    assert np.isfinite(metrics["test_energy"])
    from pertstate import StateProcessor

    processor = StateProcessor.from_pretrained(tmp_path / "run")
    assert processor.vocabulary.genes == adata.var_names[:40].tolist() and processor.normalize == "counts_to_log1p"
    assert (processor.perturbation_key, processor.control, processor.context_key) == ("drug", "DMSO_TF", "cell_line_id")


def test_a_store_is_streamed_as_it_was_read(folder, tmp_path):
    import anndata as ad

    adata = ad.read_h5ad(folder / "screen.h5ad")
    adata.obs = adata.obs.rename(columns={"perturbation": "gene", "cell_type": "line"}).astype(str)
    adata.obs["gene"] = adata.obs["gene"].replace("control", "NT")
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "named.h5ad")
    keys = {"perturbation_key": "gene", "context_key": "line", "control": "NT", "input": "layers/counts"}
    data = DataArguments(datasets=str(tmp_path / "named.h5ad"), target_sum=5000, **keys)
    prepare(data, tmp_path / "store", quiet=True)
    (tmp_path / "run.yaml").write_text(
        "model: {preset: tiny, set_size: 8}\ndata: {test_contexts: [type_3]}\n"
        "training: {max_steps: 2, disable_tqdm: true, use_cpu: true}\n"
    )
    words = ["--config", str(tmp_path / "run.yaml"), "--output_dir"]
    pertstate.train.main([*words, str(tmp_path / "streamed"), "--stream.path", str(tmp_path / "store")])
    pertstate.train.main([*words, str(tmp_path / "stored"), "--store", str(tmp_path / "store")])
    one, other = (json.loads((tmp_path / n / "processor_config.json").read_text()) for n in ("streamed", "stored"))
    assert one == other and one["target_sum"] == 5000 and {name: one[name] for name in keys} == keys
    with pytest.raises(ValueError, match="data.control='DMSO', but the store was prepared with 'NT'"):
        flags = ["--stream.path", str(tmp_path / "store"), "--control", "DMSO"]
        pertstate.train.main([*words, str(tmp_path / "no"), *flags])


def test_perturbations_as_vectors_from_a_stream(folder, tmp_path):
    np.savez(tmp_path / "vectors.npz", **{f"pert_{i}": np.eye(3, 5)[i] for i in range(3)})
    flags = ["--perturbation_features", str(tmp_path / "vectors.npz"), "--max_steps", "2", "--val_contexts", "[]"]
    metrics = run(folder, tmp_path / "run", *flags)
    assert np.isfinite(metrics["test_energy"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["perturbation_dim"] == 5 and config.get("num_perturbations") is None
    assert (tmp_path / "run" / "perturbation_features.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--store", "s"], ValueError, "data: \\['store'\\] are not for a stream"),
        (["--hvg_on_all", "true"], ValueError, "data: \\['hvg_on_all'\\] are not for a stream"),
        (["--sentences_per_group", "equal"], ValueError, "data: \\['sentences_per_group'\\] are not for a stream"),
        (["--stream.columns", "{perturbation: drug}"], ValueError, "is a cell store, whose columns are known"),
        (["--stream.path", "gone/away/x.parquet"], FileNotFoundError, "gone/away/x.parquet: no such file"),
        (
            ["--test_contexts", "type_9"],
            ValueError,
            "held-out context 'type_9' is not in the data; did you mean 'type_",
        ),
        (["--test_perturbations", "pert_9"], ValueError, "held-out perturbation 'pert_9' is not in the data"),
        (["--genes", "0"], ValueError, "genes=0: expected between 1 and the"),
        (["--dataloader_num_workers", "1"], ValueError, "a stream is read by the process that trains"),
        (["--fill_cells", "0"], ValueError, "fill_cells=0: expected at least 1 row"),
    ],
)
def test_a_wrong_stream_is_one_clear_error(folder, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        run(folder, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_columns_without_names_are_asked_for(folder, tmp_path):
    flags = ["--stream.path", str(folder / "parquet" / "data")]
    with pytest.raises(ValueError, match="is no cell store; say which column holds what with columns"):
        run(folder, tmp_path / "run", *flags)
    columns = "{perturbation: perturbation, context: context, gene_ids: gene_ids, gene_values: gene_values}"
    with pytest.raises(ValueError, match="name the file that gives each gene id its name"):
        run(folder, tmp_path / "run", *flags, "--stream.columns", columns)
    with pytest.raises(ValueError, match="stream.columns: unknown \\['perturbatoin'\\]"):
        run(folder, tmp_path / "run", *flags, "--stream.columns", "{perturbatoin: x}")


def test_a_stream_corrects_the_controls_as_cells_in_memory_do(folder, tmp_path):
    """The first look keeps all control cells here, so both anchors are the same, and so are both corrections."""
    shared = {"preset": "tiny", "set_size": 8, "residual": "anchor"}
    training = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    held = {"val_contexts": ["type_1"], "test_contexts": ["type_3"]}
    sections = {
        "memory": {"data": {"datasets": {"screen": f"{folder}/screen.h5ad"}, "batch_key": "batch", **held}},
        "stream": {"data": held, "stream": {"path": f"{folder}/parquet", "eval_cells": 1000, "baseline_cells": 1000}},
    }
    figures, tables = {}, {}
    for name, section in sections.items():
        content = {**section, "model": shared, "training": {**training, "output_dir": str(tmp_path / name)}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        figures[name] = pertstate.train.main([str(tmp_path / f"{name}.yaml")])
        assert json.loads((tmp_path / name / "processor_config.json").read_text())["control_expression"] is True
        tables[name] = load_file(tmp_path / name / "model.safetensors")
    for name in ("change", "log_fold", "control_expression", "control_counts", "control_variation"):
        one, other = (tables[of][f"anchor.{name}"] for of in ("memory", "stream"))
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name in ("test_pearson", "test_mae", "test_energy"):
        assert figures["stream"][name] == pytest.approx(figures["memory"][name], rel=1e-3)


def test_sentences_of_a_stream_say_what_the_sampled_controls_express(folder):
    source = open_stream(StreamArguments(path=str(folder / "parquet"), block_size=64))
    survey = survey_stream(source, progress=False, reservoir_cells=1000)
    survey.processor.control_expression = True
    cells = survey.controls.dense(np.concatenate(list(survey.control_rows["screen", "type_2"].values())))[0]
    number = survey.processor.vocabulary.contexts.index("type_2")
    sentences = [of for of in SentenceStream(source, survey, 8) if of["context_ids"] == number]
    assert sentences and len(cells) == 40
    for sentence in sentences:
        assert sentence["control_counts"] == 40
        np.testing.assert_allclose(sentence["control_expression"], np.expm1(cells).mean(axis=0), rtol=1e-5)
