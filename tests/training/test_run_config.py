"""A run as one YAML file with flags on top, and what its words mean."""

import dataclasses
import re
from typing import Any

import pytest

from pertstate.data.arguments import DataArguments
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.run_config import load_run_config, parse_flags


TRAINING = {"learning_rate": float, "max_steps": int, "output_dir": Any, "seed": int, "save_strategy": str}


def MODEL(section: dict) -> dict:
    return {"model_type": str, "hidden_size": int, "residual": str, "seed": int}


def run(tmp_path, text: str, *flags: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_config(str(path), list(flags), MODEL, TRAINING)


YAML = """
data: {datasets: {kang: kang.h5ad}, test_contexts: [NK], genes: 2000}
model:
  preset: tiny
  hidden_size: 64
training:
  learning_rate: 1e-4
  max_steps: 10
"""


def test_flags_win_over_the_file(tmp_path):
    plain = run(tmp_path, YAML)
    assert plain.data == DataArguments(datasets={"kang": "kang.h5ad"}, test_contexts=["NK"], genes=2000)
    assert plain.model == {"preset": "tiny", "hidden_size": 64}
    assert plain.training == {"learning_rate": 1e-4, "max_steps": 10}

    flags = ["--test_contexts", "CD4 T", "B", "--learning_rate=3e-4", "--model.hidden_size", "128", "--genes", "null"]
    flagged = run(tmp_path, YAML, *flags, "--max-steps", "7", "--hvg_on_all", "--training.output_dir", "runs/a=b")
    assert (
        flagged.data.test_contexts == ["CD4 T", "B"] and flagged.data.genes is None and flagged.data.hvg_on_all is True
    )
    assert flagged.model == {"preset": "tiny", "hidden_size": 128}
    assert flagged.training == {"learning_rate": 3e-4, "max_steps": 7, "output_dir": "runs/a=b"}


@pytest.mark.parametrize(
    "word, value",
    [
        ("1e-4", 1e-4),
        ("-2.5E3", -2500.0),
        (".5", 0.5),
        ("12", 12),
        ("-3", -3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("a: b", "a: b"),
        ("|", "|"),
        ("#1", "#1"),
        ("-", "-"),
        ("'true'", "true"),
        ('"12"', "12"),
        ("[1e-3, x]", [1e-3, "x"]),
        ("{a: 1}", {"a": 1}),
        ("[unclosed", "[unclosed"),
    ],
)
def test_values_are_what_they_look_like(tmp_path, word, value):
    found = run(tmp_path, YAML, "--output_dir", word).training["output_dir"]
    assert found == value and type(found) is type(value)
    assert run(tmp_path, YAML, f"--output_dir={word}").training["output_dir"] == value
    if not word.startswith(("|", "#", "-", "[un")) and ": " not in word:
        in_file = run(tmp_path, f"data: {{datasets: a}}\ntraining:\n  output_dir: {word}\n").training["output_dir"]
        assert in_file == value and type(in_file) is type(value)


def test_the_type_of_a_field_says_what_its_words_mean(tmp_path):
    flags = ["--test_contexts", "NO", "7", "010", "1e3", "'null'", "--control", "0", "--batch_key", "null"]
    flagged = run(tmp_path, YAML, *flags, "--genes", "010", "--hvg_on_all", "no", "--target_sum", "1e4")
    assert flagged.data.test_contexts == ["NO", "7", "010", "1e3", "null"]
    assert flagged.data.control == "0" and flagged.data.batch_key is None
    assert flagged.data.genes == ["010"] and flagged.data.hvg_on_all is False and flagged.data.target_sum == 1e4
    text = """
    data: {datasets: {1: 2020-01-01, off: no.h5ad}, test_perturbations: on, genes: [1, off], contexts: [yes], control: 1.0}
    training: {max_steps: 3, learning_rate: 1, save_strategy: off, output_dir: {a: [no, "no"]}}
    """
    filed = run(tmp_path, text)
    assert filed.data.datasets == {"1": "2020-01-01", "off": "no.h5ad"}
    assert filed.data.test_perturbations == ["on"] and filed.data.genes == ["1", "off"]
    assert filed.data.contexts == ["yes"] and filed.data.control == "1.0"
    # If a field takes any type, a word has the type that it looks like.
    assert filed.training == {
        "max_steps": 3,
        "learning_rate": 1,
        "save_strategy": "off",
        "output_dir": {"a": [False, "no"]},
    }
    # The result holds no object of the parser.
    for value in (*filed.data.datasets, *filed.data.datasets.values(), *filed.data.genes, filed.data.control):
        assert type(value) is str


def test_a_run_is_written_and_read_to_the_same(tmp_path):
    text = """
    data: {datasets: {a: b.h5ad}, test_contexts: [NO, "7", "null", 010, 12:30], genes: [1, off], target_sum: 1e4}
    training: {max_steps: 3, learning_rate: 1e-5, save_strategy: no, output_dir: /home/someone/runs/x}
    """
    once = run(tmp_path, text)
    assert once.training["output_dir"] == "/home/someone/runs/x"
    again = run(tmp_path, once.to_yaml())
    assert again.data == once.data and again.given == once.given == {"datasets", "test_contexts", "genes", "target_sum"}
    assert again.training == {**once.training, "output_dir": "x"}
    assert again.to_yaml() == once.to_yaml()


def test_the_training_arguments_take_what_they_document(tmp_path):
    types = {field.name: field.type for field in dataclasses.fields(StateTrainingArguments)}
    path = tmp_path / "run.yaml"
    path.write_text(YAML)

    def training(*flags):
        found = load_run_config(str(path), list(flags), MODEL, types).training
        return {name: value for name, value in found.items() if name not in ("learning_rate", "max_steps")}

    assert training("--report_to", "a", "b") == {"report_to": ["a", "b"]}
    assert training("--report_to", "none") == {"report_to": "none"}
    assert training("--train_fully", "head") == {"train_fully": ["head"]}
    assert training("--lr_scheduler_kwargs", "{power: 2, x: no}") == {"lr_scheduler_kwargs": {"power": 2, "x": False}}
    for word, value in (("true", True), ("last", "last"), ("7", "7")):
        assert training("--resume_from_checkpoint", word) == {"resume_from_checkpoint": value}
    assert training("--resume_from_checkpoint") == {"resume_from_checkpoint": True}
    assert training("--fsdp", "false") == {"fsdp": False} and training("--fsdp", "full_shard") == {"fsdp": "full_shard"}
    assert training("--eval_strategy", "no", "--optim", "sgd") == {"eval_strategy": "no", "optim": "sgd"}
    assert training("--save_total_limit", "null") == {"save_total_limit": None}


def test_the_strategy_no_stays_no(tmp_path):
    assert run(tmp_path, YAML, "--save_strategy", "no").training["save_strategy"] == "no"
    assert run(tmp_path, YAML + "  save_strategy: no").training["save_strategy"] == "no"


@pytest.mark.parametrize(
    "text, flags, message",
    [
        (YAML, ["--learning_rat", "1"], "unknown flag --learning_rat; did you mean 'learning_rate'"),
        (YAML, ["--model.residul", "x"], "unknown flag --model.residul; did you mean 'residual'"),
        (YAML, ["--model.max_steps", "3"], "unknown flag --model.max_steps; it belongs to section 'training'"),
        (YAML, ["--modl.residual", "x"], "unknown flag --modl.residual; it belongs to section 'model'"),
        (YAML, ["--seed", "3"], "--seed is a field of ['model', 'training']: write --model.seed or --training.seed"),
        (YAML, ["NK", "--seed", "3"], "expected --field value, found 'NK'"),
        (YAML + "  max_step: 3", [], "unknown field 'max_step' in section 'training'; did you mean 'max_steps'"),
        (YAML + "  genes: 3", [], "unknown field 'genes' in section 'training'; it belongs to section 'data'"),
        (YAML + "modle: {}", [], "unknown section 'modle'; did you mean 'model'"),
        ("data: [a]", [], "section 'data' should hold `field: value` lines, found ['a']"),
        ("- a", [], "expected the sections ['data', 'model', 'training', 'stream', 'prepare'], found list"),
        ("data: {", [], "is not valid YAML"),
        (YAML, ["--control"], "data.control: expected str | list | dict, found True"),
        (YAML, ["--test_contexts"], "data.test_contexts: expected list, found True"),
        (YAML, ["--control", "null"], "data.control: expected str | list | dict, found None"),
        (YAML, ["--genes", "2.5"], "data.genes: expected int | list | 'auto' | None, found 2.5"),
        (YAML, ["--genes", "true"], "data.genes: expected int | list | 'auto' | None, found True"),
        (YAML, ["--max_steps", "ten"], "training.max_steps: expected int, found 'ten'"),
        (YAML, ["--max_steps", "1.5"], "training.max_steps: expected int, found 1.5"),
        (YAML, ["--max_steps", "'3'"], "training.max_steps: expected int, found '3'"),
        (YAML, ["--learning_rate", "1", "2"], "training.learning_rate: expected float, found [1, 2]"),
        (YAML, ["--hidden_size", "true"], "model.hidden_size: expected int, found True"),
        (
            YAML,
            ["--normalize", "non"],
            "data.normalize='non' is not an option: expected one of ['auto', 'counts_to_log1p', 'none']; did you mean 'none'",
        ),
        (YAML, ["--control_matching", "batches"], "data.control_matching='batches' is not an option: expected one of"),
        (
            YAML,
            ["--small_groups", "padd"],
            "data.small_groups='padd' is not an option: expected one of ['pad', 'repeat']",
        ),
        (
            YAML,
            ["--sentences_per_group", "eqal"],
            "expected one of ['proportional', 'equal', 'capped']; did you mean 'equal'",
        ),
        (
            YAML,
            ["--target_sum", "mean"],
            "data.target_sum='mean' is not an option: expected float | 'median' | None; did you mean 'median'",
        ),
        (
            YAML,
            ["--layout", "spars"],
            "prepare.layout='spars' is not an option: expected one of ['auto', 'sparse', 'dense']",
        ),
        (
            YAML,
            ["--dtype", "float64"],
            "prepare.dtype='float64' is not an option: expected one of ['auto', 'float32', 'float16']",
        ),
        (YAML, ["--knockdown_residual", "0"], "prepare.knockdown_residual: expected a number above 0, found 0"),
    ],
)
def test_runs_that_cannot_be(tmp_path, text, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path, text, *flags)


def test_a_missing_run_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.yaml: no such run configuration"):
        load_run_config(str(tmp_path / "gone.yaml"), [], MODEL, TRAINING)


@pytest.mark.parametrize("words", [["--splits", ""], ["--splits="], ["--test_contexts", "type_1", " "]])
def test_a_flag_with_an_empty_word_is_refused(words):
    with pytest.raises(ValueError, match=rf"{words[0].rstrip('=')} is empty: expected a value; .* null for none"):
        list(parse_flags(words))
