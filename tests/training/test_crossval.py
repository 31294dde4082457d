"""Cross-validation: folds, the runs of each, and their pooled scores."""

import json
import shutil
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest

import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.evaluation.metrics import METRICS, MODEL
from pertstate.evaluation.scores import Scores
from pertstate.training.crossval import RESULTS, TABLE, TEXT, folds_of
from pertstate.training.run import read_run


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    simulate_screen(num_contexts=2, num_perturbations=2, num_genes=30, cells_per_group=16, seed=1).write_h5ad(path)
    return path


def words(screen, output, *flags):
    small = ["--max_steps", "2", "--preset", "tiny", "--set_size", "8", "--use_cpu", "true", "--validation", "none"]
    return ["crossval", screen, "--over", "contexts", "-o", output, "--jobs", "2", *small, *flags]


def crossval(*words) -> int:
    return pertstate.cli.main([*map(str, words)])


@pytest.fixture(scope="module")
def done(screen, tmp_path_factory):
    output = tmp_path_factory.mktemp("crossval") / "cv"
    assert crossval(*words(screen, output, "--seeds", "2")) == 0
    return output


@pytest.mark.slow
def test_the_table_is_the_mean_of_what_each_run_says(done):
    runs = {path.name: Scores.load(path / "scores") for path in (done / "runs" / "state").iterdir()}
    assert sorted(runs) == [f"type_{fold}-seed{seed}" for fold in (0, 1) for seed in (0, 1)]
    table = pd.read_csv(done / TABLE, float_precision="round_trip").set_index(["method", "metric"])
    for metric in METRICS:
        of_runs = [scores.table.query("method == @MODEL")[metric].to_numpy() for scores in runs.values()]
        assert table.loc[("state", metric), "value"] == pytest.approx(np.mean(of_runs), abs=1e-12)
        # A baseline has no seed.
        of_folds = [
            runs[f"type_{fold}-seed0"].table.query("method == 'half and half'")[metric].to_numpy() for fold in (0, 1)
        ]
        assert table.loc[("half and half", metric), "value"] == pytest.approx(np.mean(of_folds), abs=1e-12)
        assert table.loc[("state", metric), "low"] < table.loc[("state", metric), "value"]
    results = json.loads((done / RESULTS).read_text())
    assert results["verdicts"]["state"].startswith("Verdict on state, from 4 groups.")
    assert list(results["folds"]) == ["type_0", "type_1"] and results["over"] == "contexts"
    text = (done / TEXT).read_text().splitlines()
    assert text[0] == "| | pearson | mae | energy | steps |"
    found = table.loc[("state", "mae")]
    mae = f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
    assert text[2].startswith("| **state** | ") and text[2].endswith(f" | {2} |") and f" | {mae} | " in text[2]
    assert [line.split(" | ")[0] for line in text[3:5]] == ["| no change", "| perturbation mean"]
    assert text[-1] == f"- {results['verdicts']['state']}"


def test_one_split_with_several_seeds(screen, tmp_path, capsys):
    """What the run holds out itself is the only fold."""
    flags = ["--over", "seeds", "--seeds", "2", "--families", "state,state-perturbation-mean"]
    output = tmp_path / "cv"
    assert crossval(*words(screen, output, *flags)) == 1
    assert "fold split holds out no cells for testing" in capsys.readouterr().err
    assert crossval(*words(screen, output, *flags, "--test_contexts", "type_1")) == 0
    folders = sorted(str(path.relative_to(output / "runs")) for path in (output / "runs").glob("*/*"))
    assert folders == ["state-perturbation-mean/split-seed0", "state/split-seed0", "state/split-seed1"]
    runs = [Scores.load(output / "runs" / folder / "scores") for folder in folders[1:]]
    table = pd.read_csv(output / TABLE, float_precision="round_trip").set_index(["method", "metric"])
    expected = np.mean([scores.value(MODEL, "mae") for scores in runs])
    assert table.loc[("state", "mae"), "value"] == pytest.approx(expected, abs=1e-12)
    lines = (output / TEXT).read_text().splitlines()
    assert lines[3].startswith("| **state-perturbation-mean** |") and lines[3].endswith(" |  |")  # it takes no step


