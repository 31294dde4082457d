"""How outputs of `predict` are laid out: control cells once, as rows or beside each cell; dense, sparse or halved; .h5ad or .zarr."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from predictions import CONTROLS, GENES, SET_SIZE, model_of, run, screen

from pertstate import StateProcessor
from pertstate.evaluation import OutputLayout, controls_of, evaluate


KINDS = {
    "counts": ({"batch_key": "batch"}, {}),
    "embedding": ({"input": "obsm/X_emb"}, {"nonnegative_output": False}),
    "decoder": ({"input": "obsm/X_emb", "gene_input": "X"}, {"nonnegative_output": False, "gene_dim": GENES}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a screen; of each kind of model, it, its processor and its output with control cells beside each cell."""
    folder = tmp_path_factory.mktemp("layouts")
    screen().write_h5ad(folder / "screen.h5ad")
    models = {}
    for kind, (options, fields) in KINDS.items():
        processor = StateProcessor.fit(screen(), set_size=SET_SIZE, **options)
        model = model_of(processor, **fields)
        run(folder, (model, processor), folder / f"{kind}.h5ad", controls="layer")
        models[kind] = (model, processor, ad.read_h5ad(folder / f"{kind}.h5ad"))
    return folder, models


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.mark.parametrize(
    "kind, suffix", [*((kind, ".h5ad") for kind in KINDS), ("counts", ".zarr"), ("decoder", ".zarr")]
)
@pytest.mark.parametrize("storage", [{}, {"sparse": True}, {"dtype": "float16"}], ids=["dense", "sparse", "half"])
@pytest.mark.parametrize("controls", ["once", "rows"])
def test_every_layout_holds_the_same_cells(made, tmp_path, kind, controls, storage, suffix):
    folder, models = made
    model, processor, expected = models[kind]
    output = tmp_path / f"out{suffix}"
    run(folder, (model, processor), output, controls=controls, **storage)
    found = ad.read_zarr(output) if suffix == ".zarr" else ad.read_h5ad(output)
    number = 2 * CONTROLS if controls == "rows" else 0
    predicted = found[number:]
    assert found.n_obs == number + expected.n_obs and predicted.obs_names.tolist() == expected.obs_names.tolist()
    assert sp.issparse(found.X) == ("sparse" in storage)
    half = "dtype" in storage
    assert found.X.dtype == (np.float16 if half else np.float32)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if half else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(dense(predicted.X).astype(float), dense(expected.X), **tolerance)
    if kind == "decoder":
        np.testing.assert_allclose(
            dense(predicted.obsm["embedding"]).astype(float), expected.obsm["embedding"], **tolerance
        )
    for column in set(expected.obs) - {"control_barcode"}:
        assert predicted.obs[column].dtype == "category"
        assert predicted.obs[column].astype(str).tolist() == expected.obs[column].astype(str).tolist()
    its = controls_of(found)[number:]
    if controls == "once" or kind != "decoder":
        np.testing.assert_allclose(dense(its).astype(float), dense(controls_of(expected)), **tolerance)
    if controls == "once":
        store = found.uns["control_cells"]
        assert store.n_obs == 2 * CONTROLS and sp.issparse(store.X) == ("sparse" in storage)
        assert (store.obs_names[found.obs["control_row"]] == found.obs["control_barcode"]).all()
        assert (store.obs["cell_type"].to_numpy()[found.obs["control_row"]] == found.obs["cell_type"]).all()
        # Also of some cells and genes.
        some = found[3::5, 2:5]
        np.testing.assert_array_equal(
            dense(controls_of(some)), dense(its)[3::5] if kind == "decoder" else dense(its)[3::5, 2:5]
        )


def test_control_cells_as_rows_are_the_real_ones(made, tmp_path):
    folder, models = made
    model, processor, expected = models["decoder"]
    run(folder, (model, processor), tmp_path / "out.h5ad", controls="rows", obs_columns=["depth"])
    found, real = ad.read_h5ad(tmp_path / "out.h5ad"), screen()
    rows = found[: 2 * CONTROLS]
    assert (rows.obs["perturbation"] == "control").all() and (
        found.obs["perturbation"] == "control"
    ).sum() == rows.n_obs
    same = real[rows.obs_names]
    np.testing.assert_allclose(rows.X, processor.gene_features(same), rtol=1e-6)
    np.testing.assert_allclose(rows.obsm["embedding"], same.obsm["X_emb"], rtol=1e-6)
    assert rows.obs["control_barcode"].astype(str).tolist() == rows.obs_names.tolist()
    assert rows.obs["control_row"].tolist() == list(range(2 * CONTROLS))
    np.testing.assert_array_equal(found.obs["depth"], real[found.obs["control_barcode"].astype(str)].obs["depth"])
    # Each predicted cell finds its own, also where rows were left out or turned round, and says so where it is gone.
    backwards = found[::-1]
    np.testing.assert_array_equal(controls_of(backwards), controls_of(found)[::-1])
    np.testing.assert_array_equal(controls_of(found)[50], found[found.obs["control_barcode"].iloc[50]].X[0])
    with pytest.raises(KeyError, match="control cells are no longer among the rows"):
        controls_of(found[2 * CONTROLS :])


