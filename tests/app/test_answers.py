"""What the app answers, without the page."""

from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from app_models import write_model
from made_scores import made_scores

from pertstate import StateProcessor
from pertstate.app.answers import Question, answer, cell_places, doses_of, how_sure, name_asked, perturbations_of
from pertstate.app.cells import CellsFound, Reading, look_at
from pertstate.app.pictures import change_picture, place_picture
from pertstate.app.texts import answer_html, error_html, found_html, model_html
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.evaluation import controls_of, predict
from pertstate.evaluation.metrics import MODEL
from pertstate.hub.trained import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load(folder / "model", device="cpu")


@pytest.fixture(scope="module")
def question(folder) -> Question:
    return Question(folder / "screen.h5ad", "pert_1", "type_1")


@pytest.fixture(scope="module")
def found(trained, question, tmp_path_factory):
    return answer(trained, question, tmp_path_factory.mktemp("answer"))


def test_changes_are_those_of_a_summary(trained, question, found, tmp_path):
    predict(
        *(trained.model, trained.processor, question.cells),
        summary=tmp_path / "summary.csv",
        perturbations=["pert_1"],
        contexts=["type_1"],
        cells_per_perturbation=question.at_most,
        quiet=True,
    )
    summary = pd.read_csv(tmp_path / "summary.csv").set_index("gene")
    mine = found.changes.set_index("gene")
    assert found.cells == 20 and len(mine) == 30
    for column in mine:
        np.testing.assert_allclose(mine[column], summary.loc[mine.index, column], rtol=1e-5, atol=1e-6)
    assert (np.diff(mine["change"].abs()) <= 0).all()


def test_the_file_holds_the_predicted_cells_behind_their_controls(trained, question, found):
    adata = ad.read_h5ad(found.file)
    assert adata.obs["perturbation"].tolist() == ["control"] * 20 + ["pert_1"] * 20
    predicted = adata[20:]
    np.testing.assert_array_equal(controls_of(adata)[20:], adata.X[:20])
    expected = trained.predict(question.cells, ["pert_1"], ["type_1"], cells_per_perturbation=500)
    np.testing.assert_array_equal(predicted.X, expected.X)
    assert adata.uns["pertstate"]["checkpoint"] == "model"


def test_the_confidence_is_that_of_the_sentences(trained, question, found):
    assert found.status == "test" and not found.unseen
    cells = ad.read_h5ad(question.cells)
    sentences = trained.processor(cells, "pert_1", "type_1", seed=0)
    with torch.inference_mode():
        expected = trained.model(**sentences).confidence
    assert len(expected) == 3
    assert found.confidence == pytest.approx(float(expected.mean()), rel=1e-4)


def test_what_it_is_worth_is_what_was_measured(trained, found):
    said = how_sure(trained, found)
    assert said[0] == "pert_1 in type_1: held out for the test."
    # made_scores: the group is number 4 of six, and number 0 was trained on.
    assert said[1].startswith(
        "The run scored this group on 12 real cells: Pearson correlation of the mean change 0.760"
    )
    sure = replace(found, confidence=0.27)
    assert "That is less than for 40 % of the 5 scored held-out groups." in how_sure(trained, sure)[2]
    assert "rank correlation with the energy distance that was found is 1.00" in how_sure(trained, sure)[3]


def test_what_energy_distance_is_to_be_expected(trained, found):
    line = ConfidenceCalibration(intercept=0.1, slope=2.0, low=0.2, high=0.5, groups=7)
    calibrated = replace(trained, record=replace(trained.record, calibration=line))
    said = how_sure(calibrated, replace(found, confidence=0.15))
    assert "From 7 validation groups, an energy distance of 0.4000 is to be expected." in said[2]
    assert "is to be expected" not in " ".join(how_sure(trained, replace(found, confidence=0.15)))


def test_which_error_is_to_be_expected(trained, found):
    genes = trained.processor.output_names(trained.processor.feature_dim)
    spread = np.linspace(0.5, 2, len(genes)).astype(np.float32)
    intervals = ChangeIntervals(0.9, 1.5, 0.2, spread, groups=4, deviation=0.7)
    said = how_sure(replace(trained, record=replace(trained.record, intervals=intervals)), found)
    # The table of an answer has the largest changes first.
    change = found.changes.set_index("gene")["change"][genes].to_numpy()
    expected = intervals.expected_mae(change, found.cells, found.cells)
    assert f"From 4 training groups that the run held out, a mean absolute error of {expected:.4f} is to be" in said[2]
    table = trained.scores.table
    known = table.assign(expected_mae=np.where(table["method"] == MODEL, table["mae"] * 1.5, np.nan))
    scored = replace(trained.scores, table=known)
    said = how_sure(replace(trained, record=replace(trained.record, intervals=intervals), scores=scored), found)
    assert said[3].startswith("What that is worth: the MAE that the run expects") and "is 1.00 (95 %" in said[3]
    assert "to be expected" not in " ".join(how_sure(trained, found))


