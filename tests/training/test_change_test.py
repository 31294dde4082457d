"""Which perturbations differ from their controls by more than chance, in simulated cells and in a whole run."""

import json

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pertstate.base.constants import Split
from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.data.cells import Cells
from pertstate.data.record import RunRecord
from pertstate.evaluation.scores import Scores
from pertstate.training.change_test import adjusted, change_tests, describe_tests, pearson3_tail


GENES = 30


def cells_of(groups: list[tuple], shift, seed: int) -> Cells:
    """Cells of (context, perturbation, split, batch, cells), of mean `shift(context, perturbation, batch)` and correlated genes."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(5, GENES))
    rows, parts, start = [], [], 0
    for context, name, split, batch, number in groups:
        noise = generator.normal(size=(number, GENES)) + generator.normal(size=(number, 5)) @ mixing
        parts.append(noise + shift(context, name, batch))
        rows.append(("d", context, name, batch, split, start, start + number))
        start += number
    columns = ["dataset", "context", "perturbation", "batch", "split", "start", "stop"]
    return Cells(np.concatenate(parts).astype(np.float32), None, pd.DataFrame(rows, columns=columns))


def screen(names: list[str], seed: int = 0, shift=lambda context, name, batch: 0.0, batches=("",)) -> Cells:
    groups = [
        (context, name, Split.CONTROL if name == "control" else Split.TRAIN, batch, 60 if name == "control" else 25)
        for context in ("x", "y")
        for name in ("control", *names)
        for batch in batches
    ]
    cells = cells_of(groups, shift, seed)
    if batches == ("",):
        cells.groups = cells.groups.drop(columns="batch")
    return cells


def test_perturbations_that_do_nothing_have_uniform_p_values():
    names = [f"p{i}" for i in range(150)]
    cells = screen(names)
    p = np.array([*change_tests(cells, cells.features, "control").values()])
    assert len(p) == 150
    assert 0.4 < p.mean() < 0.6 and (p < 0.05).mean() < 0.1 and 0.35 < (p < 0.5).mean() < 0.65


def test_real_changes_are_found_among_many_null_ones():
    names, real = [f"p{i}" for i in range(60)], ("p3", "p17", "p41")
    change = np.random.default_rng(9).normal(size=GENES)
    cells = screen(names, shift=lambda context, name, batch: change * (name in real))
    found = adjusted(change_tests(cells, cells.features, "control"))
    assert sorted(found, key=lambda name: found[name])[:3] == sorted(real, key=lambda name: found[name])
    assert all(found[name] < 1e-3 for name in real)
    assert sum(p <= 0.05 for name, p in found.items() if name not in real) <= 1


def test_changes_that_point_to_opposite_sides_in_two_contexts_are_no_mean_change():
    change = np.full(GENES, 1.5)
    for sign, told in ((-1, False), (1, True)):
        cells = screen(["p"], shift=lambda c, name, b, sign=sign: change * (name == "p") * (sign if c == "y" else 1))
        assert (change_tests(cells, cells.features, "control")["p"] < 0.001) is told


def test_a_difference_between_batches_is_no_change():
    groups = [
        ("x", name, Split.CONTROL if name == "control" else Split.TRAIN, batch, number)
        for name, batch, number in (
            ("control", "a", 80),
            ("control", "b", 20),
            ("p", "a", 10),
            ("p", "b", 60),
            ("q", "c", 40),
        )
    ]
    cells = cells_of(groups, lambda context, name, batch: 2.0 * (batch == "b"), seed=4)
    within = change_tests(cells, cells.features, "control")
    assert within["p"] > 0.01
    assert set(within) == {"p", "q"}  # q has no batch with controls, and is compared with all of them
    cells.groups = cells.groups.drop(columns="batch")
    assert change_tests(cells, cells.features, "control")["p"] < 1e-6


def test_only_training_cells_are_looked_at():
    change = np.full(GENES, 3.0)
    groups = [
        ("x", "control", Split.CONTROL, "", 50),
        ("x", "p", Split.TRAIN, "", 30),
        ("y", "control", Split.CONTROL, "", 50),
    ]
    groups += [("y", "p", Split.TEST, "", 30), ("y", "q", Split.TEST, "", 30), ("z", "r", Split.TRAIN, "", 30)]
    cells = cells_of(groups, lambda context, name, batch: change * (context == "y" and name != "control"), seed=1)
    found = change_tests(cells, cells.features, "control")
    assert set(found) == {"p"} and found["p"] > 0.01


def test_processes_share_the_perturbations():
    cells = screen(["a", "b", "c"])
    shares = [change_tests(cells, cells.features, "control", part, 2) for part in (0, 1)]
    assert [set(share) for share in shares] == [{"a", "c"}, {"b"}]
    assert shares[0] | shares[1] == change_tests(cells, cells.features, "control")


def test_the_tail_and_the_adjustment_are_those_of_scipy():
    for value in (-5.0, -1.0, 0.0, 0.3, 2.0, 30.0):
        for skewness in (0.01, 0.5, 1.0, 2.0, 7.0):
            np.testing.assert_allclose(pearson3_tail(value, skewness), stats.pearson3.sf(value, skewness), rtol=1e-9)
    p_values = np.random.default_rng(0).random(40) ** 3
    expected = stats.false_discovery_control(p_values)
    found = adjusted({str(i): p for i, p in enumerate(p_values)})
    np.testing.assert_allclose([*found.values()], expected, rtol=5e-3)


def test_p_values_are_adjusted_for_their_number():
    assert adjusted({"a": 0.01, "b": 0.02, "c": 0.9, "d": 0.04}) == {"a": 0.04, "b": 0.04, "c": 0.9, "d": 0.0533}
    assert adjusted({}) == {}


def test_the_log_names_a_few():
    assert describe_tests({"a": 0.001, "b": 0.8, "c": 0.0001}) == (
        "2 of 3 perturbations changed in training by more than chance explains: ['c', 'a']; predictions of the others may be "
        "noise: ['b']"
    )
    assert describe_tests({"a": 0.2}).startswith(
        "0 of 1 perturbation changed in training by more than chance explains; predictions"
    )


CONFIG = """
data: {{datasets: {{screen: {folder}/screen.h5ad}}, test_contexts: [type_2]}}
model: {{preset: tiny, set_size: 12}}
training:
  {{output_dir: {folder}/run, max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true, use_cpu: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    cells = simulate_screen(num_contexts=3, num_perturbations=3, num_genes=40, cells_per_group=40, effect=3.0, seed=0)
    # Every second control cell is said to be perturbed by something that does nothing.
    controls = np.flatnonzero((cells.obs["perturbation"] == "control").to_numpy())
    names = cells.obs["perturbation"].astype(str).to_numpy()
    names[controls[::2]] = "sham"
    cells.obs["perturbation"] = names
    cells.write_h5ad(folder / "screen.h5ad")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def test_a_run_says_which_perturbations_can_be_trusted(folder, tmp_path, caplog):
    done = launches.run([launches.TRAIN, folder / "run.yaml"])
    assert done.returncode == 0, done.stderr
    assert "3 of 4 perturbations changed in training by more than chance explains: [" in done.stderr
    assert "predictions of the others may be noise: ['sham']" in done.stderr
    tests = RunRecord.load(folder / "run").change_tests
    assert tests["sham"] > 0.05 and all(tests[f"pert_{i}"] < 1e-3 for i in range(3))
    card = " ".join((folder / "run" / "README.md").read_text().split())
    assert "Of 4 perturbations in the training cells, 3 have a mean change that is distinguishable from none" in card
    assert "Predictions of these may be noise: `sham`." in card
    note = "the training cells do not tell the change of 1 of 4 scored perturbations from none: ['sham']"
    assert note in Scores.load(folder / "run" / "scores").notes and f"note: {note}" in done.stderr

    words = ["predict", "--model", folder / "run", "--adata", folder / "screen.h5ad", "--context", "type_2", "--quiet"]
    for perturbations, told in ((["sham", "pert_0"], ["sham"]), (["pert_1+sham"], ["sham"]), (["pert_1"], [])):
        output = tmp_path / f"{'_'.join(perturbations)}.h5ad"
        caplog.clear()
        asked = [*words, "--output", output, "--perturbation", *perturbations]
        assert pertstate([str(word) for word in asked]) == 0
        line = "the change in training of 1 perturbation is not distinguishable from none"
        assert (line in caplog.text) is bool(told)
        assert json.loads(ad.read_h5ad(output).uns["pertstate"]["indistinguishable"]) == told


def test_a_run_that_goes_on_from_a_checkpoint_keeps_what_that_one_tested(folder, tmp_path):
    cells = ad.read_h5ad(folder / "screen.h5ad")
    cells[~cells.obs["perturbation"].isin(["sham", "pert_0"])].copy().write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "run.yaml").write_text(
        CONFIG.format(folder=tmp_path).replace("preset: tiny, set_size: 12", f"pretrained: {folder}/run")
    )
    done = launches.run([launches.TRAIN, tmp_path / "run.yaml"])
    assert done.returncode == 0, done.stderr
    assert "2 of 2 perturbations changed in training" in done.stderr
    before, after = (RunRecord.load(place / "run").change_tests for place in (folder, tmp_path))
    assert after["sham"] == before["sham"] and set(after) == set(before)
