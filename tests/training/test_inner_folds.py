"""Which training groups are held out to choose the number of steps, and that nothing else chooses it."""

import json
import re

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest

from pertstate.base.constants import Split
from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.data.cells import Cells
from pertstate.data.record import RunRecord
from pertstate.evaluation.scores import Scores
from pertstate.training.inner_folds import inner_folds, with_fold


def table(rows: list[tuple[str, str, str, int]]) -> pd.DataFrame:
    """Groups of (context, perturbation, split, cells) in one dataset."""
    frame = pd.DataFrame(rows, columns=["context", "perturbation", "split", "cells"])
    frame.insert(0, "dataset", "d")
    frame["stop"] = frame["cells"].cumsum()
    frame["start"] = frame["stop"] - frame["cells"]
    return frame


def folds(rows, count=2):
    found = inner_folds(table(rows), "control", lambda name: [] if name == "control" else name.split("+"), count)
    return [(fold.name, {key[1:] for key in fold.groups}) for fold in found]


def of_contexts(sizes: dict[str, int], split: str = "train"):
    return [(context, name, split, cells) for context, cells in sizes.items() for name in ("a", "b")]


def test_with_contexts_held_out_for_the_test_contexts_are_held_out_in_turn():
    rows = of_contexts({"w": 10, "x": 40, "y": 20, "z": 30}) + of_contexts({"t": 5}, "test")
    assert folds(rows) == [("d/x", {("x", "a"), ("x", "b")}), ("d/y", {("y", "a"), ("y", "b")})]
    assert [name for name, _ in folds(rows, 9)] == ["d/w", "d/x", "d/y", "d/z"]
    assert [name for name, _ in folds(rows, 1)] == ["d/z"]


def test_without_a_test_split_contexts_are_held_out():
    assert [name for name, _ in folds(of_contexts({"x": 4, "y": 5}))] == ["d/x", "d/y"]


def test_a_single_context_leaves_nothing_to_hold_out():
    assert folds(of_contexts({"x": 4})) == []
    assert folds(of_contexts({"x": 4}) + [("x", "c", "test", 3)]) == []


def test_with_perturbations_held_out_combinations_of_known_parts_are_held_out():
    names = ["a", "b", "c", "a+b", "b+c", "a+d", "d", "e+f"]
    rows = [("x", name, "train", 4) for name in names] + [("x", "a+c", "test", 4)]
    assert folds(rows, 9) == [
        ("['a+b']", {("x", "a+b")}),
        ("['a+d']", {("x", "a+d")}),
        ("['b+c']", {("x", "b+c")}),
    ]
    assert len(folds(rows, 2)) == 2


def test_with_groups_held_out_groups_whose_perturbation_other_contexts_have_are_held_out():
    rows = [(context, name, "train", 4) for context in "xyz" for name in ("a", "b")]
    rows += [("x", "c", "train", 4), ("y", "c", "test", 4)]
    found = folds(rows, 9)
    assert [groups for _, groups in found] == [
        {("x", "a"), ("z", "b")},
        {("y", "a")},
        {("z", "a")},
        {("x", "b")},
        {("y", "b")},
    ]
    assert found[0][0] == "['a', 'b']"


def test_groups_that_the_run_holds_out_take_no_part_in_a_fold():
    rows = of_contexts({"x": 4, "y": 5}) + of_contexts({"v": 3}, "val") + of_contexts({"t": 3}, "test")
    rows += [(context, "control", "control", 6) for context in "xyvt"]
    groups = table(rows)
    fold = inner_folds(groups, "control", lambda name: [name], 2)[0]
    split = with_fold(Cells(None, None, groups), fold).groups.set_index(["context", "perturbation"])["split"]
    assert split["x"].to_dict() == {"a": Split.VAL, "b": Split.VAL, "control": Split.CONTROL}
    assert split["y"].to_dict() == {"a": Split.TRAIN, "b": Split.TRAIN, "control": Split.CONTROL}
    for context in "vt":
        assert split[context].to_dict() == {"a": Split.UNUSED, "b": Split.UNUSED, "control": Split.CONTROL}
    assert set(groups["split"]) == {"train", "val", "test", "control"}  # the run's own are as they were


CONFIG = """
data: {{datasets: {{screen: {data}}}, test_contexts: [type_3]}}
model: {{preset: tiny, set_size: 12, residual: anchor}}
training:
  {{output_dir: {folder}/run, max_steps: 32, inner_folds: 2, average_decay: 0.9, per_device_train_batch_size: 4,
  learning_rate: 1.0e-3, save_steps: 1, disable_tqdm: true, use_cpu: true}}
"""


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inner")
    made = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=24, seed=1)
    made.write_h5ad(folder / "screen.h5ad")
    return folder / "screen.h5ad"


