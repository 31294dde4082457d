"""The pair of files that `cell-eval` and the Virtual Cell Challenge take, and tables of cells."""

import anndata as ad
import numpy as np
import pytest
from predictions import CONTROLS, GENES, SET_SIZE, model_of, run, screen

from pertstate import StateProcessor
from pertstate.evaluation import CellEval, evaluate
from pertstate.evaluation.cell_eval import read_cell_counts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell_eval")
    screen().write_h5ad(folder / "screen.h5ad")
    processor = StateProcessor.fit(screen(), set_size=SET_SIZE)
    return folder, (model_of(processor), processor)


def pair(made, tmp_path, perturbations=None, naming=None, **options):
    folder, model = made
    naming = CellEval(real=tmp_path / "real.h5ad") if naming is None else naming
    run(folder, model, tmp_path / "predicted.h5ad", perturbations, cell_eval=naming, **options)
    return [
        ad.read_h5ad(tmp_path / f"{name}.h5ad")
        for name in ("predicted", "real")
        if (tmp_path / f"{name}.h5ad").exists()
    ]


def cells(adata, name) -> np.ndarray:
    return (adata.obs["target_gene"] == name).to_numpy()


def test_the_pair_is_what_cell_eval_takes(made, tmp_path):
    predicted, real = pair(made, tmp_path)
    source, processor = screen(), made[1][1]
    assert predicted.var_names.tolist() == real.var_names.tolist() == source.var_names.tolist()
    assert (
        set(predicted.obs["target_gene"])
        == set(real.obs["target_gene"])
        == {"non-targeting", "pert_0", "pert_1", "pert_2"}
    )
    for adata in (predicted, real):
        assert adata.X.dtype == np.float32 and adata.obs.columns.tolist() == ["target_gene", "cell_type"]
        assert (adata.X >= 0).all() and adata.X.max() < 15
        controls = adata[cells(adata, "non-targeting")]
        assert sorted(controls.obs_names) == sorted(source.obs_names[source.obs["perturbation"] == "control"])
        np.testing.assert_allclose(controls.X, processor.features(source[controls.obs_names]), rtol=1e-6)
    perturbed = real[~cells(real, "non-targeting")]
    np.testing.assert_allclose(perturbed.X, processor.features(source[perturbed.obs_names]), rtol=1e-6)
    assert (
        source[perturbed.obs_names].obs["perturbation"].astype(str) == perturbed.obs["target_gene"].astype(str)
    ).all()
    assert perturbed.n_obs == (source.obs["perturbation"] != "control").sum()


def test_other_names_and_combinations(made, tmp_path):
    naming = CellEval(column="target", control="ctrl")
    (predicted,) = pair(made, tmp_path, ["pert_0+pert_1"], naming, sparse=True)
    assert set(predicted.obs["target"]) == {"ctrl", "pert_0+pert_1"}
    with pytest.raises(ValueError, match="'pert_0' is a perturbation of the data, whose control cells are 'control'"):
        pair(made, tmp_path, ["pert_0"], CellEval(control="pert_0"), overwrite=True)


def test_doses_are_part_of_the_name(tmp_path):
    adata = screen()
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "control", 0.0, 2.0)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    processor = StateProcessor.fit(adata, set_size=SET_SIZE, dose_key="dose")
    files = pair((tmp_path, (model_of(processor), processor)), tmp_path)
    for adata in files:
        assert set(adata.obs["target_gene"]) == {"non-targeting", "pert_0@2", "pert_1@2", "pert_2@2"}


def test_the_pair_is_scored_without_a_word_about_its_columns(made, tmp_path):
    files = tmp_path / "predicted.h5ad", tmp_path / "real.h5ad"
    pair(made, tmp_path)
    scores = evaluate(*files, quiet=True)
    assert scores.groups == [("", f"type_{c}", f"pert_{p}") for c in range(2) for p in range(3)]
    folder, model = made
    run(folder, model, tmp_path / "plain.h5ad")
    plain = evaluate(tmp_path / "plain.h5ad", folder / "screen.h5ad", quiet=True)
    figures = [of.table[of.table["method"] == "model"][["pearson", "mae", "energy"]] for of in (scores, plain)]
    np.testing.assert_allclose(*figures, rtol=1e-4)


