"""We read files of each version of anndata since 0.6, with pandas 0.25 to 3; and these versions read ours."""

import tarfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import torch

from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.data.arguments import DataArguments
from pertstate.data.cells import load
from pertstate.data.reading import AnnDataFile
from pertstate.evaluation.prediction import predict


FILES = sorted((Path(__file__).parent / "anndata_files").glob("*.gz"))


def unpacked(path: Path, folder: Path) -> Path:
    if not path.name.endswith(".tar.gz"):
        return path
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*.zarr"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_labels_values_and_tables_of_every_version(path, tmp_path):
    r = np.random.RandomState(0)
    counts = r.poisson(2.0, (12, 6)).astype(np.float32)
    embedding = r.normal(size=(12, 3)).astype(np.float32)
    names = ["control", "B", "A", "control"] * 3
    file = unpacked(path, tmp_path)
    with AnnDataFile(file) as data:
        assert data.obs_names.tolist() == [f"cell{i}" for i in range(12)]
        assert data.var["symbol"].tolist() == [f"S{i}" for i in range(6)]
        reader = StateProcessor(batch_key="replicate", exclude={"good": [False]})
        labels = reader.labels_of(data.some_obs(slice(None), reader.label_columns))
        used = np.arange(12) % 3 > 0
        assert labels["perturbation"].tolist() == [name if use else None for name, use in zip(names, used)]
        assert labels["context"].dropna().tolist() == ["k562"] * 4 + ["rpe1"] * 4
        assert labels["batch"].dropna().tolist() == [str(i % 2) for i in range(12) if i % 3]
    order = np.lexsort((np.arange(12), names, ["k562"] * 6 + ["rpe1"] * 6))
    for place, expected in (("X", counts), ("raw/X", counts), ("layers/twice", 2 * counts), ("obsm/X_pca", embedding)):
        source = DataArguments(datasets=str(file), input=place).file_source()
        cells, processor = load(
            source, DataArguments(datasets=str(file)).resolve_splits(source.groups), normalize="none"
        )
        np.testing.assert_array_equal(cells.features, expected[order])
        assert processor.vocabulary.perturbations == ["A", "B"]


def test_predictions_are_in_forms_that_anndata_since_0_8_reads(tmp_path):
    with AnnDataFile(FILES[0]) as data:
        adata = ad.AnnData(data.X[:], obs=data.obs, var=data.var)
    adata.write_h5ad(tmp_path / "in.h5ad")
    processor = StateProcessor.fit(adata, batch_key="replicate", set_size=4)
    torch.manual_seed(0)
    sizes = {"input_dim": 6, "num_perturbations": 2, "num_contexts": 2}
    model = StateForPerturbation(StateConfig.from_preset("tiny", set_size=4, **sizes))
    predict(model, processor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", quiet=True, obs_columns=["good", "depth"])
    found = set()
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert "raw" not in file
        file.visititems(lambda _, node: found.add(node.attrs.get("encoding-type")))
    assert found <= {"anndata", "dict", "dataframe", "string", "string-array", "array", "categorical"}
