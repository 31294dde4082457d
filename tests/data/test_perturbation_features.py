"""Perturbations as vectors instead of ids: files, encoding, training, and the prediction of unseen perturbations."""

import csv
import json
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoProcessor

import pertstate.train
from pertstate import StateForPerturbation, StateProcessor
from pertstate.cli import main
from pertstate.configuration_state import StateConfig
from pertstate.data import (
    SentenceDataset,
    Splits,
    load_cells,
    read_perturbation_features,
    simulate_screen,
)
from pertstate.processing import PerturbationFeatures


NAMES = ["STAT1", "NA", "nan", "IFN-β", "a, b", "JAK2"]
VECTORS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
TABLE = "perturbation_features.safetensors"


# Files


def frame(vectors=VECTORS) -> pd.DataFrame:
    return pd.DataFrame(vectors, columns=[f"d{i}" for i in range(vectors.shape[1])])


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def named_rows(vectors=VECTORS):
    return [[name, *map(repr, vector.tolist())] for name, vector in zip(NAMES, vectors)]


def integer_index(path):
    """Give rows numbers that are not a range, which pandas stores as a column."""
    frame().assign(name=NAMES).set_index(pd.Index([0, 1, 2, 5, 8, 13])).to_parquet(path)
    assert "__index_level_0__" in pq.read_schema(path).names


WRITERS = {
    "one tensor each.safetensors": lambda p: save_file(dict(zip(NAMES, VECTORS)), p),
    "checkpoint.safetensors": lambda p: PerturbationFeatures(NAMES, VECTORS).save(p),
    "one array each.npz": lambda p: np.savez(p, **dict(zip(NAMES, VECTORS))),
    "names and features.npz": lambda p: np.savez(p, names=np.array(NAMES), features=VECTORS),
    "float64.npz": lambda p: np.savez(p, names=np.array(NAMES), features=VECTORS.astype(np.float64)),
    "table.csv": lambda p: write_csv(p, ["gene", "d0", "d1", "d2", "d3"], named_rows()),
    "numbered.csv": lambda p: write_csv(p, ["", "0", "1", "2", "3"], named_rows()),
    "pandas.csv": lambda p: frame().set_index(pd.Index(NAMES, name="gene")).to_csv(p),
    "column.parquet": lambda p: frame().assign(name=NAMES).to_parquet(p),
    "category.parquet": lambda p: frame().assign(name=pd.Categorical(NAMES)).to_parquet(p),
    "index.parquet": lambda p: frame().set_index(pd.Index(NAMES)).to_parquet(p),
    "rows left out.parquet": integer_index,
    "list.parquet": lambda p: pd.DataFrame({"name": NAMES, "vector": list(VECTORS)}).to_parquet(p),
    "fixed list.parquet": lambda p: pq.write_table(
        pa.table({"name": NAMES, "vector": pa.FixedSizeListArray.from_arrays(VECTORS.ravel(), 4)}), p
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_vectors(tmp_path, name):
    WRITERS[name](tmp_path / name)
    found = read_perturbation_features(tmp_path / name)
    # A safetensors file and a zip archive have orders of their own.
    order = [found.index[n] for n in NAMES]
    assert sorted(order) == list(range(6)) and (order == list(range(6)) or name.startswith("one"))
    assert found.vectors.dtype == np.float32 and found.dim == 4 and len(found) == 6
    np.testing.assert_array_equal(found.vectors[order], VECTORS)


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int64, np.float16])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_fingerprints_of_whole_numbers(tmp_path, dtype, suffix):
    bits = (VECTORS > 0).astype(dtype)
    path = tmp_path / f"bits{suffix}"
    {
        ".npz": lambda: np.savez(path, **dict(zip(NAMES, bits))),
        ".safetensors": lambda: save_file(dict(zip(NAMES, bits)), path),
        ".parquet": lambda: frame(bits).assign(name=NAMES).to_parquet(path),
    }[suffix]()
    found = read_perturbation_features(path)
    np.testing.assert_array_equal(found.vectors[[found.index[n] for n in NAMES]], bits.astype(np.float32))


