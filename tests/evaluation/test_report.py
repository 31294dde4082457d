"""The report's figures, and the file that holds them."""

import json
import re

import launches
import numpy as np
import pytest
from made_scores import LOG, made_scores
from scipy import stats

from pertstate.evaluation.confidence import calibration
from pertstate.evaluation.report import render_report
from pertstate.evaluation.report_data import by_step, cell_map, find_scores, gene_tests, mean_changes, read_log
from pertstate.evaluation.scores import Scores


@pytest.fixture(scope="module")
def scores() -> Scores:
    return made_scores()


def test_a_gene_is_tested_as_scipy_does(scores):
    p = gene_tests(scores)
    for group in (0, 4):
        x, y = (scores.cells[kind][scores.cells[f"{kind}_group"] == group] for kind in ("observed", "control"))
        expected = stats.ttest_ind(x.astype(float), y.astype(float), equal_var=False).pvalue
        np.testing.assert_allclose(p[group], stats.false_discovery_control(expected), rtol=1e-5)
    assert p.argmin(axis=1).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_group_without_controls_takes_those_of_its_context(scores):
    kept = scores.cells["control_group"] == 0
    cells = {
        **scores.cells,
        "control": scores.cells["control"][kept],
        "control_group": scores.cells["control_group"][kept],
    }
    found = gene_tests(Scores(scores.table, scores.averages, "", genes=scores.genes, groups=scores.groups, cells=cells))
    x, y = scores.cells["observed"][scores.cells["observed_group"] == 2], cells["control"]
    expected = stats.ttest_ind(x.astype(float), y.astype(float), equal_var=False).pvalue
    np.testing.assert_allclose(found[2], stats.false_discovery_control(expected), rtol=1e-5)
    # No control cell of the other context.
    assert np.isnan(found[3:]).all()


def test_a_gene_that_does_not_vary_is_not_tested(scores):
    cells = {name: values.copy() for name, values in scores.cells.items()}
    cells["observed"][:, 5] = cells["control"][:, 5] = 0
    changed = Scores(scores.table, scores.averages, "", genes=scores.genes, groups=scores.groups, cells=cells)
    found = gene_tests(changed)
    assert (found[:, 5] == 1).all() and np.isfinite(found).all()


def test_the_map_has_cells_of_each_kind_and_is_repeatable(scores):
    first, again = (cell_map(scores, most=90) for _ in range(2))
    assert first.equals(again) and first["kind"].value_counts().to_dict() == dict.fromkeys(
        ("control", "observed", "predicted"), 30
    )
    # Contexts differ more than perturbations do: each cell lies nearer to the middle of its own.
    place = first[["x", "y"]].to_numpy()
    context = first["group"].to_numpy() // 3
    middles = np.stack([place[context == c].mean(axis=0) for c in (0, 1)])
    nearest = np.linalg.norm(place[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == context).all()
    assert cell_map(made_scores(contexts=1, perturbations=1, cells=2)) is None


def test_confidence_is_ranked_on_groups_that_were_not_trained_on(scores):
    rows, correlation = calibration(scores.table)
    assert len(rows) == 5 and correlation == pytest.approx(1)
    table = scores.table.assign(energy=-scores.table["energy"])
    assert calibration(table)[1] == pytest.approx(-1)
    assert calibration(scores.table.drop(columns="confidence")) is None


def test_a_log_has_one_row_for_each_step():
    table = by_step(LOG)
    assert table["step"].tolist() == [10, 20] and list(table)[:2] == ["step", "epoch"]
    assert table["loss"].tolist() == [2, 1] and table["eval_loss"].tolist() == [2.5, 1.5]


def test_the_log_of_the_latest_checkpoint_is_read(tmp_path):
    for step in (10, 9, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(
            json.dumps({"log_history": [{"step": step, "loss": 1.0, "name": "x"}]})
        )
    assert read_log(tmp_path) == [{"step": 100, "loss": 1.0}]
    assert read_log(tmp_path / "scores") == [{"step": 100, "loss": 1.0}]
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{")
    with pytest.raises(
        ValueError, match="checkpoint-9/trainer_state.json is damaged: expected log_history of a Trainer"
    ):
        read_log(tmp_path)


def element(text: str, name: str) -> str:
    return re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', text, re.DOTALL)[1]


def test_one_file_without_addresses(scores):
    text = render_report(scores, LOG, "A run")
    data = json.loads(element(text, "data"))
    assert data["genes"][:2] == ["gene_0", "gene_1"] and data["history"]["loss"] == [2, 1]
    ours = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', ours)
    assert "better than every baseline in pearson" in text and "type_0" in text
    assert "distinguishable from none</dt>" in text and "change_tests" not in text


def test_what_is_missing_is_said(scores):
    text = render_report(Scores(scores.table, scores.averages, "worse"), [], "A run")
    for said in (
        "The scores keep no mean changes.",
        "so genes were not tested",
        "too few cells for a map",
        "No log of a training",
        "Not recorded.",
    ):
        assert said in text


def test_changes_outlive_the_packing(scores):
    import base64
    import zlib

    text = render_report(scores, [], "A run")
    data, pack = json.loads(element(text, "data")), zlib.decompress(base64.b64decode(element(text, "pack")))
    for kind, expected in mean_changes(scores).items():
        places = data["changes"][kind]
        values, steps = (
            np.frombuffer(pack, place["type"], int(np.prod(place["shape"])), place["at"]).reshape(place["shape"])
            for place in (places["values"], places["steps"])
        )
        np.testing.assert_allclose(values * steps[:, None], expected, atol=1e-4)


@pytest.mark.slow
def test_the_command(scores, tmp_path):
    scores.save(tmp_path / "run" / "scores")
    done = launches.run(["-m", "pertstate.cli", "report", tmp_path / "run", "-o", tmp_path / "report.html"])
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/report.html: a page for the browser\n"), done.stderr
    assert "<h1>run</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert find_scores(tmp_path / "run" / "scores" / "scores.json") == tmp_path / "run" / "scores"
    again = launches.run(["-m", "pertstate.cli", "report", tmp_path / "run", "-o", tmp_path / "report.html"])
    assert again.returncode == 1 and "--overwrite" in again.stderr
    none = launches.run(["-m", "pertstate.cli", "report", tmp_path, "-o", tmp_path / "other.html"])
    assert none.returncode == 1 and "holds no scores: expected scores.json" in none.stderr
    scores.save(tmp_path / "cv" / "scores" / "state")
    with pytest.raises(FileNotFoundError, match=rf"apart; name one of them: {tmp_path}/cv/scores/state$"):
        find_scores(tmp_path / "cv")
    assert not (tmp_path / "other.html").exists()
