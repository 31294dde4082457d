"""A cell store on the Hub: pushed whole, opened and streamed by name, pinned to a commit; with the real clients."""

import json
import os
import subprocess

import launches
import pytest

from pertstate.data import prepare, simulate_screen
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.stores import push_store


# Each part runs in one process of its own, because `datasets` and `transformers` read where the Hub is when imported.
OPEN = """
import json, sys
import numpy as np
from pertstate.data.stores import open_store
store = open_store(sys.argv[1])
print(json.dumps([store.obs().index.tolist(), float(store.to_anndata().X.sum()), len(store.groups)]))
"""
RUN = """
import sys
import pertstate.train
pertstate.train.main(sys.argv[1:])
"""
CONFIG = """
data: {{test_contexts: [type_2]}}
model: {{preset: tiny, set_size: 8}}
training: {{max_steps: 2, disable_tqdm: true, use_cpu: true, per_device_train_batch_size: 2}}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub_store")
    adata = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=40, cells_per_group=20, seed=2)
    adata.write_h5ad(folder / "screen.h5ad")
    data = DataArguments(datasets={"screen": str(folder / "screen.h5ad")}, batch_key="batch")
    return prepare(data, folder / "store", PrepareArguments(), quiet=True)


@pytest.fixture(scope="module")
def later(store):
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=40, cells_per_group=6, seed=3)
    adata.write_h5ad(store.path.parent / "other.h5ad")
    data = DataArguments(datasets={"screen": str(store.path.parent / "other.h5ad")}, batch_key="batch")
    return prepare(data, store.path.parent / "later", quiet=True)


def python(code: str, *arguments, check=True) -> subprocess.CompletedProcess:
    done = launches.run(["-c", code, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_a_pushed_store_is_opened_by_name(hub, store, later):
    commit = push_store(store, "ada/screen")
    assert commit == hub.repository("ada/screen", "dataset").branches["main"]
    manifest = json.loads(hub.read("ada/screen", kind="dataset")["store.json"])
    assert [source["path"] for source in manifest["sources"]] == ["screen.h5ad"]
    expected = [store.obs().index.tolist(), float(store.to_anndata().X.sum()), len(store.groups)]
    assert json.loads(python(OPEN, "ada/screen").stdout.splitlines()[-1]) == expected
    # A later push replaces the cells; the commit still gives the first.
    push_store(later, "ada/screen")
    assert json.loads(python(OPEN, f"ada/screen@{commit}").stdout.splitlines()[-1]) == expected
    assert len(json.loads(python(OPEN, "ada/screen").stdout.splitlines()[-1])[0]) == len(later)


@pytest.mark.slow
def test_runs_read_and_stream_it_by_name(hub, store, tmp_path):
    push_store(store, "lab/screen", private=True)
    (tmp_path / "run.yaml").write_text(CONFIG.format())
    words = ["--config", tmp_path / "run.yaml", "--output_dir"]
    python(RUN, *words, tmp_path / "stored", "--store", "lab/screen")
    python(RUN, *words, tmp_path / "streamed", "--stream.path", "lab/screen")
    vocabularies = [json.loads((tmp_path / name / "vocabulary.json").read_text()) for name in ("stored", "streamed")]
    assert vocabularies[0] == vocabularies[1] and vocabularies[0]["contexts"] == ["type_0", "type_1"]
    for name in ("stored", "streamed"):
        assert (tmp_path / name / "model.safetensors").is_file()
    hub.expire(os.environ["HF_TOKEN"])
    for flags in (["--store", "lab/screen"], ["--stream.path", "lab/screen"]):
        done = python(RUN, *words, tmp_path / "no", *flags, check=False)
        assert done.returncode == 1 and os.environ["HF_TOKEN"] not in done.stderr
        assert "PermissionError: lab/screen: the Hub answers 401, this token may not do that" in done.stderr


def test_a_broken_push_leaves_what_was_there(hub, store, later):
    first = push_store(store, "ada/screen")
    before = hub.read("ada/screen", kind="dataset")
    hub.refuse("/commit/", 500, method="POST", times=20)
    with pytest.raises(OSError, match="ada/screen: the Hub answers 500, try again later"):
        push_store(later, "ada/screen")
    assert hub.read("ada/screen", kind="dataset") == before
    assert hub.repository("ada/screen", "dataset").branches["main"] == first


def test_names_that_are_not_there(hub, store):
    with pytest.raises(PermissionError, match="other/screen: the Hub answers 403, this token may not do that"):
        push_store(store, "other/screen")
    done = python(OPEN, "ada/gone", check=False)
    assert done.returncode == 1
    assert "FileNotFoundError: ada/gone: the Hub has no such data set, revision or store.json" in done.stderr