def test_what_was_not_measured_is_said(trained, found):
    unmeasured = replace(trained, scores=None)
    assert how_sure(unmeasured, found)[-1].startswith("What this figure is worth was not measured")
    table = made_scores().table
    no_head = replace(trained, scores=replace(trained.scores, table=table.assign(confidence=np.nan)))
    assert how_sure(no_head, found)[-1].startswith("What this figure is worth was not measured")
    the_same = replace(trained, scores=replace(trained.scores, table=table.assign(confidence=1.0)))
    assert how_sure(the_same, found)[-1].startswith("What this figure is worth was not measured")
    assert how_sure(trained, replace(found, confidence=None))[-1] == "The model gives no confidence."
    told = how_sure(trained, replace(found, status="train", unseen=True))
    assert told[0].endswith("this answer recalls more than it predicts.") and "has no training cells" in told[1]
    assert "is not recorded" in how_sure(trained, replace(found, status=""))[0]


def test_names_that_are_asked_for(trained, question):
    assert perturbations_of(trained) == ["pert_0", "pert_1", "pert_2"] and doses_of(trained, "pert_0") == []
    assert name_asked(trained, replace(question, perturbation=" pert_2 ", second="pert_0")) == "pert_0+pert_2"
    for wrong, message in (
        ({"perturbation": "pert_11"}, "'pert_11' is not known to the model; did you mean 'pert_1'"),
        ({"second": "STAT1"}, "'STAT1' is not known to the model; expected one of 'pert_0'"),
        ({"perturbation": " "}, "no perturbation is chosen"),
        ({"perturbation": "control"}, "'control' is the control; choose a perturbation"),
        ({"dose": 1.0}, "this model was trained without doses"),
    ):
        with pytest.raises((KeyError, ValueError), match=message):
            name_asked(trained, replace(question, **wrong))


def test_doses_are_asked_for_where_the_model_knows_them(trained, question, folder):
    adata = ad.read_h5ad(folder / "screen.h5ad")
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 2, 0.5, 10)
    knows = replace(trained, processor=StateProcessor.fit(adata, dose_key="dose"))
    assert doses_of(knows, "pert_1") == ["0.5", "10"]
    assert name_asked(knows, replace(question, dose=2.0)) == "pert_1@2"
    assert name_asked(knows, replace(question, dose=2.0, second="pert_0")) == "pert_0@2+pert_1@2"
    with pytest.raises(ValueError, match="dose"):
        name_asked(knows, question)
    with pytest.raises(ValueError, match="above 0"):
        name_asked(knows, replace(question, dose=-1.0))


