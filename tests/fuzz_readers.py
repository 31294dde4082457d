"""What the fuzzers read: whole files, each with the reader that it is for, and the errors with which a reader may refuse one."""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.numpy import save_file


# Files of old versions of anndata.
OLD = Path(__file__).parent / "data" / "anndata_files"

# What the callers of readers know: `ERRORS` of the commands, but for disks that fail.
REFUSALS = (ValueError, KeyError, FileNotFoundError, FileExistsError, IsADirectoryError)


def read_cells(path: Path):
    from pertstate.data.arguments import DataArguments
    from pertstate.data.cells import load
    from pertstate.data.info import describe

    describe(path)
    source = DataArguments(datasets=str(path)).file_source()
    load(source, DataArguments(datasets=str(path)).resolve_splits(source.groups))


def read_checkpoint(path: Path):
    from pertstate.hub.checkpoints import load_whole

    load_whole(str(path.parent))


def read_vocabulary(path: Path):
    from pertstate.base.vocabulary import Vocabulary

    Vocabulary.from_file(path)


def read_settings(path: Path):
    from pertstate.base.processor_files import read_processor_tables

    read_processor_tables(str(path.parent), {})


def read_adapter(path: Path):
    from pertstate.base.checkpoint_files import check_adapter

    check_adapter(str(path.parent), {})


def read_pickle(path: Path):
    from pertstate.data.restricted_pickle import read_pickled

    read_pickled(path)


def read_run(path: Path):
    from pertstate.training.run_config import load_run_config

    load_run_config(str(path), [])


def read_splits(path: Path):
    from pertstate.data.splits import Splits

    Splits.from_toml(path, ["screen"])


def read_features(path: Path):
    from pertstate.data.perturbation_features import read_perturbation_features

    read_perturbation_features(path)


def read_record(path: Path):
    from pertstate.data.record import RunRecord

    RunRecord.load(path.parent)


def read_scores(path: Path):
    from pertstate.evaluation.report import render_report
    from pertstate.evaluation.report_data import read_log
    from pertstate.evaluation.scores import Scores

    render_report(Scores.load(path.parent), read_log(path.parent), "title")


def read_store(path: Path):
    from pertstate.data.arguments import DataArguments
    from pertstate.data.store import load_store
    from pertstate.data.stores import open_store

    store = open_store(str(path.parent))
    groups = DataArguments(store=str(path.parent))
    cells, _ = load_store(store, groups.resolve_splits(store.groups))
    cells.features[: len(cells)]


@dataclass
class Seed:
    """
    A whole file.

    Args:
        path (`Path`): its place, where damaged forms of it are put.
        read (`Callable`): reads what lies there.
        kind (`str`): the name of its reader, which all files of one kind share.
    """

    path: Path
    read: Callable[[Path], None]
    kind: str


def make_seeds(folder: Path) -> list[Seed]:
    """Whole files of every kind, each in the company that its reader asks for."""
    seeds = [
        *_cells(folder),
        *_checkpoint(folder / "checkpoint"),
        *_adapter(folder / "adapter"),
        *_pickles(folder),
        *_features(folder),
        *_run(folder / "run"),
        *_store(folder),
    ]
    run = "data:\n  datasets: {a: x.h5ad}\n  test_contexts: [k]\nmodel: &m {preset: tiny}\ntraining: {max_steps: 3, <<: *m}\n"
    (folder / "run.yaml").write_text(run)
    (folder / "splits.toml").write_text(
        '[datasets]\nscreen = "x.h5ad"\n[training]\nscreen = "train"\n[zeroshot]\n"screen.k" = "test"\n'
        '[fewshot."screen.l"]\nval = ["A"]\ntest = ["B", "C"]\n'
    )
    return [*seeds, Seed(folder / "run.yaml", read_run, "run"), Seed(folder / "splits.toml", read_splits, "splits")]


def _screen(matrix) -> ad.AnnData:
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 10, "cell_type": "k"}, index=[f"c{i}" for i in range(20)])
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(8)]))


def _cells(folder: Path) -> list[Seed]:
    counts = np.random.default_rng(0).poisson(2.0, (20, 8)).astype(np.float32)
    _screen(sp.csr_matrix(counts)).write_h5ad(folder / "cells.h5ad")
    other = _screen(counts)
    other.obs["perturbation"] = other.obs["perturbation"].astype(str)
    other.layers["columns"], other.uns["log1p"] = sp.csc_matrix(counts), {"base": None}
    other.write_h5ad(folder / "dense.h5ad", compression="gzip")
    old = ("0.6.22.h5ad", "0.7.8.h5ad", "0.12.6-pandas3.h5ad")
    for name in old:
        (folder / name).write_bytes(gzip.decompress((OLD / f"{name}.gz").read_bytes()))
    return [Seed(folder / name, read_cells, "h5ad") for name in ("cells.h5ad", "dense.h5ad", *old)]