def table(tmp_path, text: str):
    path = tmp_path / "counts.csv"
    path.write_text(text)
    return path


def test_cells_of_each_perturbation_from_a_table(made, tmp_path, caplog):
    counts = read_cell_counts(
        table(
            tmp_path,
            "target_gene,n_cells,median_umi_per_cell\npert_1,3,54551\npert_0,30,100.5\nnon-targeting,9,1\ncontrol,9,1\n",
        )
    )
    assert counts == {"pert_1": 3, "pert_0": 30, "non-targeting": 9, "control": 9}
    del counts["non-targeting"]
    predicted, real = pair(made, tmp_path, cells_per_perturbation=counts)
    # Of each of the two contexts; there are no more than the control cells.
    assert {name: cells(predicted, name).sum() for name in set(predicted.obs["target_gene"])} == {
        "non-targeting": 2 * CONTROLS,
        "pert_1": 6,
        "pert_0": 2 * CONTROLS,
    }
    assert "2 of 4 groups have fewer control cells than predicted cells are asked for" in caplog.text
    assert "type_0 / pert_0: 20 of 30" in caplog.text
    assert set(real.obs["target_gene"]) == {"non-targeting", "pert_0", "pert_1"}
    # They are the first of those that are drawn anyway.
    folder, model = made
    run(folder, model, tmp_path / "all.h5ad", ["pert_1"])
    everything = ad.read_h5ad(tmp_path / "all.h5ad")
    names = everything.obs.groupby("cell_type", observed=True).head(3).index
    assert predicted.obs_names[cells(predicted, "pert_1")].tolist() == names.tolist()
    run(folder, model, tmp_path / "few.h5ad", cells_per_perturbation={"pert_1": 3, "pert_0": 5})
    assert ad.read_h5ad(tmp_path / "few.h5ad").uns["control_cells"].n_obs == 10
    with pytest.raises(ValueError, match="the table of cells has no row for 'pert_2'; "):
        run(folder, model, tmp_path / "x.h5ad", ["pert_2"], cells_per_perturbation=counts)


@pytest.mark.parametrize(
    "text, message",
    [
        ("gene,n_cells\na,1\n", r"expected the columns 'target_gene' or 'perturbation' and 'n_cells', found \['gene'"),
        ("target_gene,n\na,1\n", "expected the columns"),
        (
            "target_gene,n_cells\na,1\nb,0\n",
            "row 2: expected a perturbation and a whole number of cells, found 'b' and",
        ),
        ("target_gene,n_cells\na,1.5\n", "row 1: expected"),
        (
            "target_gene,n_cells\na,many\n",
            "row 1: expected a perturbation and a whole number of cells, found 'a' and 'many'",
        ),
        ("target_gene,n_cells\n,4\n", "row 1: expected"),
        ("target_gene,n_cells\na,1\na,2\n", r"\['a'\] stand twice"),
        ("target_gene,n_cells\n", "has no rows"),
        ("", "is no CSV table"),
    ],
)
def test_tables_that_say_no_numbers_of_cells(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_cell_counts(table(tmp_path, text))
    with pytest.raises(FileNotFoundError, match="gone.csv: no such file"):
        read_cell_counts(tmp_path / "gone.csv")


def test_what_cell_eval_does_not_take(made, tmp_path):
    folder, model = made
    with pytest.raises(ValueError, match="the data have no cells of 2 that are predicted: .*type_0 / pert_0\\+pert_1"):
        pair(made, tmp_path, ["pert_0+pert_1"])
    with pytest.raises(ValueError, match="out.zarr: cell-eval reads .h5ad"):
        run(folder, model, tmp_path / "out.zarr", cell_eval=CellEval())
    with pytest.raises(ValueError, match="output and cell_eval are both .*: expected two outputs, found one"):
        pair(made, tmp_path, naming=CellEval(real=tmp_path / "predicted.h5ad"))
    processor = StateProcessor.fit(screen(), set_size=SET_SIZE, normalize="none")
    with pytest.raises(ValueError, match="cell-eval takes log1p expression"):
        pair((folder, (model_of(processor), processor)), tmp_path)
    assert not list(tmp_path.iterdir())
    assert GENES == len(model[1].vocabulary.genes)
