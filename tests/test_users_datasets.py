"""Several screens in one run, and columns that go through to the output. Right values, end to end."""

import anndata as ad
import numpy as np
import pytest
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

    with pytest.raises(ValueError, match=r"batches without training cells: \['2', '1'\]|batches without training cells: \['1', '2'\]"):
        predict(model, processor, paths["spring"], tmp_path / "out.h5ad", quiet=True)
    with pytest.raises(ValueError, match="there was no dataset 'sprin' in training; did you mean 'spring'"):
        predict(model, processor, paths["spring"], tmp_path / "out.h5ad", quiet=True, reading={"dataset": "sprin"})
    found = {}
    for name in paths:
        predict(model, processor, paths["spring"], tmp_path / f"as_{name}.h5ad", quiet=True, reading={"dataset": name})
        found[name] = ad.read_h5ad(tmp_path / f"as_{name}.h5ad")
        assert set(found[name].obs["plate"]) == {f"{name}|1", f"{name}|2"}
    # The same cells in the batches of another screen: another prediction.
    assert not np.array_equal(found["spring"].X, found["autumn"].X)
    # An output is read as it stands.
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
