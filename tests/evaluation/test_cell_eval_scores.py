"""The metrics of cell-eval beside ours."""

import numpy as np
import pandas as pd
import pytest
from predictions import SET_SIZE, model_of, run

from pertstate import StateProcessor
from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.evaluation import CellEval, cell_eval_scores, evaluate
from pertstate.evaluation.cell_eval_scores import CAVEAT, CellEvalMetrics
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.report import render_report
from pertstate.evaluation.scores import Scores
from pertstate.evaluation.scoring import Predicted


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The files that `predict --cell-eval` writes."""
    folder = tmp_path_factory.mktemp("pair")
    screen = simulate_screen(num_contexts=2, num_perturbations=3, num_genes=30, cells_per_group=60, seed=3)
    screen.write_h5ad(folder / "screen.h5ad")
    processor = StateProcessor.fit(screen, set_size=SET_SIZE)
    naming = CellEval(real=folder / "real.h5ad")
    run(folder, (model_of(processor), processor), folder / "predicted.h5ad", cell_eval=naming)
    return folder


def of_model(scores: Scores) -> pd.DataFrame:
    table = scores.table
    return table[table["method"] == MODEL].set_index(["context", "perturbation"])


@pytest.mark.cell_eval
def test_both_give_the_same_on_the_same_files(pair, tmp_path):
    import anndata as ad
    from cell_eval import MetricsEvaluator

    files = [pair / f"{name}.h5ad" for name in ("predicted", "real")]
    scores = evaluate(*files, quiet=True, cell_eval=True, metrics=["discrimination"])
    ours = of_model(scores)
    assert len(ours) == 6
    read = list(map(ad.read_h5ad, files))
    for context in ("type_0", "type_1"):
        parts = [of[of.obs["cell_type"] == context].copy() for of in read]
        evaluator = MetricsEvaluator(*parts, pert_col="target_gene", num_threads=1, outdir=str(tmp_path / context))
        found, _ = evaluator.compute(write_csv=False)
        theirs = pd.DataFrame(found.to_dict(as_series=False)).set_index("perturbation").astype(float)
        own = ours.loc[context]
        names = {"pearson_delta": "pearson", "mae": "mae", "mse": "mse", "discrimination_score_l1": "discrimination"}
        for their_name, name in names.items():
            np.testing.assert_allclose(own[name], theirs.loc[own.index, their_name], atol=1e-5)
        for name in theirs:
            # It computes these distances in float32, so they depend on the order of the cells.
            atol = 1e-4 if name == "pearson_edistance" else 1e-5
            np.testing.assert_allclose(own[f"cell_eval_{name}"], theirs.loc[own.index, name], atol=atol, err_msg=name)
    assert {"de_direction_match", "overlap_at_N", "precision_at_50", "roc_auc", "clustering_agreement"} <= {
        name.removeprefix("cell_eval_") for name in ours
    }
    assert CAVEAT in scores.notes


@pytest.mark.cell_eval
def test_they_are_printed_saved_and_reported(pair, tmp_path, capsys):
    words = ["evaluate", "--predicted", str(pair / "predicted.h5ad"), "--real", str(pair / "real.h5ad"), "--quiet"]
    words += ["--cell-eval"]
    assert pertstate([*words, "--scores", str(tmp_path / "scores"), "--output", str(tmp_path / "table.csv")]) == 0
    out, err = capsys.readouterr()
    assert "cell-eval, of the model" in out and "discrimination_score_l1" in out and "cell_eval_" not in out
    assert f"note: {CAVEAT}" in err and "Iterating over perturbations" not in err
    assert "cell_eval_roc_auc" in pd.read_csv(tmp_path / "table.csv")
    scores = Scores.load(tmp_path / "scores")
    assert scores.value(MODEL, "cell_eval_pearson_delta") == pytest.approx(scores.value(MODEL, "pearson"), abs=1e-5)
    text = render_report(scores, [], "A run")
    assert "Metrics of cell-eval" in text and "clustering_agreement" in text and scores.settings["cell-eval"] in text


@pytest.mark.cell_eval
def test_what_it_does_not_find_is_said():
    """With one perturbation there is nothing to cluster; without a change, no gene is significant."""
    cells = np.random.default_rng(0).gamma(1, 1, (60, 8)).astype(np.float32)
    found = CellEvalMetrics([f"g{i}" for i in range(8)], "control")
    found.add(("", "c", "P"), Predicted(cells[:20]), cells[20:40], cells[40:])
    found.finish()
    assert "cell_eval_mae" in found.figures["", "c", "P"]
    said = [note for note in found.notes if "clustering_agreement" in note]
    assert len(said) == 1 and said[0].startswith("cell-eval found no clustering_agreement in ['c'] (")
    assert "cell-eval found no de_direction_match in ['c'] (no perturbation has it)" in found.notes


def test_values_that_are_no_log1p_expression_are_refused():
    cells, found = np.ones((3, 2), np.float32), CellEvalMetrics(["a", "b"], "control")
    for wrong in (-0.5, 15.5):
        with pytest.raises(ValueError, match=f"from 0 to 15, and the predicted cells of c / P hold {wrong}"):
            found.add(("", "c", "P"), Predicted(np.array([[1, wrong]], np.float32)), cells, cells)


def test_without_the_package_there_is_one_line_before_data_are_read(monkeypatch, capsys):
    monkeypatch.setattr(cell_eval_scores, "find_spec", lambda name: None)
    assert pertstate(["evaluate", "--predicted", "gone.h5ad", "--real", "gone.h5ad", "--cell-eval"]) == 1
    line = "pertstate evaluate: error: the metrics of cell-eval need the package: pip install 'pertstate[eval]'\n"
    assert capsys.readouterr().err == line
