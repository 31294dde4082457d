"""Scores of files that were made elsewhere: other names, no column of contexts, another scale."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pertstate import StateProcessor
from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.metrics import ABOUT, COSTLY, FURTHER, METRICS
from pertstate.evaluation.report import render_report
from pertstate.evaluation.scores import Scores


def log1p(counts: np.ndarray, total: float) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * total).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A screen of log1p values, predictions for it, and the same screen as somebody else has it."""
    folder = tmp_path_factory.mktemp("scores")
    screen = simulate_screen(num_contexts=1, num_perturbations=2, num_genes=60, cells_per_group=12, seed=3)
    counts = screen.X.toarray()
    screen.X = log1p(counts, 1e4)
    screen.write_h5ad(folder / "screen.h5ad")
    processor = StateProcessor.fit(screen, set_size=8)
    sentences = processor(screen, ["pert_0", "pert_1"])
    controls = sentences["control_cells"].numpy()[sentences["cell_mask"].numpy()]
    moved = np.maximum(controls + np.random.default_rng(0).normal(0, 0.3, controls.shape), 0).astype(np.float32)
    uns = processor.describe_output(False, sentences.controls, "by hand", sentences.groups)
    predicted = processor.to_anndata(moved, controls, None, sentences.obs, uns)
    predicted.write_h5ad(folder / "predicted.h5ad")
    names = screen.obs["perturbation"].astype(str).replace("control", "DMSO")
    for name, total in (("names", 1e4), ("scale", 1e6)):
        other = screen.copy()
        other.X = log1p(counts, total)
        other.obs = pd.DataFrame({"guide": names}, index=screen.obs_names)
        other.write_h5ad(folder / f"{name}.h5ad")
    return folder


OTHERS = ["--perturbation-key", "guide", "--control", "DMSO", "--context", "type_0"]


def scored(folder: Path, out: Path, real: str, *flags: str) -> pd.DataFrame:
    files = ["--predicted", str(folder / "predicted.h5ad"), "--real", str(folder / f"{real}.h5ad")]
    words = ["evaluate", *files, "--train", str(folder / f"{real}.h5ad"), "--output", str(out), "--quiet", *flags]
    assert pertstate(words) == 0
    return pd.read_csv(out).set_index(["context", "perturbation", "method"])[list(METRICS)]


def test_names_of_others_change_no_score(folder, tmp_path):
    own = scored(folder, tmp_path / "own.csv", "screen")
    pd.testing.assert_frame_equal(scored(folder, tmp_path / "other.csv", "names", *OTHERS), own)
    assert np.isfinite(own.loc[("mean", "mean", "model")]).all()


def test_values_of_another_scale_are_converted_where_asked(folder, tmp_path, capsys):
    own = scored(folder, tmp_path / "own.csv", "screen")
    converted = scored(folder, tmp_path / "other.csv", "scale", *OTHERS, "--convert-scale")
    pd.testing.assert_frame_equal(converted, own, rtol=1e-3)
    capsys.readouterr()
    words = ["evaluate", "--predicted", str(folder / "predicted.h5ad"), "--real", str(folder / "scale.h5ad")]
    assert pertstate([*words, "--train", str(folder / "scale.h5ad"), "--quiet", *OTHERS]) == 1
    found = capsys.readouterr().err
    assert "log1p of 1,000,000 counts per cell, the model was trained on log1p of 10,000" in found
    assert "--convert-scale" in found and len(found.splitlines()) == 1


@pytest.mark.slow
def test_further_figures_where_asked(folder, tmp_path, capsys):
    scored(folder, tmp_path / "own.csv", "screen")
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "energy"
    words = ["--metrics", "all", "--scores", str(tmp_path / "scores")]
    scored(folder, tmp_path / "all.csv", "screen", *words)
    assert capsys.readouterr().out.splitlines()[0].split()[-len(FURTHER) :] == list(FURTHER)
    own, every = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("own", "all"))
    assert set(every) - set(own) == {name + end for name in COSTLY for end in ("", "_low", "_high")}
    pd.testing.assert_frame_equal(every[list(own)], own)
    model = every[every["method"] == "model"].set_index("perturbation")
    assert model.loc[["pert_0", "pert_1", "mean"], list(FURTHER)].notna().all(axis=None)
    text = render_report(Scores.load(tmp_path / "scores"), [], "A run")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert set(FURTHER) <= set(data["table"]["metrics"]) and ABOUT["mmd"] in text
    assert {row["metric"] for row in data["averages"]} >= set(FURTHER)


def test_fewer_cells_are_drawn_with_a_seed(folder):
    files = [folder / name for name in ("predicted.h5ad", "screen.h5ad", "screen.h5ad")]

    def controls_and_scores(**options):
        table = evaluate(*files, quiet=True, **options).table
        return table["control_cells"].unique().tolist(), table[list(METRICS)].to_numpy()

    cells, whole = controls_and_scores()
    assert cells == [24]
    cells, drawn = controls_and_scores(max_cells=10, seed=1)
    assert cells == [10] and not np.allclose(drawn, whole, equal_nan=True)
    np.testing.assert_array_equal(controls_and_scores(max_cells=10, seed=1)[1], drawn)
    assert not np.allclose(controls_and_scores(max_cells=10, seed=2)[1], drawn, equal_nan=True)
    np.testing.assert_allclose(controls_and_scores(max_cells=None)[1], whole, rtol=1e-5)


def test_a_further_group_takes_no_memory_for_its_cells(tmp_path):
    """Cells are read group by group, so that the largest group bounds what they take."""
    genes, cells, peaks = 1000, 100, []
    screen = simulate_screen(num_contexts=1, num_perturbations=40, num_genes=genes, cells_per_group=cells, seed=3)
    screen.X = log1p(screen.X.toarray(), 1e4)
    groups = screen.obs["perturbation"].astype(str)
    # The first call also imports and compiles. From 20 groups on, the cells that are kept for pictures are 1,000.
    for number in (1, 20, 40):
        kept = screen[groups.isin(["control", *(f"pert_{i}" for i in range(number))])]
        kept.write_h5ad(tmp_path / "real.h5ad")
        kept[kept.obs["perturbation"] != "control"].write_h5ad(tmp_path / "predicted.h5ad")
        tracemalloc.start()
        scores = evaluate(tmp_path / "predicted.h5ad", tmp_path / "real.h5ad", tmp_path / "real.h5ad", quiet=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(scores.groups) == number
    # The real cells and the predicted ones of the twenty further groups.
    assert peaks[2] - peaks[1] < 0.25 * 20 * 2 * cells * genes * 4, peaks
