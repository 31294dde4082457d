"""Model cards: complete, true, and safe from whatever names the data bring."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from pertstate import StateForPerturbation, StateProcessor
from pertstate._version import __version__
from pertstate.base.constants import Split
from pertstate.base.printable import printable
from pertstate.base.vocabulary import Vocabulary
from pertstate.configuration_state import StateConfig
from pertstate.data import prepare
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.record import RecordedGroup, RunRecord
from pertstate.data.simulator import simulate_screen
from pertstate.families import FAMILIES
from pertstate.families.perturbation_mean.configuration_perturbation_mean import PerturbationMeanConfig
from pertstate.hub.card import (
    TAGS,
    as_block,
    as_code,
    homepage,
    render_card,
    with_repository,
)
from pertstate.hub.provenance import Provenance, Source
from pertstate.training import StateTrainingArguments
from pertstate.training.run_config import load_run_config


HOSTILE = [
    "<script>alert(1)</script>",
    "`code`",
    "a|b",
    "line\nbreak",
    "---",
    "\n---\nlicense: mit\n---\n",
    "{{ 7 * 7 }}{% raw %}",
    "key: [value",
    "*bold* _it_ [link](javascript:alert(1)) ![](x)",
    "```\nfence\n```",
    "$$x$$ &lt; \\",
    "# heading",
    "'\"; import os #",
    "\u202egnp",
    "\x1b]52;c;eA==\x07\x9b2J\u2066\u200b\ufeff\u2028x",
    "=cmd|' /C calc'!A0",
    " padded ",
    "- item",
    "<!-- comment",
    "no",
    "1e4",
]
METRICS = {
    "test_pearson": 0.51234567,
    "test_mae": 0.02,
    "test_energy": 0.25,
    "test_no_change_mae": 0.03,
    "test_no_change_energy": 0.5,
    "test_perturbation_mean_pearson": 0.4,
    "test_perturbation_mean_mae": 0.025,
    "test_perturbation_mean_energy": 0.3,
}


def make_run(folder: Path, training=None, model=None, stream=None, **data):
    content = {"data": data, "model": model or {}, "training": {"output_dir": "runs/screen", **(training or {})}}
    if stream:
        content["stream"] = stream
    path = folder / "run.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # YAML with all text in quotes
    return load_run_config(str(path), [])


def make_processor(names=("A", "B"), genes=("g1", "g2", "g3")):
    vocabulary = Vocabulary(list(genes), list(names), list(names), list(names))
    return StateProcessor(vocabulary=vocabulary, batch_key="batch", combination_separator=None)


def config_for(processor):
    return StateConfig.from_preset("tiny", **StateConfig.sizes(processor))


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    simulate_screen(num_contexts=3, num_perturbations=2, num_genes=40, cells_per_group=10, seed=2).write_h5ad(path)
    return path


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def tokens_of(text: str) -> list:
    """Every token of the Markdown, with those within lines. HTML must not be there, because it would not be shown as text."""
    flat = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        flat += [token, *(token.children or [])]
    return flat


def body(card: str) -> str:
    return ModelCard(card).text


# What it says


def test_everything_that_was_known_is_said(screen, tmp_path, hub):
    run = make_run(
        tmp_path,
        datasets={"screen": str(screen)},
        test_contexts=["type_2"],
        val_perturbations=["pert_0"],
        training={"learning_rate": 0.0003, "hub_token": "hf_secret"},
        model={"pretrained": "lab/base"},
    )
    processor = make_processor([f"name_{i}" for i in range(30)])
    args = StateTrainingArguments(license="cc-by-4.0", data_license="for research", use_cpu=True)
    card = render_card(run, config_for(processor), processor, METRICS, args=args)
    data = front_matter(card)
    assert data["license"] == "cc-by-4.0" and data["base_model"] == "lab/base" and data["tags"] == TAGS
    assert {"single-cell", "perturbation"} <= set(TAGS)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "perturbation-prediction")
    digest = hashlib.sha256(screen.read_bytes()).hexdigest()
    for text in (
        "Trained further from the weights of `lab/base`",
        "weights: `cc-by-4.0`",
        "training data: `for research`",
        f"`screen.h5ad`, file of the dataset `screen`, SHA-256 `{digest}`",
        "features of a cell: 3 genes, log1p",
        "genes: 3: `g1`, `g2`, `g3`",
        "contexts trained on: 30: `name_0`, `name_1`",
        "`name_19` and 10 more",
        "[vocabulary.json](vocabulary.json)",
        "test contexts: `type_2`",
        "val perturbations: `pert_0`",
        "among the training sentences",
        "| model | 0.5123 | 0.0200 | 0.2500 |",
        "| no change | undefined | 0.0300 | 0.5000 |",
        "| perturbation mean | 0.4000 | 0.0250 | 0.3000 |",
        "```bash\npertstate train run.yaml\n```",
        "learning_rate: 0.0003",
        "1 x CPU",
        f"torch {torch.__version__}",
        "Not for clinical use",
        "@software{pertstate,",
    ):
        assert text in card, text
    assert "hf_secret" not in card and str(tmp_path) not in card
    ModelCard(card).validate()
    assert hub.count("POST", "/api/validate-yaml") == 1


def test_results_are_metadata_with_both_baselines_beside(screen, tmp_path):
    processor = make_processor()
    run = make_run(tmp_path, datasets={"a screen": str(screen)})
    results = ModelCard(render_card(run, config_for(processor), processor, METRICS)).data.eval_results
    found = {(result.metric_type, result.metric_name): result.metric_value for result in results}
    assert found["pearsonr", "Pearson of the mean change"] == 0.512346
    assert found["mae", "MAE of the mean, no change (baseline)"] == 0.03
    assert found["energy-distance", "energy distance, perturbation mean (baseline)"] == 0.3
    assert ("pearsonr", "Pearson of the mean change, no change (baseline)") not in found and len(found) == 8
    assert {(r.dataset_name, r.dataset_type, r.dataset_split) for r in results} == {("a screen", "a-screen", "test")}
    unscored = render_card(run, config_for(processor), processor)
    assert "model-index" not in front_matter(unscored) and "There is no score of unseen cells" in unscored


def test_what_is_not_known_is_said_to_be_unknown(tmp_path, hub):
    processor = make_processor()
    card = render_card(None, config_for(processor), processor)
    assert front_matter(card)["license"] == "unknown" and "datasets" not in front_matter(card)
    for text in (
        "weights: not stated",
        "training data: not known; ask those who published the data",
        "is not recorded in this folder",
        "none is recorded in this folder",
        "How the model was trained is not recorded",
    ):
        assert text in card, text
    ModelCard(card).validate()


def test_a_card_that_the_hub_refuses_does_not_validate(hub):
    processor = make_processor()
    args = StateTrainingArguments(license="my-own-1.0", use_cpu=True)
    with pytest.raises(ValueError, match="license.* must be one of"):
        ModelCard(render_card(None, config_for(processor), processor, args=args)).validate()
    with pytest.raises(ValueError, match="license='Apache 2.0': expected an identifier of .* such as apache-2.0"):
        StateTrainingArguments(license="Apache 2.0", use_cpu=True)


def test_a_store_is_told_by_its_manifest_and_the_files_it_was_made_of(screen, tmp_path):
    store = prepare(DataArguments(datasets={"kang": str(screen)}), tmp_path / "a.store", PrepareArguments(), quiet=True)
    provenance = Provenance.of_run(make_run(tmp_path, store=str(store.path)))
    manifest = hashlib.sha256((store.path / "store.json").read_bytes()).hexdigest()
    source = hashlib.sha256(screen.read_bytes()).hexdigest()
    assert provenance.datasets == ["kang"]
    assert provenance.sources == [
        Source("a.store", "cell store", sha256=manifest),
        Source("screen.h5ad", "which the store was made of", sha256=source),
    ]
    streamed = Provenance.of_run(make_run(tmp_path, stream={"path": str(store.path)}))
    assert streamed == provenance


def test_streamed_files_are_counted_and_said_not_to_be_hashed(tmp_path):
    (tmp_path / "cells").mkdir()
    for i in range(3):
        (tmp_path / "cells" / f"{i}.parquet").write_bytes(b"x" * 500)
    provenance = Provenance.of_run(make_run(tmp_path, stream={"path": str(tmp_path / "cells"), "columns": {"a": "b"}}))
    assert provenance.sources == [Source("cells", "3 streamed parquet files, 1,500 bytes, not hashed")]


def test_what_a_splits_file_holds_out_is_listed(screen, tmp_path):
    splits = tmp_path / "splits.toml"
    splits.write_text(
        f'[datasets]\nscreen = "{screen}"\n[training]\nscreen = "train"\n[zeroshot]\n"screen.type_2" = "test"\n'
        '[fewshot."screen.type_1"]\nval = ["pert_0"]\ntest = ["pert_1"]\n'
    )
    processor = make_processor()
    card = render_card(make_run(tmp_path, splits=str(splits)), config_for(processor), processor)
    assert "- test: context `type_2` of `screen`, whole" in card
    assert "- val: 1 perturbation of context `type_1` of `screen`: `pert_0`" in card
    assert "- test: 1 perturbation of context `type_1` of `screen`: `pert_1`" in card
    assert str(tmp_path) not in card


def test_groups_that_a_run_chose_for_validation_are_listed(screen, tmp_path):
    groups = [("screen", "type_0", f"pert_{i}", split, 10) for i, split in enumerate((Split.TRAIN, Split.VAL))]
    record = RunRecord("control", [RecordedGroup(*group) for group in groups])
    processor = make_processor()
    card = render_card(
        make_run(tmp_path, validation="auto", test_contexts=["type_2"]), config_for(processor), processor, record=record
    )
    assert "- test contexts: `type_2`\n- val: 1 group: `type_0 / pert_1`\n" in card
    named = make_run(tmp_path, val_perturbations=["pert_1"])
    card = render_card(named, config_for(processor), processor, record=record)
    assert "- val perturbations: `pert_1`\n" in card and "- val: " not in card


def test_a_ceiling_says_so_beside_every_figure(screen, tmp_path):
    processor = make_processor()
    processor.values, processor.input, processor.gene_input = "embedding", "obsm/X", "X"
    config = FAMILIES["state-decoder-only"].config.from_preset("tiny", input_dim=3, gene_dim=3, num_perturbations=2)
    run = make_run(tmp_path, datasets=str(screen))
    card = ModelCard(render_card(run, config, processor, METRICS))
    names = [result.metric_name for result in card.data.eval_results]
    assert "energy distance (a ceiling: decoded from the observed cells)" in names and "energy distance" not in names
    assert "row is a ceiling" in card.text and 'sentences["labels"]' in card.text


def test_families_that_are_fitted_use_no_control_sentences(screen, tmp_path):
    run = make_run(tmp_path, datasets=str(screen), test_contexts=["type_2"])
    processor = make_processor()
    config = PerturbationMeanConfig(**PerturbationMeanConfig.sizes(processor))
    card = render_card(run, config, processor)
    assert "Fitted in one pass" in card and "held out whole were not used in training" in card


def test_every_family_has_a_card_and_that_of_state_its_presets():
    for model_type, family in FAMILIES.items():
        assert "Use it" in " ".join(family.card.split()), model_type
    about = FAMILIES["state"].card
    for name in StateConfig.presets:
        config = StateConfig.from_preset(name, input_dim=2000, num_perturbations=1000)
        with torch.device("meta"):
            parameters = StateForPerturbation(config).num_parameters()
        row = f"| `{name}` | {config.hidden_size} | {config.num_hidden_layers} | {config.num_attention_heads} | "
        assert f"{row}{config.set_size} | {parameters:,} |" in about, name


# The run, as it can be repeated


def test_the_yaml_of_a_run_reads_back_to_the_same_run(tmp_path):
    (tmp_path / "deep").mkdir()
    run = make_run(
        tmp_path,
        datasets={name: f"{tmp_path}/deep/{i}.h5ad" for i, name in enumerate(HOSTILE)},
        test_contexts=HOSTILE,
        control="0",
        genes=["NA", "nan", "010", "12:30", "2020-01-01", "1e-4"],
        batch_key="yes",
        training={"learning_rate": 1e-5, "save_strategy": "no", "max_steps": 10, "license": "mit", "hub_token": "x"},
        model={"preset": "tiny", "hidden_dropout": 0.1, "batch_encoder": True},
    )
    (tmp_path / "again.yaml").write_text(run.to_yaml(), encoding="utf-8")
    again = load_run_config(str(tmp_path / "again.yaml"), [])
    assert again.data.datasets == {name: f"{i}.h5ad" for i, name in enumerate(HOSTILE)}
    again.data.datasets = run.data.datasets
    assert again.data == run.data and again.model == run.model and again.stream == run.stream
    expected = {name: value for name, value in run.training.items() if name != "hub_token"}
    assert again.training == {**expected, "output_dir": "screen"}


def test_arguments_beside_the_weights_hold_no_token_and_no_path():
    text = StateTrainingArguments(output_dir="/home/ada/run", hub_token="hf_secret", use_cpu=True).to_json_string()
    assert "hf_secret" not in text and "/home/ada" not in text and '"output_dir": "run"' in text


# Names of data are text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_as_code_is_one_piece_of_text(name):
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    for line in (f"a {as_code(name)} b", f"- {as_code(name)}", f"# {as_code(name)}"):
        (inline,) = [token for token in MarkdownIt("commonmark").parse(line) if token.type == "inline"]
        codes = [token.content for token in inline.children if token.type == "code_inline"]
        assert codes == [shown], line
        assert {token.type for token in inline.children} <= {"text", "code_inline"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_block_holds_its_text_to_the_end(name):
    tokens = MarkdownIt("commonmark").parse(f"before\n\n{as_block(name, 'yaml')}\n\nafter")
    (fence,) = [token for token in tokens if token.type == "fence"]
    assert fence.content.rstrip() == name.rstrip() and tokens[-2].content == "after"


def test_hostile_names_everywhere_leave_the_card_what_it_is(tmp_path, hub):
    plain, hostile = make_processor(), make_processor(HOSTILE, HOSTILE)
    for field in ("perturbation_key", "control", "context_key", "batch_key", "input"):
        setattr(hostile, field, HOSTILE[5] + HOSTILE[0])
    cards = []
    for processor, names in ((plain, ["A"] * len(HOSTILE)), (hostile, HOSTILE)):
        run = make_run(
            tmp_path,
            datasets={"screen": "screen.h5ad"},
            test_contexts=names,
            training={"output_dir": f"runs/{names[0]}{names[5]}"},
            model={"pretrained": names[0]},
        )
        provenance = Provenance(list(names), [Source(n, "file of the dataset", n, n, None) for n in names])
        args = StateTrainingArguments(data_license=names[0], use_cpu=True)
        card = render_card(run, config_for(processor), processor, METRICS, None, args, provenance)
        cards.append(with_repository(card, "ada/model"))
    expected, found = cards
    assert front_matter(found).keys() == front_matter(expected).keys()
    assert front_matter(found)["license"] == "unknown"
    assert not [token.content for token in tokens_of(body(found)) if token.type.startswith("html")]
    structure = [
        [token.type for token in tokens_of(body(card)) if token.type not in ("text", "code_inline", "softbreak")]
        for card in cards
    ]
    assert structure[0] == structure[1]
    codes = {token.content for token in tokens_of(body(found)) if token.type == "code_inline"}
    assert {"<script>alert(1)</script>", "`code`", "a|b", "line\\nbreak", "{{ 7 * 7 }}{% raw %}", "---"} <= codes
    assert printable(found, keep="\n") == found
    ModelCard(found).validate()
    # The example is still Python, with the name in it as a string.
    (example,) = [t.content for t in tokens_of(body(found)) if t.type == "fence" and t.info == "python"]
    compile(example, "example", "exec")
    assert f"perturbation={HOSTILE[0]!r}" in example
    assert "name, revision = 'ada/model', \"COMMIT\"" in example


# The project's page


def build(site: Path, *urls: str):
    """Make a build of this package in `site`, with these `[project.urls]`."""
    folder = site / "pertstate-0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: pertstate\nVersion: 0.0\n" + "".join(urls))


def test_a_card_links_to_the_page_that_the_build_names(tmp_path, monkeypatch):
    build(tmp_path, "Project-URL: Issues, https://x.org/issues\n", "Project-URL: Homepage, https://x.org/ours\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert homepage() == "https://x.org/ours"
    processor = make_processor()
    card = render_card(None, config_for(processor), processor)
    links = [token.attrs["href"] for token in tokens_of(body(card)) if token.type == "link_open"]
    assert links.count("https://x.org/ours") == 1
    assert f"  version = {{{__version__}}},\n  url = {{https://x.org/ours}}\n}}\n" in card


def test_a_card_links_to_no_page_where_the_build_names_none(tmp_path, monkeypatch):
    build(tmp_path, "Project-URL: Issues, https://x.org/issues\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert homepage() is None
    processor = make_processor()
    card = render_card(None, config_for(processor), processor)
    assert "\nA pertstate model of how cells respond" in card and "url" not in card and "http" not in card
    assert f"  version = {{{__version__}}}\n}}\n" in card
    monkeypatch.setattr("sys.path", [])
    assert homepage() is None


def test_a_run_of_several_processes_is_repeated_by_as_many(screen, tmp_path):
    processor = make_processor()
    run = make_run(tmp_path, datasets=str(screen))

    class OfThree(StateTrainingArguments):
        world_size = 3

    card = render_card(run, config_for(processor), processor, args=OfThree(use_cpu=True))
    assert "```bash\naccelerate launch --num_processes 3 -m pertstate.train run.yaml\n```" in card


def test_base_models_on_disk_and_names_that_are_none_stay_out_of_the_metadata(screen, tmp_path):
    processor = make_processor()
    for name in (str(tmp_path), "../x", "a/b\nc", "a--b/c"):
        run = make_run(tmp_path, datasets=str(screen), model={"pretrained": name})
        card = render_card(run, config_for(processor), processor)
        assert "base_model" not in front_matter(card)
        assert f"Trained further from the weights of {as_code(Path(name).name)}" in card