def test_what_was_held_out_was_not_trained_on_and_the_seeds_differ(done):
    for fold in ("type_0", "type_1"):
        records = [
            json.loads((done / "runs" / "state" / f"{fold}-seed{seed}" / "record.json").read_text()) for seed in (0, 1)
        ]
        for record in records:
            split = record["groups"]["screen"][fold]
            assert "test" in split and "train" not in split
        one, two = (Scores.load(done / "runs" / "state" / f"{fold}-seed{seed}" / "scores") for seed in (0, 1))
        assert one.value(MODEL, "energy") != two.value(MODEL, "energy")


def test_a_family_that_is_fitted_is_said_to_have_one_seed(screen, tmp_path, capsys):
    flags = ["--families", "state-perturbation-mean", "--jobs", "2", "--use_cpu", "true"]
    assert crossval("crossval", screen, "--over", "contexts", "-o", tmp_path / "cv", *flags) == 0
    assert capsys.readouterr().out.startswith("state-perturbation-mean: mean of 1 seed\n")


@pytest.mark.parametrize(
    "families, page", [("state", "page.html"), ("state,state-perturbation-mean", "page-state.html")]
)
def test_a_page_that_is_there_is_not_replaced(screen, tmp_path, capsys, families, page):
    (tmp_path / page).write_text("mine")
    flags = ["--report", tmp_path / "page.html", "--families", families]
    assert crossval(*words(screen, tmp_path / "cv", *flags)) == 1
    said = capsys.readouterr().err
    assert f"{page} exists; move it away, or name another page" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [page] and (tmp_path / page).read_text() == "mine"


def test_a_page_that_cannot_be_written_is_said_before_the_runs(screen, tmp_path, capsys):
    assert crossval(*words(screen, tmp_path / "cv", "--report", tmp_path / "no" / "page.html")) == 1
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "cv").exists()


def test_a_report_of_the_pooled_scores(done, tmp_path):
    assert crossval("report", done / "scores" / "state", "-o", tmp_path / "report.html") == 0
    assert "Verdict on state, from 4 groups." in (tmp_path / "report.html").read_text()


def test_what_is_there_is_kept_and_what_is_missing_is_trained_to_the_same(screen, done, tmp_path, capsys):
    again = Path(shutil.copytree(done, tmp_path / "cv"))
    shutil.rmtree(again / "runs" / "state" / "type_1-seed0")
    (again / TABLE).unlink()
    assert crossval(*words(screen, again, "--seeds", "2")) == 0
    said = capsys.readouterr().err
    assert "3 of 4 runs are there already" in said and "4 of 4 runs: state, type_1, seed 0" in said
    assert (again / TABLE).read_bytes() == (done / TABLE).read_bytes()


