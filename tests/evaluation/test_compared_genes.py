"""Scores on the genes that both files have, and of pairs of files that another tool made."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from predictions import SET_SIZE, model_of, run, screen

from pertstate import StateProcessor
from pertstate.cli import main as pertstate
from pertstate.evaluation import evaluate
from pertstate.evaluation.metrics import METRICS, MODEL


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genes")
    screen().write_h5ad(folder / "screen.h5ad")
    processor = StateProcessor.fit(screen(), set_size=SET_SIZE)
    model = model_of(processor), processor
    run(folder, model, folder / "predicted.h5ad")
    # The screen as somebody else has it: log1p values, other genes in another order.
    other = screen()
    counts = np.asarray(other.X.todense())
    other.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    other = other[:, list(reversed(other.var_names[5:]))].copy()
    other.var_names = [f"new_{i}" if i < 2 else name for i, name in enumerate(other.var_names)]
    other.write_h5ad(folder / "other.h5ad")
    return folder, model


def figures(scores) -> np.ndarray:
    return scores.table[scores.table["method"] == MODEL][list(METRICS)].to_numpy()


def test_other_genes_are_an_error_that_names_the_option(made, capsys):
    folder, _ = made
    words = ["evaluate", "--predicted", str(folder / "predicted.h5ad"), "--real", str(folder / "other.h5ad"), "--quiet"]
    assert pertstate(words) == 1
    said = capsys.readouterr().err
    assert "7 of the 30 predicted genes are missing from " in said and len(said.splitlines()) == 1
    assert "score the 23 genes that both have with --common-genes" in said


def test_the_common_genes_are_scored_by_name(made):
    folder, _ = made
    scores = evaluate(folder / "predicted.h5ad", folder / "other.h5ad", quiet=True, common_genes=True, normalize="none")
    assert (
        "scored on the 23 genes that both have: 7 predicted genes are missing from the real cells, and 2 genes"
        in " ".join(scores.notes)
    )
    predicted, real = ad.read_h5ad(folder / "predicted.h5ad"), ad.read_h5ad(folder / "other.h5ad")
    shared = [gene for gene in predicted.var_names if gene in set(real.var_names)]
    assert scores.genes == shared and len(shared) == 23
    for row in scores.table[scores.table["method"] == MODEL].itertuples():
        means = [
            np.asarray(
                of[(of.obs["perturbation"] == row.perturbation) & (of.obs["cell_type"] == row.context), shared].X.mean(
                    axis=0
                )
            ).ravel()
            for of in (predicted, real)
        ]
        assert row.mae == pytest.approx(np.abs(means[0] - means[1]).mean(), rel=1e-4)


def test_where_all_genes_are_common_the_option_changes_no_score(made):
    folder, _ = made
    files = folder / "predicted.h5ad", folder / "screen.h5ad"
    plain, common = evaluate(*files, quiet=True), evaluate(*files, quiet=True, common_genes=True)
    np.testing.assert_array_equal(figures(plain), figures(common))
    assert "scored on the 30 genes that both have: 0 predicted genes are missing" in " ".join(common.notes)


def test_baselines_and_models_follow_the_genes(made):
    """With a training file, or with a model that predicts here: the same figures as of files that have only these genes."""
    folder, (model, processor) = made
    train = screen()
    train.obs_names = [f"train-{name}" for name in train.obs_names]
    train.write_h5ad(folder / "train.h5ad")
    predicted = ad.read_h5ad(folder / "predicted.h5ad")
    real = ad.read_h5ad(folder / "screen.h5ad")
    kept = real[:, real.var_names[4:]].copy()
    kept.write_h5ad(folder / "fewer.h5ad")
    options = {"quiet": True, "common_genes": True}
    scores = evaluate(folder / "predicted.h5ad", folder / "fewer.h5ad", folder / "train.h5ad", **options)
    cut = predicted[:, predicted.var_names[4:]].copy()
    cut.write_h5ad(folder / "cut.h5ad")
    expected = evaluate(folder / "cut.h5ad", folder / "fewer.h5ad", folder / "train.h5ad", quiet=True)
    pd.testing.assert_frame_equal(scores.table, expected.table)
    assert "perturbation mean" in set(scores.averages["method"])
    of_model = evaluate(None, folder / "fewer.h5ad", model=model, processor=processor, **options)
    assert np.isfinite(figures(of_model)).all() and len(of_model.genes) == 26


def test_kinds_of_names_that_have_nothing_in_common(made, tmp_path):
    folder, _ = made
    other = ad.read_h5ad(folder / "screen.h5ad")
    other.var_names = [f"ENSG{i}" for i in range(other.n_vars)]
    other.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(
        ValueError, match="none of the 30 predicted genes is in .*other.h5ad: predicted .* real .*ENSG0"
    ):
        evaluate(folder / "predicted.h5ad", tmp_path / "other.h5ad", quiet=True, common_genes=True)


# Other tools


def test_a_pair_of_another_tool_needs_no_model_and_no_training_cells(made, tmp_path, capsys):
    """Two plain AnnData with the same columns: nothing of ours is in them."""
    folder, (_, processor) = made
    predicted, real = ad.read_h5ad(folder / "predicted.h5ad"), screen()
    for name, of, values in (
        ("predicted", predicted, predicted.X),
        ("real", real, processor.features(real)),
    ):
        obs = pd.DataFrame(
            {
                "gene": of.obs["perturbation"].astype(str).replace("control", "NT").to_numpy(),
                "line": of.obs["cell_type"].astype(str).to_numpy(),
            },
            index=of.obs_names,
        )
        ad.AnnData(values, obs=obs, var=pd.DataFrame(index=of.var_names)).write_h5ad(tmp_path / f"{name}.h5ad")
    words = [
        "evaluate",
        "--predicted",
        str(tmp_path / "predicted.h5ad"),
        "--real",
        str(tmp_path / "real.h5ad"),
        "--quiet",
    ]
    words += ["--perturbation-key", "gene", "--context-key", "line", "--control", "NT"]
    assert pertstate([*words, "--output", str(tmp_path / "table.csv")]) == 0
    assert "only the baseline 'no change' can be scored" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "table.csv")
    found = table[(table["method"] == MODEL) & (table["context"] != "mean")][list(METRICS)].to_numpy()
    # The control cells that a cell was predicted from are not named there, so they are drawn apart: equal without a draw.
    own = evaluate(folder / "predicted.h5ad", folder / "screen.h5ad", quiet=True)
    np.testing.assert_allclose(found, figures(own), rtol=1e-4)
