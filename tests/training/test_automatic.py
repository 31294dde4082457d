"""What a run decides by itself, and what it leaves to whoever wrote it."""

import json

import launches
import numpy as np
import pytest

from pertstate.data import simulate_screen
from pertstate.training.automatic import ANCHORED, AUTO, settled, with_defaults
from pertstate.training.run import read_run


DATA = "data: {datasets: {screen: screen.h5ad}}\n"


def run_of(tmp_path, text: str, *flags: str):
    (tmp_path / "run.yaml").write_text(DATA + text)
    return read_run([str(tmp_path / "run.yaml"), *flags])


def test_a_run_without_a_model_section_starts_from_an_anchor_and_is_sized_by_its_data(tmp_path):
    run = run_of(tmp_path, "")
    assert run.model == {"residual": "anchor", "preset": AUTO, "set_size": AUTO}
    assert run.training == {**ANCHORED, "max_steps": AUTO}


def test_the_family_and_the_size_of_a_sentence_are_no_choice_of_a_model(tmp_path):
    """`--model_type state` gives the model that a run without a model section has; so crossval compares it with other families."""
    plain = run_of(tmp_path, "")
    named = run_of(tmp_path, "", "--model_type", "state")
    assert named.training == plain.training
    assert named.model == {**plain.model, "model_type": "state"}
    sized = run_of(tmp_path, "model: {set_size: 9}\n")
    assert sized.model == {**plain.model, "set_size": 9} and sized.training == plain.training


def test_what_a_run_sets_stays(tmp_path):
    given = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "average_decay": None, "max_steps": 7}
    text = f"model: {{preset: small, residual: output, set_size: 9}}\ntraining: {json.dumps(given)}\n"
    run = run_of(tmp_path, text)
    assert run.model == {"preset": "small", "residual": "output", "set_size": 9}
    assert run.training == given
    assert settled(run, np.array([50]), False) == (run, None)
    by_width = run_of(tmp_path, "model: {hidden_size: 64}\n")
    assert by_width.model == {"hidden_size": 64}


@pytest.mark.parametrize("model", ["{model_type: state-embed-sum}", "{model_type: state-linear}"])
def test_other_families_keep_their_own_defaults(tmp_path, model):
    run = run_of(tmp_path, f"model: {model}\n")
    assert set(run.model) == {"model_type"} and "max_steps" not in run.training
    assert with_defaults(run) == run


@pytest.mark.parametrize(
    "cells, set_size, steps",
    [
        ([20, 20, 20], 32, 400),  # the smallest
        ([100, 130, 400], 64, 400),
        ([300] * 100, 128, 586),  # 20 epochs of 30,000 cells in steps of 8 x 128
        ([5000] * 1000, 128, 4000),  # the largest
    ],
)
def test_sizes_follow_the_training_groups(tmp_path, cells, set_size, steps):
    run, words = settled(run_of(tmp_path, "training: {use_cpu: true}\n"), np.array(cells), has_validation=False)
    assert run.model == {"residual": "anchor", "preset": "mini", "set_size": set_size}
    assert (run.training["max_steps"], run.training["inner_folds"]) == (steps, 2)
    assert words.startswith(
        f"preset mini, sentences of {set_size} cells, up to {steps} steps: chosen for {sum(cells):,} "
    )


def test_validation_data_choose_instead_of_inner_folds(tmp_path):
    run, words = settled(run_of(tmp_path, ""), np.array([40, 40]), has_validation=True)
    assert "inner_folds" not in run.training
    assert ", 400 steps: chosen for 80 training cells" in words


def test_auto_can_be_written_and_means_nothing_elsewhere(tmp_path):
    run = run_of(tmp_path, "model: {preset: auto, set_size: 40}\n", "--max_steps", "auto")
    found, _ = settled(run, np.array([40]), False)
    assert (found.model["preset"] in ("mini", "small"), found.model["set_size"]) == (True, 40)
    other = run_of(tmp_path, "model: {model_type: state-embed-sum, preset: auto}\n")
    found, said = settled(other, np.array([40]), False)
    assert found.model["preset"] in ("tiny", "published") and f"preset {found.model['preset']}" in said
    found.model |= {"preset": "auto", "pretrained": "owner/name"}
    with pytest.raises(ValueError, match="preset: auto is for a new model of a family that has presets; leave it out"):
        settled(found, np.array([40]), False)


def test_what_was_chosen_is_said_and_kept_with_the_checkpoint(tmp_path):
    screen = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=30, cells_per_group=12, seed=1)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "run.yaml").write_text(
        f"data: {{datasets: {{screen: {tmp_path}/screen.h5ad}}, test_contexts: [type_2]}}\n"
    )
    words = [
        "--output_dir",
        tmp_path / "run",
        "--residual",
        "anchor",
        "--preset",
        "tiny",
        "--max_steps",
        "4",
        "--inner_folds",
        "1",
        "--use_cpu",
        "true",
    ]
    done = launches.run([launches.TRAIN, tmp_path / "run.yaml", *words])
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert (saved["average_decay"], saved["learning_rate"]) == (0.98, 3e-4)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["residual"] == "anchor"
    assert (
        f"inner_folds: {saved['max_steps']} of 4 steps, chosen on held-out training groups" in done.stdout + done.stderr
    )
    assert "better than" in done.stdout + done.stderr or "not distinguishable from" in done.stdout + done.stderr
