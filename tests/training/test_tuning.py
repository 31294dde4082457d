"""Settings are chosen on held-out training groups, and test cells have no part in it."""

import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.scores import Scores
from pertstate.training.run import read_run
from pertstate.training.tuning import inner_folds_of, settings_of, space_of


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    adata = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=30, cells_per_group=16, seed=1)
    adata.write_h5ad(path)
    return path


def tune(*words) -> int:
    return pertstate.cli.main(["tune", *map(str, words)])


SMALL = ["--max_steps", "2", "--set_size", "8", "--preset", "tiny", "--use_cpu", "true", "--validation", "none"]


def search(screen, output, *words, grid="learning_rate=1e-9,0.01") -> int:
    """A search on the training groups of a screen, whose last cell type is held out."""
    return tune(screen, "--test_contexts", "type_2", "--grid", grid, "-o", output, "--jobs", "2", *SMALL, *words)


@pytest.fixture(scope="module")
def done(screen, tmp_path_factory):
    output = tmp_path_factory.mktemp("tune") / "search"
    assert search(screen, output) == 0
    return output


def test_the_best_setting_has_the_lowest_mean_of_its_runs(done):
    table = pd.read_csv(done / "results.csv", float_precision="round_trip")
    for row in table.itertuples():
        name = next(
            path.name for path in (done / "runs").iterdir() if float(path.name.split("-", 1)[1]) == row.learning_rate
        )
        runs = [Scores.load(path / "scores") for path in (done / "runs" / name).iterdir()]
        assert len(runs) == 2
        of = [run.table.loc[run.table["method"] == MODEL, "energy"].to_numpy() for run in runs]
        assert row.energy == pytest.approx(np.mean(of), abs=1e-12) and row.energy_low < row.energy < row.energy_high
    assert table["energy"].is_monotonic_increasing
    best = json.loads((done / "results.json").read_text())["best"]
    assert float(best["learning_rate"]) == table["learning_rate"][0]


def test_test_contexts_are_not_read(screen, done, tmp_path):
    """Other values in the test cells change nothing."""
    for record in (done / "runs").rglob("record.json"):
        assert sorted(json.loads(record.read_text())["groups"]["screen"]) == ["type_0", "type_1"]
    changed = ad.read_h5ad(screen)
    test = (changed.obs["cell_type"] == "type_2").to_numpy()
    values = changed.X.toarray() if hasattr(changed.X, "toarray") else np.array(changed.X)
    values[test] = 0
    values[test, 0] = 3
    changed.X = values
    (tmp_path / "other").mkdir()
    changed.write_h5ad(tmp_path / "other" / "screen.h5ad")
    assert search(tmp_path / "other" / "screen.h5ad", tmp_path / "search") == 0
    assert (tmp_path / "search" / "results.csv").read_bytes() == (done / "results.csv").read_bytes()


def test_it_ends_with_the_command_that_trains_and_goes_on_where_it_was(screen, done, capsys):
    assert search(screen, done) == 0
    found = capsys.readouterr()
    assert "4 of 4 runs are there already" in found.err
    best = json.loads((done / "results.json").read_text())["best"]["learning_rate"]
    assert found.out.splitlines()[-1] == (
        f"pertstate train {screen} --test_contexts type_2 {' '.join(SMALL)} --learning_rate {best}"
    )
    assert search(screen, done, "--learning_rate", "1") == 1
    assert "holds another search for settings: words was " in capsys.readouterr().err


def test_perturbations_are_held_out_in_parts_of_the_others(tmp_path):
    adata = simulate_screen(num_contexts=1, num_perturbations=3, num_genes=20, cells_per_group=6, seed=0)
    names = adata.obs["perturbation"].astype(str).to_numpy().copy()
    perturbed = np.flatnonzero(names != "control")
    singles = sorted(set(names[perturbed]))
    both = ["+".join(pair) for pair in ((singles[0], singles[1]), (singles[0], singles[2]), (singles[1], singles[2]))]
    for i, name in enumerate(both):
        names[perturbed[i::9][:2]] = name
    adata.obs["perturbation"] = names
    adata.write_h5ad(tmp_path / "a.h5ad")
    run = read_run([str(tmp_path / "a.h5ad"), "--test_perturbations", json.dumps(both[:1])])
    folds = inner_folds_of(run, 5)
    assert [fold.flags[1] for fold in folds] == [json.dumps([both[1], both[0]]), json.dumps([both[2], both[0]])]


