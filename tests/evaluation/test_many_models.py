"""Many models in one table, each beside the first."""

import re

import numpy as np
import pytest
from predictions import SET_SIZE, model_of, run, screen

from pertstate import StateProcessor
from pertstate.cli import main as pertstate
from pertstate.evaluation import compare_models, evaluate
from pertstate.evaluation.metrics import METRICS
from pertstate.evaluation.report import render_report
from pertstate.evaluation.scores import Scores, format_models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Predictions of an untrained model, the same twice as large, and the real cells themselves as predictions."""
    import anndata as ad

    folder = tmp_path_factory.mktemp("models")
    screen().write_h5ad(folder / "screen.h5ad")
    processor = StateProcessor.fit(screen(), set_size=SET_SIZE)
    run(folder, (model_of(processor), processor), folder / "a.h5ad")
    predicted = ad.read_h5ad(folder / "a.h5ad")
    predicted.X = predicted.X * 2
    predicted.write_h5ad(folder / "b.h5ad")
    predicted.X = predicted.X / 2
    kept = predicted[predicted.obs["perturbation"] != predicted.obs["perturbation"].iloc[0]]
    kept.copy().write_h5ad(folder / "fewer.h5ad")
    return folder


@pytest.fixture(scope="module")
def scores(files) -> dict[str, Scores]:
    return {name: evaluate(files / f"{name}.h5ad", files / "screen.h5ad", quiet=True) for name in ("a", "b", "fewer")}


def test_each_model_has_its_own_average_and_its_difference_from_the_first(scores):
    table = compare_models({name: scores[name] for name in ("a", "b")}).set_index(["metric", "model"])
    for metric in METRICS:
        averages = [scores[name].averages.query("method == 'model'").set_index("metric") for name in ("a", "b")]
        own = [of.loc[metric] for of in averages]
        for name, of in zip(("a", "b"), own):
            # The same averages and intervals as where the model is scored alone.
            np.testing.assert_allclose(table.loc[(metric, name), ["value", "low", "high"]].astype(float), of[["value", "low", "high"]].astype(float))  # fmt: skip
        row = table.loc[metric, "b"]
        assert row["difference"] == pytest.approx(own[1]["value"] - own[0]["value"])
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert table.loc[metric, "a"]["beside"] == "" and np.isnan(table.loc[metric, "a"]["difference"])
    assert table.loc["mae", "b"]["beside"] == table.loc["energy", "b"]["beside"] == "worse"
    back = compare_models({name: scores[name] for name in ("b", "a")}).set_index(["metric", "model"])
    assert back.loc["mae", "a"]["beside"] == "better"


def test_only_groups_that_all_have_are_averaged(scores):
    table = compare_models(scores)
    shared = {result.group for result in scores["fewer"].results}
    assert set(table["groups"]) == {len(shared)} and len(shared) < len(scores["a"].results)
    rows = table.set_index(["metric", "model"])
    of_model = scores["a"].table.query("method == 'model'")
    of_shared = of_model[[group in shared for group in zip(of_model.dataset, of_model.context, of_model.perturbation)]]
    assert rows.loc[("mae", "a"), "value"] == pytest.approx(of_shared["mae"].mean())
    # The very same cells.
    assert (
        rows.loc[("mae", "fewer"), "difference"] == 0 and rows.loc[("mae", "fewer"), "beside"] == "not distinguishable"
    )


def test_models_on_other_genes_are_not_compared(scores):
    import dataclasses

    other = dataclasses.replace(scores["b"], genes=[*scores["b"].genes[1:], "new"])
    count = len(other.genes)
    with pytest.raises(ValueError, match=rf"on different genes \({count} and {count}, {count - 1} in common\)"):
        compare_models({"a": scores["a"], "b": other})
    with pytest.raises(ValueError, match="expected at least two models, found \\['a'\\]"):
        compare_models({"a": scores["a"]})


def test_the_command_prints_saves_and_reports_the_table(files, scores, tmp_path, capsys):
    words = ["evaluate", "--predicted", str(files / "a.h5ad"), "--real", str(files / "screen.h5ad"), "--quiet"]
    words += ["--against", str(files / "b.h5ad"), str(files / "fewer.h5ad"), "--scores", str(tmp_path / "scores")]
    assert pertstate(words) == 0
    out, err = capsys.readouterr()
    saved = Scores.load(tmp_path / "scores")
    assert (tmp_path / "scores" / "models.csv").is_file()
    assert list(saved.models["model"]) == ["a.h5ad", "b.h5ad", "fewer.h5ad"] * len(METRICS)
    expected = compare_models(scores)
    np.testing.assert_allclose(saved.models["value"], expected["value"])
    np.testing.assert_allclose(saved.models["difference"], expected["difference"])
    assert format_models(saved.models) in out and "difference from a.h5ad" in out
    assert re.search(r"note: \d+ groups left out of the comparison, as not all of the models have them", err)
    assert err.count("Verdict on a.h5ad, from") == 2
    saved.cells = {}  # no map of cells, which takes long
    page = render_report(saved, [], "A run")
    assert "Beside other models" in page and "fewer.h5ad" in page


def test_a_model_that_is_named_twice_is_refused_before_data_are_read(capsys):
    words = ["evaluate", "--predicted", "gone.h5ad", "--real", "gone.h5ad", "--against", "x.h5ad", "gone.h5ad"]
    assert pertstate(words) == 1
    assert capsys.readouterr().err == (
        "pertstate evaluate: error: --against: gone.h5ad is named twice; name each model once\n"
    )
