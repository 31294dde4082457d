"""Runs, their records and their scores: card, command and Python give the same figures, and leaks are reported."""

import dataclasses
import re
import shutil
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pytest

from pertstate.cli import main as pertstate
from pertstate.data import simulate_screen
from pertstate.data.record import RunRecord
from pertstate.evaluation.scores import Scores, against


CONFIG = """
data: {{datasets: {{screen: {folder}/screen.h5ad}}, test_contexts: [type_2]}}
model: {{preset: tiny, set_size: 12}}
training:
  {{output_dir: {folder}/run, max_steps: 20, save_steps: 10, per_device_train_batch_size: 4, learning_rate: 1.0e-3,
  disable_tqdm: true, use_cpu: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    screen = simulate_screen(num_contexts=3, num_perturbations=3, num_genes=40, cells_per_group=24, seed=1)
    screen.write_h5ad(folder / "screen.h5ad")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder


def train(folder: Path, *flags):
    return launches.run([launches.TRAIN, folder / "run.yaml", *flags])


def evaluated(out: Path, *words) -> Scores:
    assert pertstate(["evaluate", *map(str, words), "--scores", str(out), "--quiet"]) == 0
    return Scores.load(out)


def figures(scores: Scores) -> dict:
    table = scores.table.set_index(["context", "perturbation", "method"])
    return table[["pearson", "mae", "energy", "real_cells", "control_cells"]].to_dict("index")


def test_run_command_and_predictions_have_the_same_figures_to_the_digit(folder, tmp_path, capsys):
    own = Scores.load(folder / "run" / "scores")
    by_model = evaluated(tmp_path / "model", "--model", folder / "run", "--real", folder / "screen.h5ad")
    assert capsys.readouterr().out.splitlines()[-1] == by_model.verdict == own.verdict
    assert str(figures(by_model)) == str(figures(own))
    assert by_model.averages.equals(own.averages)
    # A file with only the held-out context, in another order of cells, gives the same experiment.
    screen = ad.read_h5ad(folder / "screen.h5ad")
    screen[screen.obs["cell_type"] == "type_2"][::-1].copy().write_h5ad(tmp_path / "part.h5ad")
    part = evaluated(tmp_path / "part", "--model", folder / "run", "--real", tmp_path / "part.h5ad")
    for key, found in figures(part).items():
        assert found == pytest.approx(figures(own)[key], abs=1e-5, nan_ok=True), key
    words = ["--model", folder / "run", "--adata", folder / "screen.h5ad", "--context", "type_2", "--quiet"]
    assert pertstate(["predict", *map(str, words), "--output", str(tmp_path / "p.h5ad")]) == 0
    words = ["--predicted", tmp_path / "p.h5ad", "--model", folder / "run", "--real", folder / "screen.h5ad"]
    for key, found in figures(evaluated(tmp_path / "predicted", *words)).items():
        assert found == pytest.approx(figures(own)[key], abs=1e-5, nan_ok=True), key
    card = (folder / "run" / "README.md").read_text()
    assert f"**{own.verdict}**" in card
    assert f"| model | {own.value('model', 'pearson'):.4f} [" in card


def test_the_record_says_what_was_trained_on(folder):
    record = RunRecord.load(folder / "run")
    assert {(g.context, g.split) for g in record.groups if g.perturbation != "control"} == {
        ("type_0", "train"),
        ("type_1", "train"),
        ("type_2", "test"),
    }
    assert sum(g.cells for g in record.of_split("train")) == len(record.hashes) == 2 * 3 * 24
    assert [key[1] for key in record.means.groups] == ["type_0"] * 4 + ["type_1"] * 4
    assert len(record.sources) == 1 and len(record.sources[0]["sha256"]) == 64
    assert str(folder) not in (folder / "run" / "record.json").read_text()


def test_groups_that_were_trained_on_are_marked_and_not_averaged(folder, tmp_path):
    model = ["--model", folder / "run", "--real", folder / "screen.h5ad"]
    scores = evaluated(tmp_path / "seen", *model, "--context", "type_0", "type_2")
    seen = scores.table.query("method == 'model'").set_index("context")["seen"]
    assert set(seen["type_0"]) == {"trained on"} and set(seen["type_2"]) == {""}
    assert set(scores.averages["groups"]) == {3}
    assert any("3 of 6 scored groups were seen in training" in note for note in scores.notes)
    alone = evaluated(tmp_path / "alone", *model, "--context", "type_0")
    assert alone.averages.empty and alone.verdict.startswith(
        "No verdict: no group is left that the model was not trained on"
    )
    asked = evaluated(tmp_path / "asked", *model, "--context", "type_0", "--include-seen")
    assert set(asked.averages["groups"]) == {3}


def test_cells_of_a_context_that_was_given_another_name_are_known_again(folder, tmp_path):
    screen = ad.read_h5ad(folder / "screen.h5ad")
    screen.obs_names = [f"AAC{i}-1" for i in range(screen.n_obs)]
    screen.write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    screen.obs["cell_type"] = screen.obs["cell_type"].astype(str).replace("type_0", "another")
    screen.write_h5ad(tmp_path / "other.h5ad")
    words = ["--model", tmp_path / "run", "--real", tmp_path / "other.h5ad", "--context", "another"]
    scores = evaluated(tmp_path / "scores", *words)
    assert set(scores.table.query("method == 'model'")["seen"]) == {"its cells were trained on"}


def test_a_checkpoint_trained_further_knows_what_came_before(folder, tmp_path):
    (tmp_path / "run.yaml").write_text(
        CONFIG.format(folder=folder)
        .replace("[type_2]", "[type_0]")
        .replace("preset: tiny, set_size: 12", f"pretrained: {folder}/run")
    )
    done = train(tmp_path, "--output_dir", tmp_path / "further")
    assert done.returncode == 0, done.stderr
    card, scores = (tmp_path / "further" / "README.md").read_text(), Scores.load(tmp_path / "further" / "scores")
    assert "`run` was trained on 3 of the held-out groups: `type_0 / pert_0`" in card
    assert set(scores.table.query("method == 'model'")["seen"]) == {"trained on by run"}
    assert scores.averages.empty and "No verdict" in card
    # The baselines know what the model was trained on, before and now.
    before, now = (RunRecord.load(place).means for place in (folder / "run", tmp_path / "further"))
    assert {key[1] for key in before.groups} == {"type_0", "type_1"} and {key[1] for key in now.groups} == {
        "type_0",
        "type_1",
        "type_2",
    }
    np.testing.assert_allclose(
        now.change(("screen", "type_0"), "pert_0"), before.change(("screen", "type_0"), "pert_0")
    )
    assert not [note for note in scores.notes if "baselines do not know" in note]
    again = evaluated(
        tmp_path / "scores", "--model", tmp_path / "further", "--real", folder / "screen.h5ad", "--context", "type_0"
    )
    np.testing.assert_equal(figures(again), figures(scores))


def test_another_run_is_not_continued(folder, tmp_path):
    """If a run with one held-out context could be resumed with another, cells that it saw would be called held out."""
    words = ["--resume_from_checkpoint", "last", "--max_steps", "25"]
    for flags, said in (
        (["--test_contexts", "type_1"], r"the groups and their splits differ: recorded .*type_1"),
        (["--learning_rate", "0.1"], "training.learning_rate differs: recorded 0.001, now 0.1"),
        (["--seed", "7"], "training.seed differs: recorded None, now 7"),
        (["--per_device_train_batch_size", "2"], "training.sentences_per_step differs: recorded 4, now 2"),
        (["--gradient_accumulation_steps", "2"], "training.sentences_per_step differs: recorded 4, now 8"),
    ):
        done = train(folder, *words, *flags)
        assert done.returncode == 1 and len(done.stderr.splitlines()[-1:]) == 1
        assert re.search(f"resume_from_checkpoint: .* is of another run: {said}", done.stderr), done.stderr
    # Half of the sentences, twice: the same step.
    same = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--output_dir", folder / "same"]
    done = train(folder, "--resume_from_checkpoint", folder / "run" / "checkpoint-10", *same)
    assert done.returncode == 0, done.stderr


def test_without_a_record_the_baselines_learn_from_named_cells_or_are_dashes(folder, tmp_path, capsys):
    words = ["--model", folder / "run", "--adata", folder / "screen.h5ad", "--context", "type_2", "--quiet"]
    assert pertstate(["predict", *map(str, words), "--output", str(tmp_path / "p.h5ad")]) == 0
    files = ["--predicted", tmp_path / "p.h5ad", "--real", folder / "screen.h5ad"]
    bare = evaluated(tmp_path / "bare", *files)
    assert set(bare.averages["method"]) == {"model", "no change", "ceiling"}
    assert any("name its checkpoint with --model, or the training cells with --train" in note for note in bare.notes)
    own = Scores.load(folder / "run" / "scores")
    named = evaluated(tmp_path / "named", *files, "--train", folder / "screen.h5ad")
    for method in ("perturbation mean", "log fold change", "half and half", "linear"):
        assert named.value(method, "energy") == pytest.approx(own.value(method, "energy"), abs=1e-5)
    capsys.readouterr()
    assert pertstate(["evaluate", "--real", str(folder / "screen.h5ad")]) == 1
    assert "name the predicted cells with --predicted, or the model" in capsys.readouterr().err


def test_a_merged_adapter_keeps_the_record(folder, tmp_path):
    (tmp_path / "run.yaml").write_text(
        CONFIG.format(folder=folder).replace("preset: tiny, set_size: 12", f"pretrained: {folder}/run")
    )
    done = train(tmp_path, "--output_dir", tmp_path / "adapter", "--lora_rank", "2")
    assert done.returncode == 0, done.stderr
    assert pertstate(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    record = RunRecord.load(tmp_path / "merged")
    assert record.to_dict() == RunRecord.load(tmp_path / "adapter").to_dict()
    assert [ancestor.name for ancestor in record.ancestors] == ["run"]
    # Its card is its own: a plain checkpoint, with what the adapter learned from, and the scores of the adapter.
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "made it from the adapter `adapter`, and its base model `run`." in card
    assert "load_adapter" not in card and "the adapter alone" not in card and "library_name: peft" not in card
    assert "AutoModel.from_pretrained(name" in card and "library_name: transformers" in card
    scores = Scores.load(tmp_path / "adapter" / "scores")
    assert f"**{scores.verdict}**" in card and "These are the scores of the adapter on its base model." in card
    assert f"SHA-256 `{record.sources[0]['sha256']}`" in card
    held = record.of_split("test")
    assert f"- test: {len(held)} groups: `{held[0].context} / {held[0].perturbation}`" in card
    assert "holds the arguments of that training" in card and str(tmp_path) not in card
    lines = card.partition("```python\n")[2].partition("```")[0].partition("# Or in one call")[0]
    lines = lines.replace("'merged'", repr(str(tmp_path / "merged"))).replace("controls.h5ad", f"{folder}/screen.h5ad")
    names: dict = {}
    exec(lines, names)
    assert names["predicted"].n_obs > 0


def test_two_models_are_compared_group_by_group(folder, tmp_path, capsys):
    other = launches.run(
        [launches.TRAIN, folder / "run.yaml", "--output_dir", tmp_path / "other", "--max_steps", "1", "--seed", "3"]
    )
    assert other.returncode == 0, other.stderr
    words = [
        "--model",
        folder / "run",
        "--real",
        folder / "screen.h5ad",
        "--against",
        tmp_path / "other",
        shutil.copytree(folder / "run", tmp_path / "copy"),
    ]
    scores = evaluated(tmp_path / "scores", *words)
    beside, itself = scores.notes[-2:]
    second = Scores.load(tmp_path / "other" / "scores")
    for metric, name in (
        ("pearson", "correlation of the mean change"),
        ("mae", "MAE of the mean"),
        ("energy", "energy distance"),
    ):
        difference = scores.value("model", metric) - second.value("model", metric)
        (said,) = re.findall(
            rf"In {name}: [a-z ]+ other \(([+-][\d.]+), 95 % interval ([+-][\d.]+) to ([+-][\d.]+)\)", beside
        )
        assert float(said[0]) == pytest.approx(difference, abs=6e-5)
        assert float(said[1]) <= float(said[0]) <= float(said[2])
    assert itself.count("not distinguishable from copy (+0.0000, 95 % interval +0.0000 to +0.0000)") == 3
    assert capsys.readouterr().err.count("Verdict on run, from 3 groups.") == 2
    # A file of predicted cells is the same model.
    predict = ["--model", tmp_path / "other", "--adata", folder / "screen.h5ad", "--context", "type_2", "--quiet"]
    assert pertstate(["predict", *map(str, predict), "--output", str(tmp_path / "p.h5ad")]) == 0
    words = ["--model", folder / "run", "--real", folder / "screen.h5ad", "--against", tmp_path / "p.h5ad"]
    assert evaluated(tmp_path / "files", *words).notes[-1].replace("p.h5ad", "other") == beside


def test_models_that_were_scored_on_other_groups_are_not_compared(folder):
    first = Scores.load(folder / "run" / "scores")
    with pytest.raises(ValueError, match="have no scored group in common"):
        against(first, first, ("a", "b"))
    other = dataclasses.replace(first, settings={**first.settings, "seed": 5})
    with pytest.raises(ValueError, match=r"scored in different ways \(seed: 0 and 5\)"):
        against(first, other, ("a", "b"))