def test_another_cross_validation_is_refused_with_what_differs(screen, done, tmp_path, capsys):
    def refused(*flags, cells=screen) -> str:
        assert crossval(*words(cells, done, *flags)) == 1
        return capsys.readouterr().err

    said = refused("--learning_rate", "0.1")
    assert "holds another cross-validation: words was " in said and '"0.1"' in said and "--overwrite" in said
    changed = ad.read_h5ad(screen)
    changed.obs["note"] = "other bytes"
    (tmp_path / "other").mkdir()
    changed.write_h5ad(tmp_path / "other" / "screen.h5ad")
    assert "sources was " in refused(cells=tmp_path / "other" / "screen.h5ad")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert crossval(*words(screen, tmp_path / "full")) == 1
    assert "is not empty and holds no cross-validation, found ['notes.txt']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--families", "state-liner"], "--families state-liner: no family of models; did you mean"),
        (["--seeds", "0"], "seeds=0: expected at least 1"),
        (["--over", "cells"], "--over cells: expected contexts, perturbations, seeds or FIELD=a,b,c"),
        (["--over", "test_contexts=type_0"], "expected two folds or more, found ['type_0']"),
        (["--over", "perturbations"], "expected two folds or more, found []"),
        (["--larning_rate", "1"], "unknown flag --larning_rate"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(screen, tmp_path, capsys, flags, error):
    assert crossval(*words(screen, tmp_path / "cv", *flags)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and (error in said or error.replace("did you mean", "expected") in said)
    assert not (tmp_path / "cv").exists()


def test_a_run_that_fails_ends_it_with_its_error(screen, tmp_path, capsys):
    assert crossval(*words(screen, tmp_path / "cv", "--num_attention_heads", "7", "--jobs", "1")) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("pertstate crossval: error: state, type_0, seed 0: ")


def test_a_field_takes_each_value_and_names_are_kept_whole(screen, tmp_path):
    run = read_run([str(screen)])
    folds = folds_of(run, "learning_rate=1e-3,1e-4", 5)
    assert [fold.flags for fold in folds] == [("--learning_rate", "1e-3"), ("--learning_rate", "1e-4")]
    adata = ad.read_h5ad(screen)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type_0": 'T, "CD8"'})
    adata.write_h5ad(tmp_path / "a.h5ad")
    folds = folds_of(read_run([str(tmp_path / "a.h5ad")]), "contexts", 5)
    held = read_run([str(tmp_path / "a.h5ad"), *folds[0].flags]).data.test_contexts
    assert held == [folds[0].name] == ['T, "CD8"']


def test_a_full_disk_leaves_no_folder(screen, tmp_path):
    code = "import resource, sys; from pertstate.cli import main\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); raise SystemExit(main(['crossval', *sys.argv[1:]]))"
    output = tmp_path / "cv"
    done = launches.run(["-c", code, *words(screen, output)[1:]])
    assert done.returncode == 1 and "cannot be written, nothing is left of it: " in done.stderr.splitlines()[-1]
    assert not output.exists()


def test_what_cannot_be_scored_is_said_before_anything_is_trained(screen, tmp_path, capsys):
    over = ["crossval", screen, "--over", "max_steps=1,2", "-o", tmp_path / "cv", "--preset", "tiny"]
    assert crossval(*over) == 1
    said = capsys.readouterr().err
    assert said.startswith("pertstate crossval: error: fold 1 holds out no cells for testing") and said.count("\n") == 1
    assert crossval(*over[:3], "learning_speed=1,2", *over[4:], "--test_contexts", "type_1") == 1
    assert "learning_speed" in capsys.readouterr().err and not (tmp_path / "cv").exists()


def test_combinations_are_held_out_in_parts(tmp_path):
    screen = simulate_screen(num_contexts=2, num_perturbations=3, num_genes=10, cells_per_group=6, seed=1)
    names = screen.obs["perturbation"].astype(str).to_numpy().copy()
    pairs = {"pert_0": "pert_1+pert_2"}
    half = np.arange(len(names)) % 2 == 0
    names[half] = [pairs.get(name, name) for name in names[half]]
    other = (np.arange(len(names)) % 4 == 1) & (names == "pert_1")
    names[other] = "pert_0+pert_2"
    screen.obs["perturbation"] = names
    screen.write_h5ad(tmp_path / "a.h5ad")
    folds = folds_of(read_run([str(tmp_path / "a.h5ad")]), "perturbations", 5)
    assert [fold.name for fold in folds] == ["part 1 of 2", "part 2 of 2"]
    held = [json.loads(fold.flags[1]) for fold in folds]
    assert held == [["pert_0+pert_2"], ["pert_1+pert_2"]]


@pytest.mark.slow
def test_families_side_by_side_and_a_kill_in_the_middle(screen, tmp_path):
    flags = ["--families", "state,state-linear", "--seeds", "1"]
    code = "import sys; from pertstate.cli import main; raise SystemExit(main(sys.argv[1:]))"
    process = launches.start(["-c", code, *map(str, words(screen, tmp_path / "killed", *flags))])
    for line in process.stderr:
        if "1 of 4 runs" in line:
            break
    process.kill()
    assert crossval(*words(screen, tmp_path / "killed", *flags)) == 0
    assert crossval(*words(screen, tmp_path / "whole", *flags)) == 0
    assert (tmp_path / "killed" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    table = pd.read_csv(tmp_path / "whole" / TABLE)
    assert list(table["method"].unique()[:1]) == ["state"] and "state-linear" in set(table["method"])
    assert (table["method"] == "half and half").sum() == len(METRICS)
