"""Several screens in one run, and columns that are copied to the output. Values are checked from end to end."""

import json
import re

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from test_users_files import screen, trained, vocabulary, written
from transformers import AutoModel, AutoProcessor

from pertstate.cli import main as pertstate
from pertstate.data.arguments import DataArguments
from pertstate.data.store import CellStore, StoreSource
from pertstate.evaluation.prediction import predict


def two_screens(folder) -> dict[str, str]:
    """Two screens, both with batches 1 and 2."""
    paths = {}
    for name in ("spring", "autumn"):
        data = screen(seed=len(name))
        data.obs["plate"] = np.where(np.arange(data.n_obs) % 2, "1", "2")
        paths[name] = written(data, folder / f"{name}.h5ad")
    return paths


def test_batches_of_several_datasets_are_told_apart(tmp_path):
    paths = two_screens(tmp_path)
    source = DataArguments(datasets=paths, batch_key="plate").file_source()
    assert sorted(source.groups["batch"].unique()) == ["autumn|1", "autumn|2", "spring|1", "spring|2"]
    owners = source.groups.apply(lambda group: group["batch"].startswith(group["dataset"] + "|"), axis=1)
    assert owners.all()
    alone = DataArguments(datasets=paths["spring"], batch_key="plate").file_source()
    assert sorted(alone.groups["batch"].unique()) == ["1", "2"]


def test_a_store_keeps_the_batches_of_its_datasets_apart(tmp_path):
    paths = two_screens(tmp_path)
    (tmp_path / "run.yaml").write_text(f"data:\n  datasets: {paths}\n  batch_key: plate\n")
    pertstate(["prepare", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "store"), "--quiet"])
    source = StoreSource(CellStore(tmp_path / "store"))
    assert source.reader.batch_datasets == ["autumn", "spring"]
    assert sorted(source.groups["batch"].unique()) == ["autumn|1", "autumn|2", "spring|1", "spring|2"]


def test_a_prediction_says_whose_batches_it_reads(tmp_path):
    paths = two_screens(tmp_path)
    checkpoint = trained(tmp_path, {"datasets": paths, "batch_key": "plate"}, model={"batch_encoder": True})
    assert vocabulary(checkpoint)["batches"] == ["autumn|1", "autumn|2", "spring|1", "spring|2"]
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert processor.batch_datasets == ["autumn", "spring"]

    with pytest.raises(
        ValueError, match=r"batches without training cells: \['2', '1'\]|batches without training cells: \['1', '2'\]"
    ):
        predict(model, processor, paths["spring"], tmp_path / "out.h5ad", quiet=True)
    with pytest.raises(ValueError, match="there was no dataset 'sprin' in training; did you mean 'spring'"):
        predict(model, processor, paths["spring"], tmp_path / "out.h5ad", quiet=True, reading={"dataset": "sprin"})
    found = {}
    for name in paths:
        predict(model, processor, paths["spring"], tmp_path / f"as_{name}.h5ad", quiet=True, reading={"dataset": name})
        found[name] = ad.read_h5ad(tmp_path / f"as_{name}.h5ad")
        assert set(found[name].obs["plate"]) == {f"{name}|1", f"{name}|2"}
    # The same cells as batches of another screen give another prediction.
    assert not np.array_equal(found["spring"].X, found["autumn"].X)
    # An output can be read without --dataset.
    predict(model, processor, paths["spring"], tmp_path / "again.h5ad", quiet=True, reading={"dataset": "spring"})
    assert np.array_equal(ad.read_h5ad(tmp_path / "again.h5ad").X, found["spring"].X)


def test_a_checkpoint_trained_further_on_another_dataset_tells_its_batches_apart(tmp_path):
    paths = two_screens(tmp_path)
    checkpoint = trained(tmp_path, {"datasets": paths, "batch_key": "plate"})
    third = screen(seed=9)
    third.obs["plate"] = "1"
    data = {"datasets": {"winter": written(third, tmp_path / "winter.h5ad")}}
    again = trained(tmp_path, data, "further", model={"pretrained": str(checkpoint)})
    assert vocabulary(again)["batches"] == ["autumn|1", "autumn|2", "spring|1", "spring|2", "winter|1"]
    assert AutoProcessor.from_pretrained(again).batch_datasets == ["autumn", "spring", "winter"]


