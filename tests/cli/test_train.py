"""`pertstate train`: its errors and its help."""

import dataclasses

import pytest

import pertstate.train
from pertstate.cli import main
from pertstate.data import simulate_screen
from pertstate.data.arguments import DataArguments, PrepareArguments, StreamArguments
from pertstate.families import FAMILIES
from pertstate.training.arguments import WITHOUT_MEANING, StateTrainingArguments
from pertstate.training.run_help import descriptions


CONFIG = """
data: {{datasets: {folder}/screen.h5ad}}
model: {{preset: tiny, set_size: 4}}
training: {{output_dir: {folder}/run, max_steps: 3, logging_steps: 1, use_cpu: true, disable_tqdm: true, save_strategy: no}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    simulate_screen(num_contexts=2, num_perturbations=2, num_genes=10, cells_per_group=16, seed=0).write_h5ad(
        folder / "screen.h5ad"
    )
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


# Errors


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean 'learning_rate'"),
        (["--max_steps", "many"], "training.max_steps='many' is not an option: expected int | 'auto'\n"),
        (["--perturbation_key", "gene"], "obs has no column 'gene'"),
        (["--datasets", "gone.h5ad"], "gone.h5ad"),
        (["--model_type", "stat"], "model_type='stat' is no family of models; did you mean 'state'"),
        (["--residual", "outputs"], "model.residual='outputs' is not an option: expected one of ['none', 'hidden', "),
        (["--config", "other.yaml"], "expected one CONFIG.yaml, first or after --config; found 2"),
        (["--lr_decay_factor", "0.5"], "lr_decay_factor=0.5 has no effect without lr_decay_epochs"),
    ],
)
def test_an_error_is_one_line(folder, capsys, flags, message):
    assert main(["train", str(folder / "run.yaml"), *flags]) == 1
    text = capsys.readouterr().err
    assert text.startswith("pertstate train: error: ") and message in text and text.count("\n") == 1
    with pytest.raises((ValueError, KeyError, OSError)):
        pertstate.train.main([str(folder / "run.yaml"), *flags])


def test_an_error_of_many_lines_is_one_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("data: {a: [\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    text = capsys.readouterr().err
    assert f"pertstate train: error: {tmp_path}/run.yaml is not valid YAML: while parsing" in text
    assert text.count("\n") == 1


def test_a_run_that_diverges_is_one_line(folder, capsys):
    flags = ["--learning_rate", "1e30", "--max_grad_norm", "0"]
    assert main(["train", str(folder / "run.yaml"), *flags]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pertstate train: error: ") and "became NaN or infinite" in last


def test_a_mistake_of_the_program_keeps_its_traceback(folder, monkeypatch):
    def wrong(words):
        raise TypeError("a mistake")

    monkeypatch.setattr(pertstate.train, "main", wrong)
    with pytest.raises(TypeError, match="a mistake"):
        main(["train", str(folder / "run.yaml")])


# Help


def help_of(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def listed(text: str) -> dict[str, tuple[str, str]]:
    """Section and what is said of each flag."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("section "):
            section = line.removeprefix("section ").rstrip(":")
        elif line.startswith("  --"):
            flag = line.split()[0].removeprefix("--")
            found[flag] = (section, line.strip())
        elif line.startswith("      ") and section:
            found[flag] = (found[flag][0], f"{found[flag][1]} {line.strip()}")
    return found


