"""What a cross-validation sets otherwise for each family."""

import json

import pandas as pd
import pytest

import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.training.family_settings import read_families, words_of_family
from pertstate.training.run import read_run
from pertstate.training.run_config import read_sections


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    screen = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=30, cells_per_group=16, seed=1)
    screen.write_h5ad(folder / "screen.h5ad")
    (folder / "run.yaml").write_text(
        f"data: {{datasets: {{s: {folder}/screen.h5ad}}, perturbation_key: perturbation, control: control, context_key: cell_type}}\n"
        "model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, set_size: 8}\n"
        f"training: {{output_dir: {folder}/out, max_steps: 2, learning_rate: 3.0e-4, use_cpu: true}}\n"
    )
    return folder / "run.yaml"


@pytest.fixture
def families(tmp_path):
    def written(text: str) -> str:
        (tmp_path / "families.yaml").write_text(text)
        return str(tmp_path / "families.yaml")

    return written


def test_another_family_has_its_own_model_section(run_file, families, tmp_path):
    text = (
        "state: {}\nstate-linear:\nstate-embed-sum:\n  model: {hidden_size: 8}\n"
        "  training: {learning_rate: 1e-3, lr_scheduler_type: linear}\n  data: {batch_key: 'no'}\n"
    )
    changes = read_families(families(text))
    assert list(changes) == ["state", "state-linear", "state-embed-sum"]
    flags = ["--max_steps", "5"]
    words = {
        name: words_of_family([str(run_file), *flags], "state", name, of, tmp_path / "runs")
        for name, of in changes.items()
    }
    assert words["state"] == [str(run_file), *flags, "--model_type", "state"]
    assert words["state-embed-sum"] == [str(tmp_path / "runs" / "state-embed-sum.yaml"), *flags]
    run = read_run(words["state-embed-sum"])
    assert run.model == {"set_size": 8, "hidden_size": 8, "model_type": "state-embed-sum"}
    assert (run.training["learning_rate"], run.training["max_steps"]) == (1e-3, 5) and run.data.batch_key == "no"
    assert run.data.context_key == "cell_type"
    assert read_run(words["state-linear"]).model == {"set_size": 8, "model_type": "state-linear"}
    # The same words again are the same; other settings are refused where runs may lie.
    again = words_of_family([str(run_file)], "state", "state-embed-sum", changes["state-embed-sum"], tmp_path / "runs")
    assert again[0] == words["state-embed-sum"][0]
    with pytest.raises(ValueError, match="other settings of state-embed-sum than now; name another folder"):
        words_of_family([str(run_file)], "state", "state-embed-sum", {}, tmp_path / "runs")


def test_a_run_file_that_is_written_again_is_read_as_the_same(run_file, families, tmp_path):
    text = "state:\n  data: {control: ['1', 1e-3, \"a: b\", yes, ~], control_sentences: false}\n  model: {dropout_rate: null}\n"
    changes = read_families(families(text))
    [path] = words_of_family([str(run_file)], "state", "state", changes["state"], tmp_path / "runs")
    found, before = read_sections(path), read_sections(str(run_file))
    of_file = found["data"]["control"]
    assert of_file == changes["state"]["data"]["control"]
    assert [type(word) for word in of_file] == [type(word) for word in changes["state"]["data"]["control"]]
    assert found["training"] == before["training"]
    assert found["model"] == before["model"] | {"dropout_rate": "null", "model_type": "state"}


def test_of_cells_the_settings_are_flags_before_those_of_the_command(tmp_path):
    changes = {"training": {"max_steps": 3}, "model": {"hidden_size": 8}}
    words = words_of_family(["s.h5ad", "--max_steps", "5"], "state", "state-cpa", changes, tmp_path)
    assert words == [
        *("s.h5ad", "--training.max_steps", "3", "--model.hidden_size", "8", "--max_steps", "5"),
        *("--model_type", "state-cpa"),
    ]


def test_a_cross_validation_of_a_run_file_and_a_file_of_families(run_file, families, tmp_path):
    file = families("state-linear: {data: {control_sentences: false}}\n")
    words = ["crossval", str(run_file), "--over", "contexts", "--families", file, "--jobs", "2"]
    assert pertstate.cli.main([*words, "-o", str(tmp_path / "cv")]) == 0
    table = pd.read_csv(tmp_path / "cv" / "results.csv")
    assert table["method"][0] == "state-linear"
    assert sorted(path.name for path in (tmp_path / "cv" / "runs").iterdir()) == ["state-linear", "state-linear.yaml"]
    config = json.loads(next((tmp_path / "cv" / "runs" / "state-linear").glob("*/config.json")).read_text())
    assert config["model_type"] == "state-linear"


@pytest.mark.parametrize(
    "text, error",
    [
        ("state-liner: {}", "state-liner: no family of models"),
        ("state: {modl: {hidden_size: 8}}", "state: expected the sections data, model, training, found modl|'modl'"),
        ("state: {model: 8}", "state: expected sections with `field: value` lines"),
        ("[state]", "expected `FAMILY: "),
    ],
)
def test_what_is_no_file_of_families_is_refused(families, text, error):
    with pytest.raises(ValueError, match=error):
        read_families(families(text))