def test_questions_that_cannot_be_answered(trained, question, tmp_path):
    for wrong, message in (
        ({"context": "type_9"}, "screen.h5ad: context 'type_9' is not in the data"),
        ({"context": ""}, "no context is chosen"),
        ({"at_most": 5000}, "expected 1 to 2,000 control cells, found 5000"),
    ):
        with pytest.raises((KeyError, ValueError), match=message):
            answer(trained, replace(question, **wrong), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_looked_at(trained, folder, tmp_path):
    found = look_at(trained, folder / "screen.h5ad", Reading())
    assert found == CellsFound(100, {"type_0": 20, "type_1": 20}, True)
    assert found_html(found) == "<p>100 cells, control cells of type_0 (20), type_1 (20).</p>"
    adata = ad.read_h5ad(folder / "screen.h5ad")
    alone = ad.AnnData(adata.X[:7], var=adata.var[[]])
    alone.write_h5ad(tmp_path / "alone.h5ad")
    bare = look_at(trained, tmp_path / "alone.h5ad", Reading(all_are_controls=True))
    assert bare == CellsFound(7, {"all cells": 7}, False)
    assert "no named context (7): write its name" in found_html(bare)
    adata.obs = adata.obs.rename(columns={"perturbation": "guide"})
    adata[:, :20].copy().write_h5ad(tmp_path / "other.h5ad")
    reading = Reading({"perturbation_key": "guide", "control": ""}, missing_genes=True)
    assert look_at(trained, tmp_path / "other.h5ad", reading).note.startswith("10 of 30 genes of the model are missing")


def test_files_that_do_not_suit_are_refused(trained, folder, tmp_path):
    adata = ad.read_h5ad(folder / "screen.h5ad")
    adata[:, 5:].copy().write_h5ad(tmp_path / "genes.h5ad")
    adata[adata.obs["perturbation"] != "control"].copy().write_h5ad(tmp_path / "treated.h5ad")
    (tmp_path / "broken.h5ad").write_bytes((folder / "screen.h5ad").read_bytes()[:5000])
    with h5py.File(tmp_path / "link.h5ad", "w") as file:
        file["X"] = h5py.ExternalLink(str(folder / "screen.h5ad"), "X")
        file.create_group("obs"), file.create_group("var")
    for name, message in (
        ("genes", "genes.h5ad: .*'gene_0'"),
        ("treated", "treated.h5ad: no control cells: expected 'control'"),
        ("broken", "broken.h5ad .* cannot be read as .h5ad"),
        ("link", "X is a link to another file"),
        ("none", "no such file"),
    ):
        with pytest.raises((KeyError, ValueError, OSError), match=message):
            look_at(trained, tmp_path / f"{name}.h5ad", Reading())


BITE = "<img src=x onerror=alert(1)>\u202e\x1b[2J"


def test_names_are_text(trained, found, tmp_path):
    (tmp_path / "x.h5ad").write_bytes(b"no")
    with pytest.raises(ValueError) as caught:
        look_at(trained, tmp_path / "x.h5ad", Reading())
    # The place of the file is nobody's business.
    assert "x.h5ad (2 bytes) cannot be read" in error_html(caught.value) and str(tmp_path) not in error_html(
        caught.value
    )
    hostile = replace(found, perturbation=BITE, context=BITE)
    texts = [
        error_html(KeyError(BITE)),
        found_html(CellsFound(1, {BITE: 1}, True, BITE)),
        answer_html(trained, hostile),
    ]
    named = made_scores(name=lambda of: of + BITE)
    texts.append(model_html(replace(trained, name=BITE, scores=named)))
    for text in texts:
        assert "&lt;img" in text and not any(part in text for part in ("<img", "\u202e", "\x1b"))
    genes = found.changes.assign(gene=[BITE, *found.changes["gene"][1:]])
    drawn = change_picture(replace(hostile, changes=genes)).to_plotly_json()
    assert drawn["data"][0]["customdata"][-1].startswith("&lt;img src=x") and "<img" not in str(drawn)


def test_the_model_says_what_it_learned_from(trained):
    text = model_html(trained)
    assert "better than every baseline in pearson" in text and "30 genes" in text
    assert "train: 10 cells of 1 perturbations" in text and "test: 10 cells of 1 perturbations" in text
    bare = model_html(replace(trained, record=None, scores=None))
    assert "What it was trained on is not recorded." in bare and "How good it is was not measured" in bare


def test_pictures_show_the_answer(found):
    bars = change_picture(found).to_plotly_json()["data"][0]
    top = found.changes.head(20)[::-1]
    assert bars["customdata"] == top["gene"].tolist() and list(bars["x"]) == top["change"].tolist()
    np.testing.assert_allclose(
        np.add(bars["x"], bars["error_x"]["array"]), np.maximum(top["change_high"], top["change"])
    )
    places = cell_places(found, umap=False)
    assert places["kind"].value_counts().to_dict() == {"control": 20, "predicted": 20}
    assert places["x"].std() > places["y"].std() > 0
    assert place_picture(places, umap=True).layout.xaxis.title.text == "UMAP 1"
    drawn = place_picture(places, umap=False).to_plotly_json()
    [arrow] = drawn["layout"]["annotations"]
    middles = places.groupby("kind")[["x", "y"]].mean()
    np.testing.assert_allclose([arrow["ax"], arrow["ay"]], middles.loc["control"], atol=1e-6)
    np.testing.assert_allclose([arrow["x"], arrow["y"]], middles.loc["predicted"], atol=1e-6)
    # The two components keep the distance of the means as far as they go: it is never longer than among the genes.
    adata = ad.read_h5ad(found.file)
    whole = np.linalg.norm(adata.X[:20].mean(axis=0) - adata.X[20:].mean(axis=0))
    assert 0.5 * whole < np.linalg.norm(np.subtract(*middles.to_numpy())) <= whole * (1 + 1e-5)