def test_help_lists_every_field_of_its_sections(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = help_of(capsys, "train")
    assert text.startswith("usage: pertstate train CELLS|CONFIG.yaml [--any_field value ...]\n")
    assert "accelerate launch -m pertstate.train CELLS|CONFIG.yaml" in text
    found = listed(text)
    state = FAMILIES["state"].config
    sections = {
        "data": [field.name for field in dataclasses.fields(DataArguments)],
        "model": ["model_type", "preset", "pretrained", "pretrained_revision", "input_dim", "hidden_size", "residual"],
        "training": [
            field.name
            for field in dataclasses.fields(StateTrainingArguments)
            if field.init and field.name not in WITHOUT_MEANING
        ],
        "stream": [field.name for field in dataclasses.fields(StreamArguments)],
    }
    for section, names in sections.items():
        assert [name for name in names if found.get(name, (None,))[0] != section] == []
    assert not WITHOUT_MEANING.keys() & found.keys()
    assert list(dict.fromkeys(section for section, _ in found.values())) == list(sections)
    assert found["genes"][1].startswith("--genes int|list|auto The model's genes: this many highly variable ones")
    assert found["genes"][1].endswith("(default: null)")
    assert found["small_groups"][1] == (
        "--small_groups pad|repeat What becomes of a group with fewer cells than set_size (default: pad)"
    )
    assert found["set_size"][1] == (
        "--set_size int|auto Cells of one sentence in training and prediction (default: 128)"
    )
    assert found["hidden_dropout"][1] == "--hidden_dropout float Dropout of the encoders and heads (default: 0.1)"
    assert found["loss"][1].startswith("--loss energy|sinkhorn|combined|mse The distance between")
    assert found["learning_rate"][1] == "--learning_rate float Initial learning rate (default: 0.0001)"
    assert found["save_strategy"][1].startswith("--save_strategy no|steps|epoch|best The checkpoint save strategy")
    assert "output_hidden_states" not in found and "output_hidden_states" in state.__dataclass_fields__


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_described(family, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    found = listed(help_of(capsys, "train", "run.yaml", "--model_type", family))
    for name, (_, text) in found.items():
        said = text.partition(" (default: ")[0].split(" ", 2)
        assert len(said) == 3 and len(said[2]) > 10, f"{name}: {text}"
    assert ("adversary_hidden_size" in found) == (family == "state-cpa")
    own = {field.name for field in dataclasses.fields(FAMILIES[family].config)}
    unlisted = {name for name, (section, _) in found.items() if section == "model"} - own
    assert unlisted == {"model_type", "preset", "pretrained", "pretrained_revision"} - own


def test_help_of_a_family_that_does_not_exist(capsys):
    assert main(["train", "--model_type", "state-cpe", "--help"]) == 1
    assert "model_type='state-cpe' is no family of models; did you mean 'state-cpa'" in capsys.readouterr().err


def test_no_words_are_a_short_usage(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 2
    text = capsys.readouterr().out
    assert text.startswith("usage: pertstate train CELLS|CONFIG.yaml") and text.count("\n") < 12


def test_help_of_prepare_lists_its_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = help_of(capsys, "prepare")
    assert text.startswith("usage: pertstate prepare --config DATA.yaml --output STORE")
    found = listed(text)
    for section, arguments in (("data", DataArguments), ("prepare", PrepareArguments)):
        assert [f.name for f in dataclasses.fields(arguments) if found.get(f.name, "")[0] != section] == []
    assert found["dtype"][1] == "--dtype auto|float32|float16 Type of the values (default: auto)"


def test_descriptions_are_those_of_the_docstring():
    class Section:
        """
        Something.

        Args:
            one (`str`, *optional*, defaults to `"a: b"`) [published]:
                The first: with a colon. And a second sentence.
            two, three (`int`): both of them; in one entry.

                - a list that is left out
            four, five,
                six: see [`SentenceDataset`] or not.
            seed: of the draws

            The others are not here.

        Raises:
            ValueError: never.
        """

    assert descriptions(Section) == {
        "one": "The first: with a colon",
        "two": "Both of them",
        "three": "Both of them",
        "four": "See SentenceDataset or not",
        "five": "See SentenceDataset or not",
        "six": "See SentenceDataset or not",
        "seed": "Of the draws",
    }
    # What an entry refers to is looked up there.
    assert descriptions(DataArguments)["control_matching"] == "Which controls belong to a perturbed cell"
    assert descriptions(StreamArguments)["buffer_cells"] == "At most so many cells wait"