def test_scanpy_ranks_genes_against_the_control_cells(made, tmp_path):
    folder, models = made
    model, processor, expected = models["counts"]
    run(folder, (model, processor), tmp_path / "out.h5ad", controls="rows")
    predicted = ad.read_h5ad(tmp_path / "out.h5ad")
    sc.tl.rank_genes_groups(predicted, "perturbation", reference="control", method="t-test")
    names = ["pert_0", "pert_1", "pert_2"]
    assert list(predicted.uns["rank_genes_groups"]["names"].dtype.names) == names
    controls = predicted[predicted.obs["perturbation"] == "control"].X
    for name in names:
        table = sc.get.rank_genes_groups_df(predicted, name).set_index("names")
        cells = predicted[predicted.obs["perturbation"] == name].X
        by_hand = np.log2((np.expm1(cells.mean(axis=0)) + 1e-9) / (np.expm1(controls.mean(axis=0)) + 1e-9))
        np.testing.assert_allclose(table.loc[predicted.var_names, "logfoldchanges"], by_hand, rtol=1e-4, atol=1e-4)


def test_scores_of_every_layout_are_the_same(made, tmp_path):
    folder, models = made
    model, processor, _ = models["counts"]
    tables = []
    for i, layout in enumerate([{"controls": "layer"}, {}, {"controls": "rows"}, {"sparse": True}]):
        run(folder, (model, processor), tmp_path / f"{i}.h5ad", **layout)
        scores = evaluate(tmp_path / f"{i}.h5ad", folder / "screen.h5ad", folder / "screen.h5ad", quiet=True)
        tables.append(scores.table)
    run(folder, (model, processor), tmp_path / "out.zarr")
    tables.append(evaluate(tmp_path / "out.zarr", folder / "screen.h5ad", folder / "screen.h5ad", quiet=True).table)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


def test_sentences_of_several_batches_stand_in_order_in_a_sparse_output(made, tmp_path):
    """Arm by arm, whatever goes through the model together; with other numbers of sentences in a pass, too."""
    folder, models = made
    model, processor, expected = models["counts"]
    for batch_size in (1, 2, 100):
        run(folder, (model, processor), tmp_path / "out.h5ad", sparse=True, batch_size=batch_size, overwrite=True)
        found = ad.read_h5ad(tmp_path / "out.h5ad")
        np.testing.assert_allclose(found.X.toarray(), expected.X, rtol=1e-4, atol=1e-5)


def test_doses_stand_in_obs_and_are_missing_of_control_cells(tmp_path):
    adata = screen()
    rng = np.random.default_rng(0)
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "control", 0, rng.choice([0.5, 2.0], adata.n_obs))
    adata.write_h5ad(tmp_path / "screen.h5ad")
    processor = StateProcessor.fit(adata, set_size=SET_SIZE, dose_key="dose")
    model = model_of(processor)
    run(tmp_path, (model, processor), tmp_path / "out.h5ad", ["pert_0@0.5", "pert_0@2"], controls="rows")
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    of = found.obs.groupby("perturbation", observed=True)["dose"]
    assert of.get_group("control").isna().all() and sorted(of.get_group("pert_0").unique()) == [0.5, 2.0]
    scores = evaluate(tmp_path / "out.h5ad", tmp_path / "screen.h5ad", tmp_path / "screen.h5ad", quiet=True)
    assert {group[2] for group in scores.groups} == {"pert_0@0.5", "pert_0@2"}


def test_what_float16_cannot_hold_is_an_error(made, tmp_path):
    folder, _ = made
    adata = screen()
    processor = StateProcessor.fit(adata, set_size=SET_SIZE, normalize="none")
    model = model_of(processor)
    torch.nn.init.constant_(model.output_head.layers[-1].bias, 70_000.0)
    with pytest.raises(ValueError, match=r"float16 holds numbers up to 65504, found 7\d+"):
        run(folder, (model, processor), tmp_path / "out.h5ad", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_options_that_contradict_one_another_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="choose sparse or float16, not both"):
        OutputLayout(sparse=True, dtype="float16")
    with pytest.raises(ValueError, match=r"controls='twice': expected one of \['once', 'rows', 'layer'\]"):
        OutputLayout(controls="twice")
    folder, models = made
    processor = models["embedding"][1]
    other = model_of(processor, output_dim=4, nonnegative_output=False, residual="hidden")
    with pytest.raises(ValueError, match="reads embeddings of 6 dimensions and predicts others of 4"):
        run(folder, (other, processor), tmp_path / "out.h5ad", controls="rows")
    with pytest.raises(KeyError, match="expected layers\\['control'\\]"):
        controls_of(ad.AnnData(np.zeros((2, 2))))


def test_a_zarr_is_replaced_whole_and_only_if_asked_for(made, tmp_path):
    folder, models = made
    model = models["counts"]
    output = tmp_path / "out.zarr"
    run(folder, model, output, ["pert_0"])
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(folder, model, output, ["pert_1"])
    assert set(ad.read_zarr(output).obs["perturbation"]) == {"pert_0"}
    run(folder, model, output, ["pert_1"], overwrite=True)
    assert set(ad.read_zarr(output).obs["perturbation"]) == {"pert_1"} and (output / "notes.txt").read_text() == "mine"
    (tmp_path / "other.zarr").mkdir()
    (tmp_path / "other.zarr" / "thesis").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no AnnData in zarr format"):
        run(folder, model, tmp_path / "other.zarr", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.zarr", "out.zarr"]