@pytest.mark.parametrize("form", ["one each", "matrix"])
def test_bfloat16_which_numpy_does_not_know(tmp_path, form):
    tensor = torch.from_numpy(VECTORS).bfloat16()
    if form == "matrix":
        safetensors.torch.save_file({"features": tensor}, tmp_path / "b.safetensors", {"names": json.dumps(NAMES)})
    else:
        safetensors.torch.save_file({n: v.clone() for n, v in zip(NAMES, tensor)}, tmp_path / "b.safetensors")
    found = read_perturbation_features(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(found.vectors[[found.index[n] for n in NAMES]], tensor.float().numpy())


WITH_NAN = VECTORS.copy()
WITH_NAN[2, 1] = np.nan
OBJECTS = np.empty(2, dtype=object)

REFUSED = [
    (
        "x.h5",
        lambda p: p.touch(),
        "expected perturbation features in a file that ends in .safetensors, .npz, .csv, .parq",
    ),
    ("x.csv", lambda p: None, "no such file of perturbation features"),
    ("x.csv", lambda p: p.write_text(""), "expected a column of names and columns of numbers, found the columns []"),
    ("x.csv", lambda p: p.write_text("gene\nA\n"), "expected a column of names and columns of numbers"),
    ("x.csv", lambda p: p.write_text("gene,a,b\n"), "found no row"),
    (
        "x.csv",
        lambda p: p.write_text("gene,a,b\nA,1,2\nB,1\n"),
        "line 3: expected a name and 2 numbers, as in the header",
    ),
    ("x.csv", lambda p: p.write_text("gene,a,b\nA,1,x\n"), "line 2, 'A': expected numbers (could not convert"),
    ("x.csv", lambda p: p.write_text("gene,a,b\nA,1,\n"), "line 2, 'A': expected numbers"),
    ("x.csv", lambda p: p.write_text("A,0.1,2\nB,1,2\n"), "expected a header row, found the numbers ['0.1', '2']"),
    ("x.csv", lambda p: p.write_text("A,0,0,1\nB,1,0,1\n"), "expected a header row"),
    ("x.csv", lambda p: p.write_text("gene,a\nA,1\nB,2\nA,3\n"), "names stand twice: ['A']; keep one vector of each"),
    (
        "x.csv",
        lambda p: p.write_text("gene,a\nA,1\n ,2\n"),
        "expected a name for each vector, found ' ' (1 such names)",
    ),
    ("x.csv", lambda p: p.write_text("gene,a\nA,1\nB,inf\n"), "found inf in the vector of 'B' (1 such vectors)"),
    ("x.csv", lambda p: p.write_text("gene,a\nA,1e60\n"), "found inf in the vector of 'A'"),
    ("x.csv", lambda p: p.write_bytes(b"gene,a\nA\xff,1\n"), "can't decode byte 0xff"),
    ("x.npz", lambda p: np.savez(p, A=VECTORS[0], B=VECTORS[1, :3]), "found 4 numbers for 'A' and 3 for 'B'"),
    ("x.npz", lambda p: np.savez(p, A=VECTORS), "expected a vector (P,) for each name, found shape (6, 4) for 'A'"),
    ("x.npz", lambda p: np.savez(p, A=np.array(["1"])), "expected numbers, found values of type <U1"),
    ("x.npz", lambda p: np.savez(p, A=OBJECTS), "holds Python objects, which are never read"),
    ("x.npz", lambda p: np.savez(p, names=np.array(["A"]), features=VECTORS), "one vector for each of 1 names"),
    ("x.npz", lambda p: np.savez(p), "expected a vector for each perturbation, found none"),
    ("x.npz", lambda p: p.write_bytes(b"not a zip"), "is not a whole .npz file"),
    ("x.safetensors", lambda p: p.write_bytes(b"{}"), "is not a whole .safetensors file"),
    ("x.safetensors", lambda p: save_file({"A": VECTORS}, p, {"names": "[]"}), "expected the tensor 'features' alone"),
    ("x.safetensors", lambda p: save_file({"features": VECTORS}, p, {"names": "['A'"}), "'names' is not whole JSON"),
    ("x.safetensors", lambda p: save_file({"A": WITH_NAN[2]}, p), "found nan in the vector of 'A'"),
    ("x.parquet", lambda p: frame().to_parquet(p), "expected one column (or index) of names, found 0"),
    ("x.parquet", lambda p: frame().assign(a=NAMES, b=NAMES).to_parquet(p), "names, found 2: ['a', 'b']"),
    ("x.parquet", lambda p: frame().assign(a=NAMES, b=pd.Timestamp(0)).to_parquet(p), "found 'b' of type timestamp"),
    ("x.parquet", lambda p: frame(WITH_NAN).assign(a=NAMES).to_parquet(p), "found nan in the vector of 'nan'"),
    ("x.parquet", lambda p: frame().assign(a=[None, *NAMES[1:]]).to_parquet(p), "found 1 rows without in 'a'"),
    ("x.parquet", lambda p: pd.DataFrame({"a": NAMES}).to_parquet(p), "expected columns of numbers beside the names"),
    ("x.parquet", lambda p: pd.DataFrame({"a": ["A", "B"], "v": [[1.0], None]}).to_parquet(p), "none for 'B'"),
    (
        "x.parquet",
        lambda p: pd.DataFrame({"a": ["A", "B"], "v": [[1.0], [1.0, 2]]}).to_parquet(p),
        "1 numbers for 'A' and 2",
    ),
    ("x.parquet", lambda p: p.write_bytes(b"PAR1"), "Parquet"),
]


@pytest.mark.parametrize("name, write, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_a_file_that_is_wrong_is_one_clear_error(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        read_perturbation_features(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("name", [n for n in WRITERS if not n.endswith("csv")])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        read_perturbation_features(tmp_path / name)


# Encoding


def screen(**options) -> ad.AnnData:
    sizes = {"num_contexts": 3, "num_perturbations": 4, "num_genes": 30, "cells_per_group": 12, "seed": 2}
    return simulate_screen(**{**sizes, **options})


def table(names=("pert_0", "pert_1", "pert_2", "pert_3"), width=5, seed=1) -> PerturbationFeatures:
    return PerturbationFeatures(names, np.random.default_rng(seed).normal(size=(len(names), width)))


def test_combinations_are_sums_doses_weigh_and_the_control_is_zeros():
    features = PerturbationFeatures(["A", "B", "C+D"], [[1, 2], [10, 20], [5, 7]])
    processor = StateProcessor(perturbation_features=features)
    encoded = processor.encode(["A", "A+B", "B + A", "A+A", "control", "A+control", "C+D"])
    assert set(encoded) == {"perturbation_features"}
    expected = [[1, 2], [11, 22], [11, 22], [2, 4], [0, 0], [1, 2], [5, 7]]
    assert encoded["perturbation_features"].dtype == np.float32
    assert encoded["perturbation_features"].tolist() == expected
    assert processor.encode(["A+B"], doses=[0.5, 2])["perturbation_features"].tolist() == [[20.5, 41]]
    with pytest.raises(ValueError, match=r"doses: expected 2 \(one for each perturbation together\), found 1"):
        processor.encode(["A+B"], doses=[1])
    with pytest.raises(KeyError, match=r"'E' has no vector among this model's 3 perturbation features \(add one with"):
        processor.encode(["A+E"])


def test_a_table_does_not_change():
    vectors = VECTORS.copy()
    features = PerturbationFeatures(NAMES, vectors)
    vectors[:] = 0
    np.testing.assert_array_equal(features.vectors, VECTORS)
    with pytest.raises(ValueError, match="read-only"):
        features.vectors[0] = 1


@pytest.mark.parametrize("num_encoder_layers", [1, 3])
def test_one_hot_features_are_ids(num_encoder_layers):
    adata = screen(combinations=[(0, 1), (2, 3)])
    one_hot = PerturbationFeatures([f"pert_{i}" for i in range(4)], np.eye(4))
    by_id = StateProcessor.fit(adata, set_size=7)
    by_features = StateProcessor.fit(adata, set_size=7, perturbation_features=one_hot)
    assert by_features.vocabulary == by_id.vocabulary
    sizes = {"input_dim": 30, "num_encoder_layers": num_encoder_layers, "residual": "none"}
    torch.manual_seed(0)
    model = StateForPerturbation(StateConfig.from_preset("tiny", num_perturbations=4, **sizes)).eval()
    other = StateForPerturbation(StateConfig.from_preset("tiny", perturbation_dim=4, **sizes)).eval()
    other.load_state_dict(model.state_dict())
    names = ["pert_2", "pert_0+pert_1", "pert_3+pert_2", "control", "pert_1+pert_1"]
    for arguments in ({"perturbation": names}, {"perturbation": "pert_3+pert_0", "doses": [0.3, 2.0]}):
        ids, features = by_id(adata, **arguments), by_features(adata, **arguments)
        assert "perturbation_ids" in ids and "perturbation_features" not in ids
        assert not {"perturbation_ids", "perturbation_doses"} & set(features)
        with torch.inference_mode():
            expected, found = model(**ids).predictions, other(**features).predictions
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        pd.testing.assert_frame_equal(ids.obs, features.obs)
    assert not torch.allclose(expected[0], model(**by_id(adata, "pert_3+pert_0")).predictions[0])


def test_sentences_of_training_carry_the_vectors_of_their_group(tmp_path):
    adata = screen(combinations=[(0, 1)])
    adata.write_h5ad(tmp_path / "screen.h5ad")
    features = table()
    splits = Splits({"screen": [tmp_path / "screen.h5ad"]}, {"screen"})
    cells, processor = load_cells(splits, perturbation_features=features)
    data = SentenceDataset(cells, processor, "train", 6)
    expected = {f"pert_{i}": features.vectors[i] for i in range(4)}
    expected |= {"pert_0+pert_1": features.vectors[0] + features.vectors[1], "control": np.zeros(5, dtype=np.float32)}
    seen = set()
    for i in range(len(data)):
        name = data.groups[data.rows(i)[0]].perturbation
        np.testing.assert_array_equal(data[i]["perturbation_features"], expected[name])
        assert "perturbation_ids" not in data[i]
        seen.add(name)
    assert seen == set(expected)


# What fit refuses


def test_perturbations_without_a_vector_are_listed():
    names = [f"Pert_{i}" for i in range(3)] + ["pert_3"]
    message = (
        "3 of 4 perturbations of the training cells have no vector in the perturbation features (4 names): ['pert_0', "
        "'pert_1', 'pert_2']; nearest: 'Pert_0' for 'pert_0', 'Pert_1' for 'pert_1', 'Pert_2' for 'pert_2'; add their"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        StateProcessor.fit(screen(), perturbation_features=table(names))
    with pytest.raises(ValueError, match=re.escape("its names look like ['x', 'y']; add their vectors")):
        StateProcessor.fit(screen(), perturbation_features=table(["x", "y"]))
    with pytest.raises(ValueError, match=re.escape("'pert_9'] and 2 more; nearest: 'pert_12' for 'pert_0'")):
        table(["pert_12"]).check_covers([f"pert_{i}" for i in range(10)] + ["q", "r"], "of a test")


def test_the_control_has_no_vector_of_its_own():
    features = table(["control", "pert_0", "pert_1", "pert_2", "pert_3"])
    with pytest.raises(
        ValueError, match="the control 'control' is no perturbation: expected zeros or no vector, found another"
    ):
        StateProcessor.fit(screen(), perturbation_features=features)
    zeros = PerturbationFeatures(features.names, features.vectors * [[0], [1], [1], [1], [1]])
    processor = StateProcessor.fit(screen(), perturbation_features=zeros)
    assert processor.vocabulary.perturbations == [f"pert_{i}" for i in range(4)]
    assert processor.split_combination("control") == []


# Saving and loading


def test_the_table_is_saved_and_loaded(tmp_path):
    features = table(["pert_0", "pert_1", "pert_2", "pert_3", "IFN-β"])
    StateProcessor.fit(screen(), perturbation_features=features).save_pretrained(tmp_path)
    for loaded in (StateProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert loaded.perturbation_features.names == features.names
        np.testing.assert_array_equal(loaded.perturbation_features.vectors, features.vectors)
    assert json.loads((tmp_path / "processor_config.json").read_text())["perturbation_dim"] == 5
    assert read_perturbation_features(tmp_path / TABLE).names == features.names
    loaded.save_pretrained(tmp_path / "again")
    for path in tmp_path.glob("*.*"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_checkpoint_that_lacks_its_table_is_refused(tmp_path):
    StateProcessor.fit(screen(), perturbation_features=table()).save_pretrained(tmp_path)
    content = (tmp_path / TABLE).read_bytes()
    (tmp_path / TABLE).write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{TABLE} is not a whole safetensors file .*copy it again"):
        StateProcessor.from_pretrained(tmp_path)
    save_file({"features": VECTORS}, tmp_path / TABLE)
    with pytest.raises(ValueError, match="expected the tensor 'features' and 'names' in the metadata"):
        StateProcessor.from_pretrained(tmp_path)
    (tmp_path / TABLE).unlink()
    with pytest.raises(OSError, match=TABLE):
        StateProcessor.from_pretrained(tmp_path)


def test_a_model_on_ids_does_not_read_an_old_table(tmp_path):
    StateProcessor.fit(screen(), perturbation_features=table()).save_pretrained(tmp_path)
    StateProcessor.fit(screen()).save_pretrained(tmp_path)
    loaded = StateProcessor.from_pretrained(tmp_path)
    assert loaded.perturbation_features is None
    assert loaded.encode(["pert_1"])["perturbation_ids"].tolist() == [[1]]


# Training, and predicting what training did not see

CONFIG = """
data:
  datasets: {{screen: {folder}/screen.h5ad}}
  test_perturbations: [pert_3]
  perturbation_features: {folder}/features.csv
model:
  preset: tiny
  set_size: 12
training:
  output_dir: {folder}/run
  max_steps: 15
  per_device_train_batch_size: 4
  learning_rate: 1.0e-3
  save_strategy: "no"
  disable_tqdm: true
  use_cpu: true
"""
# pert_3 has cells and a vector, no training cell; the others have no cell at all.
UNSEEN = ["pert_3", "UNSEEN", "twin of pert_0", "pert_0 and pert_1 in one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    screen().write_h5ad(folder / "screen.h5ad")
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=6).astype(np.float32) for name in ["pert_0", "pert_1", "pert_2", *UNSEEN[:2]]}
    rows |= {UNSEEN[2]: rows["pert_0"], UNSEEN[3]: rows["pert_0"] + rows["pert_1"]}
    write_csv(folder / "features.csv", ["name", *"abcdef"], [[n, *map(repr, v.tolist())] for n, v in rows.items()])
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    torch.manual_seed(0)
    metrics = pertstate.train.main(["--config", str(folder / "run.yaml")])
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def predicted(folder, names, **options) -> ad.AnnData:
    processor = StateProcessor.from_pretrained(folder / "run")
    model = StateForPerturbation.from_pretrained(folder / "run").eval()
    sentences = processor(ad.read_h5ad(folder / "screen.h5ad"), names, context="type_1", **options)
    with torch.inference_mode():
        return processor.decode(model(**sentences), sentences)


def test_a_run_on_features_leaves_a_checkpoint_that_holds_the_table(folder):
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["perturbation_dim"] == 6 and config.get("num_perturbations") is None
    vocabulary = json.loads((folder / "run" / "vocabulary.json").read_text())
    assert vocabulary["perturbations"] == ["pert_0", "pert_1", "pert_2"]
    kept, given = (
        read_perturbation_features(folder / "run" / TABLE),
        read_perturbation_features(folder / "features.csv"),
    )
    assert kept.names == given.names
    np.testing.assert_array_equal(kept.vectors, given.vectors)
    assert not list((folder / "run").glob("*.partial"))
    card = (folder / "run" / "README.md").read_text()
    assert "vectors of 6 numbers: any of the 7 names" in card
    assert np.isfinite(json.loads((folder / "metrics.json").read_text())["test_energy"])


def test_training_moves_the_encoder_of_features(folder):
    torch.manual_seed(0)
    pertstate.train.main(
        ["--config", str(folder / "run.yaml"), "--output_dir", str(folder / "still"), "--learning_rate", "0"]
    )
    key = "perturbation_encoder.embedding.weight"
    before, after = (load_file(folder / run / "model.safetensors")[key] for run in ("still", "run"))
    assert before.shape == (6, before.shape[1]) and (before != after).all()


def test_unseen_perturbations_are_predicted_from_their_vectors(folder):
    known = {name: predicted(folder, name).X for name in ("pert_0", "pert_0+pert_1")}
    np.testing.assert_array_equal(predicted(folder, "twin of pert_0").X, known["pert_0"])
    np.testing.assert_allclose(predicted(folder, "pert_0 and pert_1 in one").X, known["pert_0+pert_1"], atol=1e-5)
    for name in ("UNSEEN", "pert_3"):
        assert np.abs(predicted(folder, name).X - known["pert_0"]).max() > 1e-3
    doses = predicted(folder, "UNSEEN", doses=[0.0])
    np.testing.assert_array_equal(doses.X, predicted(folder, "control").X)


CLEAN = """
import sys
import anndata as ad, numpy as np, torch
from transformers import AutoModel, AutoProcessor
folder, screen, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
def predict(name):
    sentences = processor(ad.read_h5ad(screen), perturbation=name, context="type_1")
    with torch.inference_mode():
        return processor.decode(model(**sentences), sentences).X
first = predict("UNSEEN")
processor.add_perturbation_features(["NEW"], np.full((1, 6), 0.5))
np.savez(output, unseen=first, new=predict("UNSEEN+NEW"))
"""


def test_an_unseen_perturbation_is_predicted_without_pertstate_installed(folder, tmp_path, alone):
    alone.run(CLEAN, folder / "run", folder / "screen.h5ad", tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(found["unseen"], predicted(folder, "UNSEEN").X)
    assert np.abs(found["new"] - found["unseen"]).max() > 1e-4


def predict(folder, output, *flags, model="run", rc=0) -> ad.AnnData | None:
    words = ["predict", "--model", folder / model, "--adata", folder / "screen.h5ad", "--output", output, "--quiet"]
    assert main([str(word) for word in (*words, "--device", "cpu", *flags)]) == rc
    return ad.read_h5ad(output) if rc == 0 else None


def test_predict_takes_unseen_names_and_further_vectors(folder, tmp_path, capsys):
    found = predict(folder, tmp_path / "out.h5ad", "--perturbation", "UNSEEN", "pert_0+UNSEEN", "--context", "type_1")
    assert set(found.obs["perturbation"]) == {"UNSEEN", "UNSEEN+pert_0"}
    expected = predicted(folder, ["UNSEEN", "UNSEEN+pert_0"], seed=0)
    np.testing.assert_allclose(found[expected.obs_names].X, expected.X, atol=1e-5)

    # By default every name of the file's own cells is predicted, the held-out one too. `--all` predicts what was trained on.
    assert set(predict(folder, tmp_path / "own.h5ad").obs["perturbation"]) == {f"pert_{i}" for i in range(4)}
    assert set(predict(folder, tmp_path / "all.h5ad", "--all").obs["perturbation"]) == {f"pert_{i}" for i in range(3)}

    vector = read_perturbation_features(folder / "features.csv").vectors[3]
    np.savez(tmp_path / "more.npz", NEW=vector, pert_3=vector)
    flags = ("--perturbation", "NEW", "pert_3", "--context", "type_1", "--perturbation-features", tmp_path / "more.npz")
    found = predict(folder, tmp_path / "more.h5ad", *flags)
    new, old = (found[found.obs["perturbation"] == name].X for name in ("NEW", "pert_3"))
    np.testing.assert_array_equal(new, old)
    predict(folder, tmp_path / "x.h5ad", "--perturbation", "NEW", rc=1)
    assert "'NEW' has no vector among this model's 7 perturbation features" in capsys.readouterr().err


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({"NEW": np.ones(5)}, "expected vectors of 6 numbers, as in training, found 5"),
        ({"NEW": np.ones(6), "pert_1": np.ones(6)}, "1 names have another vector in this model: ['pert_1']"),
        ({"NEW": np.ones(6), "control": np.ones(6)}, "the control 'control' is no perturbation"),
        ({"NEW": np.full(6, np.nan)}, "more.npz: perturbation features: expected finite numbers"),
    ],
)
def test_further_vectors_that_do_not_fit(folder, tmp_path, capsys, vectors, message):
    np.savez(tmp_path / "more.npz", **vectors)
    predict(folder, tmp_path / "out.h5ad", "--perturbation-features", tmp_path / "more.npz", rc=1)
    assert message in capsys.readouterr().err and not (tmp_path / "out.h5ad").exists()


def test_a_model_on_ids_takes_no_features(folder, tmp_path, capsys):
    without = "\n".join(line for line in CONFIG.split("\n") if "perturbation_features" not in line)
    (tmp_path / "ids.yaml").write_text(without.format(folder=folder))
    run = ["--config", str(tmp_path / "ids.yaml"), "--output_dir", str(folder / "ids"), "--max_steps", "1"]
    with pytest.raises(
        ValueError, match=r"1 perturbation held out for test .*\['pert_3'\]; hold out others, or train on"
    ):
        pertstate.train.main(run)
    pertstate.train.main([*run, "--test_perturbations", "[]"])
    np.savez(tmp_path / "more.npz", NEW=np.ones(6))
    flags = ("--perturbation-features", tmp_path / "more.npz")
    predict(folder, tmp_path / "out.h5ad", *flags, model="ids", rc=1)
    assert "this model was trained on perturbation ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--perturbation_features", "gone.csv"], "gone.csv: no such file of perturbation features"),
        (["--perturbation_dim", "6"], "model.perturbation_dim follows from the data (6); leave it out"),
        (["--num_perturbations", "3"], "contradict one another: set one of them"),
        (["--perturbation_features", "{folder}/three.npz"], "1 of 1 perturbations held out for test have no vector"),
        (["--perturbation_features", "{folder}/two.npz"], "1 of 3 perturbations of the training cells have no vector"),
    ],
)
def test_a_wrong_run_is_one_clear_error(folder, flags, message):
    for count, name in ((2, "two.npz"), (3, "three.npz")):
        np.savez(folder / name, **{f"pert_{i}": VECTORS[i] for i in range(count)})
    flags = [flag.format(folder=folder) for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        pertstate.train.main(["--config", str(folder / "run.yaml"), "--overwrite", *flags])