def as_parquet(data: ad.AnnData, folder) -> dict:
    """
    Write the same cells as parquet files, with all columns of obs beside lists of genes. Returns the `stream` section of a run
    on them.
    """
    matrix = sp.csr_matrix(data.X)
    columns = {name: data.obs[name].tolist() for name in data.obs}
    columns["genes"] = pa.ListArray.from_arrays(pa.array(matrix.indptr), pa.array(matrix.indices))
    columns["values"] = pa.ListArray.from_arrays(pa.array(matrix.indptr), pa.array(matrix.data))
    (folder / "rows").mkdir()
    pq.write_table(pa.table(columns), folder / "rows" / "0.parquet", row_group_size=50)
    (folder / "genes.json").write_text(json.dumps(data.var_names.tolist()))
    return {"path": str(folder / "rows"), "gene_names": str(folder / "genes.json"), "block_size": 50}


def test_a_stream_of_parquet_reads_labels_as_files_are_read(tmp_path):
    data = screen(perturbations=("A_g1", "A_g2", "B", "C", "D", "C+D", "D+C", "B+control"), cells=6)
    data.obs["donor"] = np.where(np.arange(data.n_obs) % 2, "d1", "d2")
    data.obs["dose"] = np.where(
        data.obs["perturbation"] == "control", "", np.where(np.arange(data.n_obs) % 3, "1", "0.1")
    )
    data.obs["bad"] = np.arange(data.n_obs) % 10 == 0
    data.obs.iloc[3, data.obs.columns.get_loc("perturbation")] = None
    path = written(data, tmp_path / "screen.h5ad")
    labels = {
        "perturbation_map": {"A_g*": "A"},
        "exclude": {"bad": [True]},
        "unlabelled": "drop",
        "dose_encoding": "linear",
        "test_perturbations": ["D+C"],
    }
    keys = {"dose_key": "dose", "context_key": ["cell_type", "donor"], "batch_key": "donor"}
    of_files = trained(tmp_path, {"datasets": path, **labels, **keys}, "files")
    columns = {"perturbation": "perturbation", "context": ["cell_type", "donor"], "batch": "donor", "dose": "dose"}
    columns |= {"gene_ids": "genes", "gene_values": "values"}
    stream = as_parquet(data, tmp_path) | {"columns": columns}
    of_stream = trained(tmp_path, labels, "stream", stream=stream)
    assert vocabulary(of_stream) == vocabulary(of_files)
    assert vocabulary(of_files)["contexts"] == ["k562|d1", "k562|d2", "rpe1|d1", "rpe1|d2"]
    one, other = (AutoProcessor.from_pretrained(folder) for folder in (of_files, of_stream))
    assert other.doses == one.doses == {name: [0.1, 1.0] for name in "ABCD"}
    assert other.dose_key == one.dose_key == "dose" and other.dose_encoding == one.dose_encoding == "linear"
    # A name without a dose is held out at all its doses, in both.
    cards = [(folder / "README.md").read_text() for folder in (of_files, of_stream)]
    # The intervals draw cells by their barcodes, which the stream has not.
    rows = [
        re.sub(r" \[.*?\]", "", row) for card in cards for row in re.findall(r"^\| no change.*", card, re.MULTILINE)
    ]
    assert len(rows) == 2 and rows[0] == rows[1]


def test_a_stream_without_a_column_of_contexts_says_its_context(tmp_path):
    data = screen(contexts=("k562",))
    columns = {"perturbation": "perturbation", "gene_ids": "genes", "gene_values": "values"}
    stream = as_parquet(data, tmp_path) | {"columns": columns}
    checkpoint = trained(tmp_path, {"context": "K562"}, stream=stream)
    assert vocabulary(checkpoint)["contexts"] == ["K562"]


def test_a_checkpoint_trained_further_knows_new_doses_and_weighs_them_as_before(tmp_path):
    data = screen()
    data.obs["dose"] = np.where(np.arange(data.n_obs) % 2, 1.0, 10.0)
    path = written(data, tmp_path / "first.h5ad")
    checkpoint = trained(tmp_path, {"datasets": path, "dose_key": "dose", "dose_encoding": "linear"})
    data.obs["dose"] = np.where(np.arange(data.n_obs) % 2, 20.0, 0.5)
    path = written(data, tmp_path / "second.h5ad")
    further = trained(tmp_path, {"datasets": path}, "further", model={"pretrained": str(checkpoint)})
    first, second = (AutoProcessor.from_pretrained(folder) for folder in (checkpoint, further))
    assert first.doses == {"A": [1.0, 10.0], "B": [1.0, 10.0]}
    assert second.doses == {"A": [0.5, 1.0, 10.0, 20.0], "B": [0.5, 1.0, 10.0, 20.0]}
    assert second.unseen_doses(["A@20", "A@5"]) == ["A@5"]
    names = ["A@1", "B@10", "A@20"]
    weights = [0.1, 1.0, 2.0]
    for processor in (first, second):
        assert processor.encode(names)["perturbation_doses"][:, 0] == pytest.approx(weights)