def train(folder, data, *flags):
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, data=data))
    done = launches.run([launches.TRAIN, folder / "run.yaml", *flags])
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def chosen(folder) -> tuple[int, int]:
    saved = json.loads((folder / "run" / "training_args.json").read_text())
    return saved["max_steps"], saved["schedule_steps"]


def test_a_run_takes_the_steps_that_are_best_on_held_out_training_groups(screen, tmp_path, capsys):
    printed = train(tmp_path, screen)
    held = re.findall(r"with screen/\S+ held out: (.*)", printed)
    assert len(held) == printed.count("of the training groups is held out") == 2
    ratios: dict[int, list[float]] = {}
    for line in held:
        for ratio, step in re.findall(r"([\d.]+) after (\d+) steps", line):
            ratios.setdefault(int(step), []).append(float(ratio))
    assert sorted(ratios) == [0, 2, 4, 8, 16, 32]
    steps, schedule = chosen(tmp_path)
    assert schedule == 32
    best = min(sum(of) for of in ratios.values())
    assert sum(ratios[steps]) == pytest.approx(best, abs=2e-3)  # to the digits that are printed
    assert f"inner_folds: {steps} of 32 steps" in printed

    # The groups that were held out also say how far predictions may be from what is measured.
    intervals = RunRecord.load(tmp_path / "run").intervals
    assert intervals.groups == 6 and len(intervals.spread) == 40 and intervals.factor > 0
    words = ["--model", tmp_path / "run", "--adata", screen, "--context", "type_3", "--quiet"]
    assert pertstate(["predict", *map(str, words), "--summary", str(tmp_path / "summary.parquet")]) == 0
    table = pd.read_parquet(tmp_path / "summary.parquet")
    cells = table["cells"].to_numpy().reshape(3, 40)[:, 0]
    low, high = intervals.around(table["change"].to_numpy().reshape(3, 40), cells, cells)
    np.testing.assert_allclose(table["calibrated_low"], low.ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["calibrated_high"], high.ravel(), rtol=1e-5, atol=1e-6)
    error = np.repeat(intervals.expected_mae(table["change"].to_numpy().reshape(3, 40), cells, cells), 40)
    np.testing.assert_allclose(table["expected_mae"], error, rtol=1e-5)

    # So the scores say which error was expected, those of the run and those of `evaluate`.
    scores = Scores.load(tmp_path / "run" / "scores")
    of_model = scores.table[scores.table["method"] == "model"]
    changes = scores.changes["predicted"] - scores.changes["control"]
    expected = intervals.expected_mae(changes, of_model["real_cells"], of_model["control_cells"])
    np.testing.assert_allclose(of_model["expected_mae"], expected, rtol=1e-5)
    assert "Expected error: the MAE that the run expects, from training groups that it held out," in scores.verdict
    written = json.loads((tmp_path / "run" / "scores" / "scores.json").read_text())["expected_error"]
    assert written["groups"] == 3 and written["mae"] == pytest.approx(of_model["mae"].mean())
    assert written["error"] == pytest.approx((of_model["mae"] - of_model["expected_mae"]).abs().mean())
    words = ["--model", tmp_path / "run", "--real", screen, "--context", "type_3", "--quiet"]
    capsys.readouterr()
    assert pertstate(["evaluate", *map(str, words)]) == 0
    assert scores.verdict[scores.verdict.index("Expected error") :] in capsys.readouterr().out

    # A run that is continued keeps to what it chose.
    (tmp_path / "run" / "model.safetensors").unlink()
    if steps:
        again = train(tmp_path, screen, "--resume_from_checkpoint", "last")
        assert "groups is held out" not in again
        assert chosen(tmp_path) == (steps, schedule)
        assert RunRecord.load(tmp_path / "run").intervals.factor == intervals.factor


def test_test_cells_choose_nothing(screen, tmp_path):
    adata = ad.read_h5ad(screen)
    test = ((adata.obs["cell_type"] == "type_3") & (adata.obs["perturbation"] != "control")).to_numpy()
    values = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X.copy()
    values[test] = values[test][:, ::-1]
    adata.X = values
    adata.write_h5ad(tmp_path / "other.h5ad")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    printed = [train(tmp_path / "one", screen), train(tmp_path / "two", tmp_path / "other.h5ad")]
    lines = [[line for line in text.splitlines() if re.match(r"with screen/\S+ held out: ", line)] for text in printed]
    # The data set is named by its key in both runs.
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert chosen(tmp_path / "one") == chosen(tmp_path / "two")


def test_where_nothing_can_be_held_out_a_part_of_the_steps_is_taken_and_said(screen, tmp_path):
    printed = train(tmp_path, screen, "--contexts", "[type_0, type_3]")
    assert "no training groups can be held out as the test groups are, so 8 of 32 steps are taken" in printed
    assert chosen(tmp_path) == (8, 32)
