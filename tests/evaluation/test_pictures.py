"""The pictures of a report as files."""

import os

import numpy as np
import pandas as pd
import pytest
from made_scores import LOG, made_scores

from pertstate.cli import main as pertstate
from pertstate.evaluation import pictures, report
from pertstate.evaluation.pictures import PICTURES, save_pictures
from pertstate.evaluation.report_data import KINDS
from pertstate.evaluation.scores import Scores


@pytest.fixture(scope="module")
def scores() -> Scores:
    # A name that would be a formula, and a line of its own.
    return made_scores(name=lambda of: f"{of} $\\x^2$\n")


@pytest.fixture(scope="module", autouse=True)
def _quick_map():
    """Two genes instead of UMAP, which takes long to compile. The tests of the page have the map itself."""

    def two_genes(scores: Scores) -> pd.DataFrame | None:
        parts = [
            pd.DataFrame({"x": cells[:, 0], "y": cells[:, 1], "kind": kind, "group": scores.cells[f"{kind}_group"]})
            for kind in KINDS
            if (cells := scores.cells.get(kind)) is not None
        ]
        return pd.concat(parts) if parts else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "cell_map", two_genes)
        patch.setattr(report, "cell_map", two_genes)
        yield


@pytest.fixture(scope="module")
def folder(scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    assert save_pictures(scores, LOG, folder / "plots") == list(PICTURES)
    scores.save(folder / "scores")
    return folder


def test_each_picture_is_there_in_both_formats(folder):
    found = {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}
    assert set(found) == {f"{name}.{suffix}" for name in PICTURES for suffix in ("png", "pdf")}
    for name, content in found.items():
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"%PDF")


def test_pictures_show_what_the_scores_hold(scores):
    figure = pictures._changes(scores)
    assert len(figure.axes) == len(scores.groups)
    strongest = figure.axes[0]
    assert "Pearson 1.00" in strongest.get_title()  # predicted changes are 0.8 of the observed ones
    points = np.asarray(strongest.collections[0].get_offsets())
    assert points[:, 1] == pytest.approx(0.8 * points[:, 0], abs=1e-6)
    heat = pictures._heat_map(scores)
    of_model = scores.table[scores.table["method"] == "model"]
    shown = heat.axes[0].images[0].get_array()
    assert shown.shape == (2, 3) and np.asarray(shown).ravel() == pytest.approx(of_model["pearson"].to_numpy())
    averages = pictures._averages(scores)
    assert [axis.get_title() for axis in averages.axes][-1] == "energy distance" and len(averages.axes) == 3
    curves = pictures._curves(pictures.by_step(LOG))
    assert curves.axes[0].lines[0].get_ydata().tolist() == [2, 1]
    assert "rank correlation over 5 groups: 1.00" in pictures._confidence(scores).axes[0].get_title()


def test_what_has_no_data_is_left_out(scores, tmp_path):
    bare = Scores(scores.table, scores.averages, "", groups=scores.groups)
    assert save_pictures(bare, [], tmp_path / "plots") == ["averages", "heat_map", "confidence"]
    nothing = Scores(scores.table.iloc[:0], scores.averages.iloc[:0], "")
    with pytest.raises(ValueError, match="the scores hold nothing to draw"):
        save_pictures(nothing, [], tmp_path / "none")
    assert os.listdir(tmp_path) == ["plots"]


@pytest.mark.slow
def test_the_command_writes_pictures_alone_or_beside_the_page(folder, tmp_path, capsys):
    words = ["report", str(folder / "scores"), "--plots", str(tmp_path / "plots")]
    assert pertstate(words) == 0
    assert "averages, changes, volcano, heat_map, cells, confidence, each as .png and .pdf" in capsys.readouterr().out
    before = (tmp_path / "plots" / "changes.png").read_bytes()
    (tmp_path / "plots" / "notes.txt").write_text("mine")
    assert pertstate(words) == 1 and "exists and is not an empty folder" in capsys.readouterr().err
    assert pertstate([*words, "--overwrite", "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "plots" / "changes.png").read_bytes() == before
    assert (tmp_path / "plots" / "notes.txt").read_text() == "mine" and (tmp_path / "page.html").is_file()
    assert pertstate(["report", str(folder / "scores")]) == 1
    assert "nothing to write: name a page (-o report.html), or a folder of pictures" in capsys.readouterr().err