def test_columns_of_var_and_chosen_columns_of_obs_come_through(tmp_path):
    data = screen()
    n, genes = data.n_obs, data.n_vars
    data.var["symbol"] = [f"SYM{i}" for i in range(genes)]
    data.var["length"] = np.arange(genes) * 100
    data.var["coding"] = np.arange(genes) % 2 == 0
    data.var["note"] = pd.Series([None, "x"] * (genes // 2), index=data.var_names, dtype=object)
    data.obs["donor"] = pd.Categorical([f"d{i % 3}" for i in range(n)])
    data.obs["depth"] = np.arange(n) / 2
    path = written(data, tmp_path / "screen.h5ad")
    checkpoint = trained(tmp_path, {"datasets": path})
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)

    # Another file, whose genes stand in another order and lack one.
    other = data[:, data.var_names[::-1][:-1]].copy()
    path = written(other, tmp_path / "other.h5ad")
    options = {"missing_genes": "zero", "obs_columns": ["donor", "depth"]}
    predict(model, processor, path, tmp_path / "out.h5ad", ["A"], quiet=True, **options)
    sentences = processor(other, "A", **options)
    in_memory = processor.decode(model(**sentences), sentences)
    for found in (ad.read_h5ad(tmp_path / "out.h5ad"), in_memory):
        assert found.var_names.tolist() == data.var_names.tolist()
        assert found.var["symbol"].astype(object)[1:].tolist() == data.var["symbol"][1:].tolist()
        assert found.var["length"][1:].tolist() == data.var["length"][1:].tolist()
        assert pd.isna(found.var["symbol"].iloc[0]) and pd.isna(found.var["length"].iloc[0])
        assert found.var["note"].astype(object).fillna("-")[1:].tolist() == data.var["note"].fillna("-")[1:].tolist()
        controls = data.obs.loc[found.obs["control_barcode"]]
        assert found.obs["donor"].tolist() == controls["donor"].tolist()
        assert found.obs["depth"].tolist() == controls["depth"].tolist()
        found.write_h5ad(tmp_path / "again.h5ad")  # it can be written by whoever reads it

    for columns, error, message in (
        (["doner"], KeyError, "no column 'doner'.*did you mean 'donor'"),
        (["cell_type"], ValueError, "'cell_type' is a column of the output already"),
    ):
        with pytest.raises(error, match=message):
            predict(
                model,
                processor,
                path,
                tmp_path / "no.h5ad",
                ["A"],
                quiet=True,
                missing_genes="zero",
                obs_columns=columns,
            )
        assert not (tmp_path / "no.h5ad").exists()


def test_lists_with_commas_are_refused_by_a_word_on_how_to_write_them(tmp_path, capsys):
    path = written(screen(), tmp_path / "screen.h5ad")
    run = {"datasets": path, "test_contexts": ["k562,rpe1"]}
    with pytest.raises(ValueError, match=r"with spaces between \(k562 rpe1\); in YAML, as a list \[k562, rpe1\]"):
        trained(tmp_path, run)
    checkpoint = trained(tmp_path, {"datasets": path})
    command = [
        "predict",
        "--model",
        str(checkpoint),
        "--adata",
        path,
        "--output",
        str(tmp_path / "out.h5ad"),
        "--quiet",
    ]
    for flags in (["--perturbation", "A,B"], ["--perturbation", "A", "--context", "k562,rpe1"]):
        assert pertstate([*command, *flags]) == 1
        assert "write several names apart, with spaces between" in capsys.readouterr().err


def test_no_column_of_contexts_may_be_said_in_words(tmp_path):
    data = screen(contexts=("k562",))
    del data.obs["cell_type"]
    path = written(data, tmp_path / "screen.h5ad")
    for section in ({"context": "K562"}, {"context": "K562", "context_key": None}):
        assert DataArguments(datasets=path, **section).file_source().groups["context"].unique().tolist() == ["K562"]
    with pytest.raises(ValueError, match="set one of context_key .*, the column with each cell's context, and context"):
        DataArguments(datasets=path, context_key=None).file_source()


def test_the_card_counts_genes_that_files_do_not_share(tmp_path):
    one, two = screen(), screen(seed=1)
    two = two[:, 3:].copy()
    data = {"a": written(one, tmp_path / "a.h5ad"), "b": written(two, tmp_path / "b.h5ad")}
    checkpoint = trained(tmp_path, {"datasets": data})
    assert "- 3 of 20 genes are not in every file: left out\n" in (checkpoint / "README.md").read_text()
