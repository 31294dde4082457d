"""What the commands say and write of data whose names are hostile: every command, every place that a name can come from."""

import json
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt

from pertstate.base.tables import read_csv
from pertstate.data import simulate_screen
from pertstate.data.stores import open_store, write_parquet


# Characters that a terminal would act on, or show in another way than they are written.
STEERS = {chr(n) for n in (*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x200B, 0xFEFF, 0x2028)}
BITE = "\x1b]52;c;eA==\x07\x1b[2J\u202e\u2066\x9b1m\r\nforged: line\x0b\u2028"
GOOD = "遺伝子α💊e\u0301"


def name(of: str) -> str:
    return f"=<img src=x onerror=alert(1)>`{of}{BITE}{GOOD}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`screen.h5ad`: labels, columns, genes, barcodes, layers and notes with hostile names; a run, its store, its predictions."""
    folder = tmp_path_factory.mktemp("saying")
    adata = simulate_screen(num_contexts=2, num_perturbations=3, num_genes=12, cells_per_group=12, seed=0)
    obs = pd.DataFrame(index=[name(f"cell{i}") for i in range(adata.n_obs)])
    for column, key in (("perturbation", "perturbation"), ("cell_type", "context"), ("batch", "batch")):
        obs[f"{key}{BITE}"] = [name(value) for value in adata.obs[column].astype(str)]
    data = ad.AnnData(adata.X, obs=obs, var=pd.DataFrame(index=[name(f"gene{i}") for i in range(12)]))
    data.layers[f"layer{BITE}"] = data.X.copy()
    data.uns[f"key{BITE}"] = BITE
    data.write_h5ad(folder / "screen.h5ad")
    lacks = data[:, :11].copy()
    lacks.obs[f"more{BITE}"] = BITE
    lacks.write_h5ad(folder / "other.h5ad")
    control = name("control")
    run = {
        "data": {
            "datasets": {f"set{GOOD}": str(folder / "screen.h5ad")},
            "perturbation_key": f"perturbation{BITE}",
            "context_key": f"context{BITE}",
            "batch_key": f"batch{BITE}",
            "control": control,
            "combination_separator": None,
            "test_contexts": [name("type_1")],
        },
        "model": {"preset": "tiny", "set_size": 4},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def said(*words, rc=0) -> str:
    """The output of a command. Nothing in it steers a terminal, and no name starts a line."""
    done = launches.run(["-m", "pertstate.cli", *words])
    text = done.stdout + done.stderr
    # The pipe turns a carriage return, which progress bars need, into a line break.
    assert not STEERS & set(text), text
    assert not [line for line in text.splitlines() if line.startswith("forged")]
    assert done.returncode == rc, text
    return text


@pytest.fixture(scope="module")
def made(folder) -> Path:
    """The same folder, with `run`, `store` and `predicted.h5ad`."""
    said("train", folder / "run.yaml")
    said("prepare", "--config", folder / "run.yaml", "--output", folder / "store")
    said("predict", "--model", folder / "run", "--adata", folder / "screen.h5ad", "--output", folder / "predicted.h5ad")
    return folder


def test_the_log_of_a_training(folder, tmp_path):
    text = said("train", folder / "run.yaml", "--output_dir", tmp_path / "run")
    assert f"`type_1\\x1b]52;c;eA==\\x07\\x1b[2J\\u202e\\u2066\\x9b1m\\r\\nforged: line\\x0b\\u2028{GOOD}" in text


def test_files_stores_and_checkpoints_are_described(made):
    for path in ("screen.h5ad", "store", "run"):
        keys = [
            "--perturbation-key",
            f"perturbation{BITE}",
            "--context-key",
            f"context{BITE}",
            "--control",
            name("control"),
        ]
        text = said("info", made / path, *(keys if path == "screen.h5ad" else []))
        assert GOOD in text and "\\x1b]52;c" in text


def test_errors_of_every_command(made, tmp_path):
    gone = tmp_path / BITE.replace("\n", "")
    for words in (
        ["info", gone],
        ["info", made / "screen.h5ad", "--perturbation-key", BITE],
        ["train", made / "run.yaml", "--test_contexts", BITE],
        ["train", made / "run.yaml", f"--{BITE}", "1"],
        ["prepare", "--config", made / "run.yaml", "--output", gone / "x"],
        ["predict", "--model", gone, "--adata", made / "screen.h5ad", "--output", tmp_path / "x.h5ad"],
        ["predict", "--model", made / "run", "--adata", gone, "--output", tmp_path / "x.h5ad"],
        ["predict", "--model", made / "run", "--adata", made / "screen.h5ad", "--output", tmp_path / "x.h5ad", "--perturbation", BITE],
        ["evaluate", "--predicted", gone, "--real", gone, "--train", gone],
        ["merge", gone, tmp_path / "x"],
        ["convert", gone, tmp_path / "x"],
        ["push", gone, "ada/x"],
        ["configs", BITE],
    ):  # fmt: skip
        text = said(*words, rc=1)
        assert text.startswith(f"pertstate {words[0]}: error: ") and text.count("\n") == 1, text


@pytest.mark.slow
def test_files_that_differ_are_told_of(made, tmp_path):
    run = yaml.safe_load((made / "run.yaml").read_text())
    run["data"]["datasets"] = {"a": str(made / "screen.h5ad"), f"b{BITE}": str(made / "other.h5ad")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    text = said("prepare", "--config", tmp_path / "run.yaml", "--output", tmp_path / "store", "--num-proc", "2")
    assert "genes are not in every file: left out" in text
    assert said("info", tmp_path / "store").count("\\u202e") > 3


def test_tables_of_an_evaluation(made, tmp_path):
    files = ["--predicted", made / "predicted.h5ad", "--real", made / "screen.h5ad", "--train", made / "screen.h5ad"]
    text = said("evaluate", *files, "--output", tmp_path / "table.csv")
    lines = [line for line in text.splitlines() if "no change" in line and GOOD in line]
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    raw = (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert not STEERS & set(raw) and not [line for line in raw.splitlines() if line.startswith(("=", '"='))]
    table = read_csv(tmp_path / "table.csv")
    assert set(table["context"]) == {name("type_0"), name("type_1"), "mean"}
    assert set(table["perturbation"]) == {name(f"pert_{i}") for i in range(3)} | {"mean"}
    said("evaluate", *files, "--output", tmp_path / "table.json")
    records = json.loads((tmp_path / "table.json").read_text())
    assert {record["context"] for record in records} == {name("type_0"), name("type_1"), "mean"}


def test_predictions_keep_their_names(made):
    predicted = ad.read_h5ad(made / "predicted.h5ad")
    assert set(predicted.obs[f"perturbation{BITE}"]) == {name(f"pert_{i}") for i in range(3)}
    assert list(predicted.var_names) == [name(f"gene{i}") for i in range(12)]
    assert np.isfinite(predicted.X).all()


# Paths


HOME = "/home/ada lovelace"
NESTED = {"xla_fsdp_settings": {"x": f"{HOME}/settings", "y": [f"file://{HOME}/q", {"z": "C:\\Users\\ada\\r"}]}}


def test_no_file_for_others_holds_a_path(made, tmp_path):
    """A card, arguments, a config, a store, predictions, a merged adapter: none says where they were made."""
    run = yaml.safe_load((made / "run.yaml").read_text())
    run["data"]["datasets"] = {"a": str(made / "screen.h5ad"), "b": str(made / "other.h5ad")}
    run["training"] |= {"fsdp_config": NESTED, "run_name": f"{HOME}/name", "output_dir": str(tmp_path / "run")}
    run["training"] |= {"data_license": f"see {HOME}/licence.txt"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    said("train", tmp_path / "run.yaml")
    said("prepare", "--config", tmp_path / "run.yaml", "--output", tmp_path / "store")
    screen = made / "screen.h5ad"
    said("predict", "--model", tmp_path / "run", "--adata", screen, "--output", tmp_path / "predicted.h5ad")
    run["model"] = {"pretrained": str(tmp_path / "run"), "set_size": 4}
    run["training"] |= {"lora_rank": 2, "output_dir": str(tmp_path / "adapter")}
    (tmp_path / "further.yaml").write_text(yaml.safe_dump(run))
    said("train", tmp_path / "further.yaml")
    with open(tmp_path / "adapter" / "README.md", "a") as card:
        card.write(f"\nmade in {HOME}/notes/x.md\n")  # an older version, or a person
    said("merge", tmp_path / "adapter", tmp_path / "merged")
    # The card of a merged model is its own.
    assert "made in" not in (tmp_path / "merged" / "README.md").read_text()
    (tmp_path / "adapter" / "README.md").unlink()
    write_parquet(open_store(str(tmp_path / "store")), tmp_path / "parquet", f"{HOME}/<b>name")
    files = [tmp_path / "predicted.h5ad"]
    for folder in ("run", "store", "merged", "parquet", "adapter"):
        files += [path for path in (tmp_path / folder).rglob("*") if path.is_file() and path.suffix != ".py"]
    # An adapter must say where its base model is. It is not pushed if that is a folder.
    files.remove(tmp_path / "adapter" / "adapter_config.json")
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        for private in (str(tmp_path.parent), str(made), "lovelace", "Users", "/home"):
            assert private.encode() not in content, (path, private)
    arguments = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert arguments["fsdp_config"]["xla_fsdp_settings"] == {"x": "settings", "y": ["q", {"z": "r"}]}
    assert arguments["run_name"] == "name" and arguments["output_dir"] == "run"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "training data: `see licence.txt`" in card and "x: settings" in card and "name, revision = 'run'" in card
    assert ad.read_h5ad(tmp_path / "predicted.h5ad").uns["pertstate"]["checkpoint"] == "run"
    sources = json.loads((tmp_path / "store" / "store.json").read_text())["sources"]
    assert [source["path"] for source in sources] == ["screen.h5ad", "other.h5ad"]


def test_the_card_of_a_store_has_no_markup_of_names(made, tmp_path):
    run = yaml.safe_load((made / "run.yaml").read_text())
    run["data"]["datasets"] = {"a": str(made / "screen.h5ad"), "b": str(made / "other.h5ad")}
    first = ad.read_h5ad(made / "screen.h5ad")
    first.obs[f"<img src=x>[l](javascript:y)`{BITE}"] = "z"
    first.write_h5ad(tmp_path / "screen.h5ad")
    run["data"]["datasets"]["a"] = str(tmp_path / "screen.h5ad")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    said("prepare", "--config", tmp_path / "run.yaml", "--output", tmp_path / "store")
    write_parquet(open_store(tmp_path / "store"), tmp_path / "parquet", "ada/<b>`x`\n# y")
    card = (tmp_path / "parquet" / "README.md").read_text()
    assert not STEERS & set(card) and "columns of obs that other.h5ad lacks are left out" in card
    tokens = MarkdownIt("commonmark", {"html": True}).parse(card.split("---", 2)[2])
    inner = [child for token in tokens for child in token.children or []]
    assert {token.type for token in tokens if token.type.startswith("html") or token.type == "heading_open"} == {
        "heading_open"
    }
    assert {token.type for token in inner} <= {"text", "softbreak", "code_inline"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    shown = "".join(child.content for child in inner)
    assert "<img src=x>[l](javascript:y)`\\x1b" in shown
    (fence,) = [token for token in tokens if token.type == "fence"]
    compile(fence.content, "example", "exec")
