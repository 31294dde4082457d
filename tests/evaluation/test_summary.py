"""Summaries of predictions, group by group and gene by gene."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from predictions import CONTROLS, GENES, SET_SIZE, model_of, run, screen

import pertstate.evaluation.summary
from pertstate import StateProcessor
from pertstate.base.tables import read_csv
from pertstate.data.group_sums import log_fold_change
from pertstate.evaluation import controls_of
from pertstate.evaluation.bootstrap import bootstrap_weights, generator_of, interval, intervals


KINDS = {
    "counts": ({"batch_key": "batch"}, {}),
    "decoder": ({"input": "obsm/X_emb", "gene_input": "X"}, {"nonnegative_output": False, "gene_dim": GENES}),
    "embedding": ({"input": "obsm/X_emb"}, {"nonnegative_output": False}),
}
KEYS = ["context", "perturbation", "gene"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    screen().write_h5ad(folder / "screen.h5ad")
    models = {}
    for kind, (options, fields) in KINDS.items():
        processor = StateProcessor.fit(screen(), set_size=SET_SIZE, **options)
        models[kind] = (model_of(processor, **fields), processor)
    return folder, models


def summary(folder, model, path, perturbations=None, **options) -> pd.DataFrame:
    run(folder, model, None, perturbations, summary=path, overwrite=True, **options)
    return (pd.read_parquet if path.suffix == ".parquet" else read_csv)(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_is_that_of_the_cells(made, tmp_path, kind):
    folder, models = made
    found = summary(folder, models[kind], tmp_path / "out.parquet")
    run(folder, models[kind], tmp_path / "out.h5ad", controls="rows")
    cells = ad.read_h5ad(tmp_path / "out.h5ad")
    groups = [(c, p) for c in ("type_0", "type_1") for p in ("pert_0", "pert_1", "pert_2")]
    assert [*found[KEYS[:2]].drop_duplicates().itertuples(index=False, name=None)] == groups
    assert (found["cells"] == CONTROLS).all() and len(found) == len(groups) * cells.n_vars
    log1p = kind != "embedding"
    assert ("log2_fold_change" in found) == log1p
    for context, name in groups:
        rows = found[(found["context"] == context) & (found["perturbation"] == name)]
        assert rows["gene"].tolist() == cells.var_names.tolist()
        here = (cells.obs["cell_type"] == context).to_numpy()
        own = cells[here & (cells.obs["perturbation"] == name).to_numpy()]
        predicted, controls = own.X, controls_of(cells)[cells.obs_names.get_indexer(own.obs_names)]
        np.testing.assert_allclose(rows["mean"], predicted.mean(axis=0, dtype=float), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(rows["control_mean"], controls.mean(axis=0, dtype=float), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(rows["change"], rows["mean"] - rows["control_mean"], atol=1e-12)
        weights = bootstrap_weights(generator_of(0, context), CONTROLS)
        of_change = weights @ predicted - weights @ controls
        columns = {"change": of_change}
        if log1p:
            of_folds = log_fold_change(weights @ np.expm1(predicted), weights @ np.expm1(controls)) / np.log(2)
            columns["log2_fold_change"] = of_folds
            np.testing.assert_allclose(rows["log2_fold_change"], of_folds[0], rtol=1e-4, atol=1e-5)
        for column, draws in columns.items():
            for gene in range(0, cells.n_vars, 7):
                low, high = interval(draws[:, gene].astype(float))
                assert rows[f"{column}_low"].iloc[gene] == pytest.approx(low, rel=1e-3, abs=1e-4)
                assert rows[f"{column}_high"].iloc[gene] == pytest.approx(high, rel=1e-3, abs=1e-4)
            assert (rows[f"{column}_low"] <= rows[column]).all() and (rows[column] <= rows[f"{column}_high"]).all()


def test_how_it_is_read_and_written_changes_nothing(made, tmp_path, monkeypatch):
    folder, models = made
    expected = summary(folder, models["counts"], tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(summary(folder, models["counts"], tmp_path / "out.csv"), expected)
    for batch_size in (1, 50):
        other = summary(folder, models["counts"], tmp_path / "out.parquet", batch_size=batch_size)
        pd.testing.assert_frame_equal(other, expected, rtol=1e-4, atol=1e-5)
    # In many parts, and without cells that are held between arms.
    monkeypatch.setattr(pertstate.evaluation.summary, "_ROWS", 1)
    monkeypatch.setattr(pertstate.evaluation.summary, "_BLOCK", 3)
    monkeypatch.setattr(pertstate.evaluation.experiment, "HELD", 1)
    for name in ("parts.parquet", "parts.csv"):
        found = summary(folder, models["counts"], tmp_path / name, batch_size=2)
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)


def test_doses_are_a_column(tmp_path):
    adata = screen()
    adata.obs["conc"] = np.where(adata.obs["perturbation"] == "control", 0.0, 2.0)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    processor = StateProcessor.fit(adata, set_size=SET_SIZE, dose_key="conc")
    model = (model_of(processor), processor)
    found = summary(tmp_path, model, tmp_path / "out.parquet", ["pert_0", "pert_1"], doses=[0.5, 2.0])
    groups = found[["context", "perturbation", "dose"]].drop_duplicates()
    assert sorted(
        groups[groups["context"] == "type_0"][["perturbation", "dose"]].itertuples(index=False, name=None)
    ) == [
        ("pert_0", 0.5),
        ("pert_0", 2.0),
        ("pert_1", 0.5),
        ("pert_1", 2.0),
    ]


def test_cells_of_each_perturbation(made, tmp_path):
    folder, models = made
    cells = {"pert_1": 3, "pert_0": 7}
    found = summary(folder, models["counts"], tmp_path / "out.csv", cells_per_perturbation=cells)
    assert found.groupby("perturbation")["cells"].unique().map(list).to_dict() == {"pert_0": [7], "pert_1": [3]}
    run(folder, models["counts"], tmp_path / "out.h5ad", cells_per_perturbation=cells)
    predicted = ad.read_h5ad(tmp_path / "out.h5ad")
    for (context, name), rows in found.groupby(["context", "perturbation"]):
        own = predicted[(predicted.obs["cell_type"] == context) & (predicted.obs["perturbation"] == name)]
        np.testing.assert_allclose(rows["mean"], own.X.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rows["control_mean"], controls_of(own).mean(axis=0), rtol=1e-4, atol=1e-6)


def test_what_a_summary_cannot_be(made, tmp_path):
    folder, models = made
    model = models["counts"]
    with pytest.raises(ValueError, match="--summary .*out.txt: expected a name that ends in .parquet or .csv"):
        summary(folder, model, tmp_path / "out.txt")
    with pytest.raises(ValueError, match="obs_columns: a summary holds no cells"):
        summary(folder, model, tmp_path / "out.csv", obs_columns=["depth"])
    with pytest.raises(ValueError, match="layout: a summary holds no cells"):
        summary(folder, model, tmp_path / "out.csv", sparse=True)
    with pytest.raises(ValueError, match="one of the two"):
        run(folder, model, None)
    torch.nn.init.constant_(model[0].output_head.layers[-1].bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the model predicts nan for 'gene_0'"):
        summary(folder, model, tmp_path / "out.csv")
    torch.nn.init.zeros_(model[0].output_head.layers[-1].bias)
    assert not list(tmp_path.iterdir())


def test_many_intervals_are_the_single_ones():
    draws = np.random.default_rng(0).normal(size=(201, 5))
    low, high = intervals(draws)
    np.testing.assert_allclose([*zip(low, high)], [interval(draws[:, i]) for i in range(5)], rtol=1e-12)


def test_the_columns_are_documented(made, tmp_path):
    folder, models = made
    found = summary(folder, models["counts"], tmp_path / "out.csv")
    text = (Path(pertstate.evaluation.summary.__file__).parents[1] / "docs" / "outputs.md").read_text()
    assert [name for name in found if f"`{name}`" not in text] == []