@pytest.mark.slow
@pytest.mark.optuna
def test_trials_are_suggested_and_a_search_goes_on_to_more(screen, tmp_path, capsys):
    """A search of two trials that goes on to three has tried what a search of three tries, and trains one setting more."""
    grid = "learning_rate=1e-5..1e-1:log"
    assert search(screen, tmp_path / "a", "--trials", "2", grid=grid) == 0
    first = pd.read_csv(tmp_path / "a" / "results.csv", dtype={"learning_rate": str})
    rates = first["learning_rate"].astype(float)
    assert (
        len(first) == rates.nunique() == 2
        and rates.between(1e-5, 1e-1).all()
        and first["energy"].is_monotonic_increasing
    )
    capsys.readouterr()
    assert search(screen, tmp_path / "a", "--trials", "3", grid=grid) == 0
    said = capsys.readouterr()
    assert said.err.count("2 of 2 runs are there already") == 2 and said.err.count("2 of 2 runs: ") == 1
    both = pd.read_csv(tmp_path / "a" / "results.csv", dtype={"learning_rate": str})
    assert set(first["learning_rate"]) < set(both["learning_rate"]) and len(both) == 3
    assert said.out.splitlines()[-1].endswith(f"--learning_rate {both['learning_rate'][0]}")
    for record in (tmp_path / "a" / "runs").rglob("record.json"):
        assert sorted(json.loads(record.read_text())["groups"]["screen"]) == ["type_0", "type_1"]


def test_trials_without_optuna_are_refused_before_data_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune(tmp_path / "gone.h5ad", "--grid", "preset=tiny,mini", "--trials", "2", "-o", tmp_path / "search") == 1
    assert capsys.readouterr().err == ("pertstate tune: error: --trials needs optuna: pip install 'pertstate[tune]'\n")


def test_every_combination_of_the_grid():
    assert settings_of(space_of(["a=1,2", "b=x,y"])) == [
        {"a": "1", "b": "x"},
        {"a": "1", "b": "y"},
        {"a": "2", "b": "x"},
        {"a": "2", "b": "y"},
    ]


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--grid", "preset"], "--grid preset: expected FIELD=a,b,c"),
        (["--grid", "preset=tiny"], "--grid: expected two settings or more, found 1"),
        (["--grid", "seed=1,2"], "seed says what is trained on or where it goes, and is not chosen by scores"),
        (["--grid", "larning_rate=1,2"], "unknown flag --larning_rate"),
        (["--grid", "preset=tiny,mini", "--grid", "preset=a,b"], "preset has values already"),
        (["--grid", "learning_rate=1e-5..1e-3:log"], "learning_rate is a range, of which --trials N tries values"),
        (["--grid", "learning_rate=1e-3..1e-5"], "learning_rate=1e-3..1e-5: expected LOW..HIGH or LOW..HIGH:log"),
        (["--grid", "learning_rate=0..1:log"], "two numbers of which the first is smaller (and positive with :log)"),
        (["--grid", "preset=tiny,mini", "--trials", "0"], "trials=0: expected at least 1"),
        (["--grid", "preset=tiny,mini", "--val_contexts", "type_0"], "found val_contexts or val_perturbations"),
        (["--grid", "preset=tiny,mini", "--test_contexts", "[type_0, type_1]"], "found ['type_2']; hold out less"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(screen, tmp_path, capsys, flags, error):
    assert tune(screen, "-o", tmp_path / "search", *flags) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and error in said
    assert not (tmp_path / "search").exists()