def _checkpoint(folder: Path) -> list[Seed]:
    from pertstate import StateConfig, StateForPerturbation, StateProcessor

    cells = _screen(sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (20, 8)).astype(np.float32)))
    StateProcessor.fit(cells).save_pretrained(folder)
    config = StateConfig.from_preset("tiny", input_dim=8, num_perturbations=1, num_contexts=1)
    StateForPerturbation(config).save_pretrained(folder)
    return [
        Seed(folder / "config.json", read_checkpoint, "config"),
        Seed(folder / "processor_config.json", read_settings, "processor"),
        Seed(folder / "vocabulary.json", read_vocabulary, "vocabulary"),
        Seed(folder / "model.safetensors", read_checkpoint, "weights"),
    ]


def _adapter(folder: Path) -> list[Seed]:
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q"],
        "lora_dropout": 0.1,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    halves = {"a.q.lora_A.weight": np.ones((2, 3), np.float32), "a.q.lora_B.weight": np.ones((3, 2), np.float32)}
    save_file(halves, folder / "adapter_model.safetensors")
    return [
        Seed(folder / "adapter_config.json", read_adapter, "adapter"),
        Seed(folder / "adapter_model.safetensors", read_adapter, "halves"),
    ]


def _pickles(folder: Path) -> list[Seed]:
    content = {
        "names": ["a", "b"],
        "sizes": {"x": 3, 4: (1.5, None)},
        "array": np.arange(4.0),
        "text": np.array(["a", "bc"]),
    }
    for protocol in (0, 2, 5):
        (folder / f"plain{protocol}.pkl").write_bytes(pickle.dumps({**content, "set": {1, 2}}, protocol))
    weights = {"weights": torch.ones(3, 2), "step": 4, "half": torch.zeros(4, dtype=torch.bfloat16).T}
    torch.save(weights, folder / "torch.pt")
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    names = ("plain0.pkl", "plain2.pkl", "plain5.pkl", "torch.pt", "old.pt")
    return [Seed(folder / name, read_pickle, "pickle") for name in names]


def _features(folder: Path) -> list[Seed]:
    (folder / "features.csv").write_text("name,x,y\nA,1.5,2\nB,3,4e1\n")
    np.savez(folder / "features.npz", names=np.array(["A", "B"]), features=np.ones((2, 3)))
    pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}, index=["A", "B"]).to_parquet(folder / "features.parquet")
    save_file({"features": np.ones((2, 3), np.float32)}, folder / "features.safetensors", {"names": '["A", "B"]'})
    torch.save({"A": torch.ones(3), "B": torch.zeros(3)}, folder / "features.pt")
    endings = ("csv", "npz", "parquet", "safetensors", "pt")
    return [Seed(folder / f"features.{ending}", read_features, ending) for ending in endings]


def _run(folder: Path) -> list[Seed]:
    """What a run leaves beside its model: its record, its scores and its log."""
    import pertstate
    from pertstate.data import simulate_screen

    screen = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=6, cells_per_group=6, seed=1)
    fields = {"max_steps": 1, "preset": "tiny", "set_size": 4, "validation": "none", "use_cpu": True, "quiet": True}
    pertstate.fit(screen, folder, test_contexts=["type_2"], **fields)
    shutil.copyfile(folder / "trainer_state.json", folder / "scores" / "trainer_state.json")
    scores = folder / "scores"
    return [
        Seed(folder / "record.json", read_record, "record"),
        Seed(folder / "record.safetensors", read_record, "means"),
        Seed(scores / "scores.json", read_scores, "scores"),
        Seed(scores / "scores.safetensors", read_scores, "scored"),
        Seed(scores / "trainer_state.json", read_scores, "log"),
    ]


def _store(folder: Path) -> list[Seed]:
    from pertstate.data.arguments import DataArguments, PrepareArguments
    from pertstate.data.preparation import prepare

    data = DataArguments(datasets={"screen": str(folder / "cells.h5ad")})
    prepare(data, folder / "store", PrepareArguments(), quiet=True)
    manifest, (shard, *_) = folder / "store" / "store.json", sorted((folder / "store").rglob("*.arrow"))
    return [Seed(manifest, read_store, "store"), Seed(shard, read_store, "shard")]


def make_corpus(folder: Path, seeds: list[Seed]) -> Path:
    """The contents of seeds of one kind as the files of a folder, for a fuzzer that is guided by coverage."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        shutil.copyfile(seed.path, folder / seed.path.name)
    return folder
