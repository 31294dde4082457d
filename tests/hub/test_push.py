"""Checkpoints on the Hub: pushed whole or not at all, loaded by name and revision; with the real clients."""

import json
import os
import runpy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import huggingface_hub
import launches
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from made_scores import made_scores
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import pertstate.cli
from pertstate import (
    StateForPerturbation,
    StateProcessor,
    __version__,
    train,
)
from pertstate.base.vocabulary import PerturbationFeatures
from pertstate.configuration_state import StateConfig
from pertstate.data import simulate_screen
from pertstate.evaluation.confidence import confidence_worth
from pertstate.evaluation.scores import Scores
from pertstate.hub.card import TAGS, render_card
from pertstate.hub.publish import ADAPTER_KEY
from pertstate.hub.push import (
    ADAPTER_WEIGHTS,
    address_of,
    push_checkpoint,
    read_checkpoint,
)
from pertstate.training import StateTrainingArguments


# The least that a checkpoint holds, and what may lie beside it.
LEAST = {"config.json", "processor_config.json", "vocabulary.json", "model.safetensors", "README.md"}
LEAST |= {"configuration_state.py", "modeling_perturbation.py", "modeling_state.py", "processing.py", "vocabulary.py"}
BESIDE = {"config.json.partial", "notes.txt", "my.py"}
# The history of a run stays in its folder.
HISTORY = {"history.csv", "curves.png", "trainer_state.json"}
# More times than the client tries again.
ALWAYS = 20


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(num_contexts=2, num_perturbations=2, num_genes=12, cells_per_group=6, seed=1)


def save(folder: Path, screen, seed: int = 0, **options) -> Path:
    """Save a checkpoint with weights of its own, beside other files that the folder of a run may hold."""
    processor = StateProcessor.fit(screen, set_size=4, **options)
    torch.manual_seed(seed)
    config = StateConfig.from_preset("tiny", **StateConfig.sizes(processor), hidden_dropout=seed / 10)
    model = StateForPerturbation(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(render_card(None, config, processor), encoding="utf-8")
    return folder


@pytest.fixture
def folder(screen, tmp_path):
    folder = save(tmp_path / "run", screen)
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/optimizer.pt", "checkpoint-3/config.json", *BESIDE):
        (folder / name).write_text("private")
    return folder


def push(*words) -> int:
    return pertstate.cli.main(["push", *map(str, words), "--quiet"])


def whole(folder: Path) -> set[str]:
    """The names of the files of a checkpoint, all of which are pushed."""
    names = {path.name for path in folder.iterdir() if path.is_file()} - BESIDE - HISTORY
    assert LEAST <= names
    return names


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of these files, except the card, which names the repository once it is pushed."""
    return {name: (folder / name).read_bytes() for name in whole(folder) - {"README.md"}}


def unspoken(hub) -> list[str]:
    return [seen.path for seen in hub.requests if seen.status == 501 and seen.path != "/api/agent-harnesses"]


# What is pushed


def test_a_push_sends_the_whole_checkpoint_and_nothing_else(hub, folder, capsys):
    assert push(folder, "ada/model") == 0
    head = hub.repository("ada/model").at()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"{hub.url}/ada/model/tree/{head.id}", f'load it with revision="{head.id}"']
    files = hub.read("ada/model")
    assert set(files) == whole(folder) and {n: files[n] for n in contents(folder)} == contents(folder)
    titles = [commit.title for commit in hub.repository("ada/model").history()]
    assert titles == [f"run, with pertstate {__version__}", "initial commit"]
    card = files["README.md"].decode()
    assert "name, revision = 'ada/model', \"COMMIT\"" in card and str(folder) not in card
    assert set(TAGS) <= set(HfApi().model_info("ada/model").tags) and not unspoken(hub)
    assert not hub.repository("ada/model").private


def test_a_second_push_replaces_what_the_first_left_and_nothing_of_others(hub, screen, folder, tmp_path):
    features = PerturbationFeatures(["pert_0", "pert_1"], np.eye(2))
    first = save(tmp_path / "first", screen, perturbation_features=features)
    (first / "README.md").unlink()
    push_checkpoint(first, "ada/model")
    assert "perturbation_features.safetensors" in hub.read("ada/model")
    HfApi().upload_file(repo_id="ada/model", path_or_fileobj=b"mine", path_in_repo="figures/notes.py")
    HfApi().upload_file(repo_id="ada/model", path_or_fileobj=b"mine", path_in_repo="notes.txt")
    commit = push_checkpoint(folder, "ada/model", message="Second")
    files = hub.read("ada/model")
    assert set(files) == {*whole(folder), "figures/notes.py", "notes.txt"}
    assert {name: files[name] for name in contents(folder)} == contents(folder)
    assert hub.repository("ada/model").at().title == "Second" and len(hub.repository("ada/model").history()) == 5
    # Once more, unchanged: no commit.
    assert push_checkpoint(folder, "ada/model").oid == commit.oid == hub.repository("ada/model").at().id


def test_the_scores_of_its_run_travel_without_cells_and_go_with_it(hub, folder):
    """So a model by its name on the Hub says what it reached, and what its confidence is worth."""
    scores = made_scores()
    scores.save(folder / "scores")
    assert "cells.observed" in load_file(folder / "scores" / "scores.safetensors")
    commit = push_checkpoint(folder, "ada/model")
    loaded = pertstate.load("ada/model", revision=commit.oid)
    assert loaded.scores.verdict == scores.verdict and not loaded.scores.cells
    pd.testing.assert_frame_equal(loaded.scores.table, Scores.load(folder / "scores").table)
    np.testing.assert_array_equal(loaded.scores.changes["predicted"], scores.changes["predicted"])
    assert confidence_worth(loaded.scores.table) == confidence_worth(scores.table)
    assert set(hub.read("ada/model")) == whole(folder) | {
        f"scores/scores.{end}" for end in ("csv", "json", "safetensors")
    }
    # Once more, unchanged: no commit. Without scores: they go.
    assert push_checkpoint(folder, "ada/model").oid == commit.oid
    shutil.rmtree(folder / "scores")
    push_checkpoint(folder, "ada/model")
    assert set(hub.read("ada/model")) == whole(folder)


def test_what_is_pushed_names_no_place(hub, folder):
    """Another program, or an older version, may have written a path into the folder."""
    (folder / "README.md").write_text("---\nlicense: mit\n---\nsee /home/ada l/run/notes.md, and C:\\Users\\ada\\x\n")
    arguments = {"output_dir": "/home/ada l/run", "fsdp_config": {"deep": ["file:///home/ada/x", "ada/model"]}}
    (folder / "training_args.json").write_text(json.dumps(arguments))
    before = contents(folder)
    push_checkpoint(folder, "ada/model")
    files = hub.read("ada/model")
    assert files["README.md"].decode() == "---\nlicense: mit\n---\nsee notes.md, and x\n"
    assert json.loads(files["training_args.json"]) == {"output_dir": "run", "fsdp_config": {"deep": ["x", "ada/model"]}}
    assert contents(folder) == before and {n: files[n] for n in before if n != "training_args.json"} == {
        n: before[n] for n in before if n != "training_args.json"
    }


def test_a_folder_without_a_card_is_given_one(hub, folder):
    (folder / "README.md").unlink()
    push_checkpoint(folder, "ada/model")
    card = ModelCard(hub.read("ada/model")["README.md"].decode())
    assert "How the model was trained is not recorded" in card.text and card.data.tags == TAGS
    assert not (folder / "README.md").exists()


def test_private_repositories_and_branches(hub, screen, folder, tmp_path, capsys):
    assert push(folder, "lab/model", "--private") == 0 and hub.repository("lab/model").private
    other = save(tmp_path / "other", screen, seed=1)
    main = hub.repository("lab/model").at().id
    for _ in range(2):
        assert push(other, "lab/model", "--private", "--revision", "wip/one", "--message", "try") == 0
    assert hub.repository("lab/model").at().id == main
    assert hub.repository("lab/model").at("wip/one").parent == main
    assert hub.read("lab/model", "wip/one")["model.safetensors"] == (other / "model.safetensors").read_bytes()
    HfApi().create_tag("lab/model", tag="v1")
    capsys.readouterr()
    for revision, message in (
        (main, f"revision='{main}' is a commit, which does not change; name a branch"),
        ("v1", "revision='v1' is a tag of lab/model, which does not move; name a branch"),
    ):
        assert push(other, "lab/model", "--revision", revision) == 1
        assert capsys.readouterr().err.startswith(f"pertstate push: error: {message}")
    assert push(folder, "ada/open") == 0 and push(other, "ada/open", "--private") == 1
    assert "ada/open: expected a private repository, found a public one" in capsys.readouterr().err
    assert hub.read("ada/open")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_an_adapter_is_pushed_where_others_can_load_its_base_model(hub, folder, tmp_path):
    push_checkpoint(folder, "ada/base")
    model = StateForPerturbation.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    StateProcessor.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="expected a base model on the Hub, found .*, which others cannot load"):
        push_checkpoint(tmp_path / "adapter", "ada/adapter")
    for name in (ADAPTER_KEY, "README.md"):
        written = tmp_path / "adapter" / name
        written.write_text(written.read_text().replace(str(folder), "ada/base"))
    push_checkpoint(tmp_path / "adapter", "ada/adapter")
    files, of_model = (
        set(hub.read("ada/adapter")),
        {"modeling_state.py", "modeling_anchor.py", "configuration_state.py"},
    )
    assert files == whole(folder) - {"config.json", "model.safetensors", *of_model} | {ADAPTER_KEY, ADAPTER_WEIGHTS}
    truncate(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="adapter_model.safetensors: its weights are not a whole safetensors file"):
        push_checkpoint(tmp_path / "adapter", "ada/adapter")
    # It takes the place of a whole model, whose files would contradict it.
    push_checkpoint(folder, "ada/adapter")
    assert set(hub.read("ada/adapter")) == whole(folder)


# What is not sent


def damage_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path: Path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: shutil.rmtree(f), "no such checkpoint folder"),
        (lambda f: (f / "config.json").unlink(), "is no whole checkpoint: expected the file 'config.json'"),
        (lambda f: (f / "vocabulary.json").unlink(), "expected the file 'vocabulary.json' in it, found none"),
        (lambda f: (f / "model.safetensors").unlink(), "expected weights in model.safetensors or .*, found neither"),
        (lambda f: (f / "cell_values.py").unlink(), "expected the file 'cell_values.py' in it, found none"),
        (lambda f: truncate(f / "config.json"), "config.json is not a whole JSON file"),
        (lambda f: truncate(f / "model.safetensors"), "its weights are not a whole safetensors file"),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(model_type="stat")),
            "model_type='stat' is no family; did",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(hidden_size=32)),
            "has another shape than config.json asks for",
        ),
        (lambda f: damage_weights(f, lambda w: w.popitem()), "1 tensors are missing from"),
        (lambda f: damage_weights(f, lambda w: w.update(more=torch.ones(1))), "1 tensors are unknown to this model"),
        (lambda f: damage_weights(f, lambda w: next(iter(w.values())).fill_(torch.nan)), "expected finite weights"),
        (lambda f: edit(f / "config.json", lambda c: c.pop("auto_map")), "expected auto_map, which names the code"),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(auto_map={"AutoModel": "../../etc/passwd.X"})),
            "is no whole checkpoint: expected the file",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_not_sent(hub, folder, spoil, message):
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        push_checkpoint(folder, "ada/model")
    assert hub.requests == []


# Faults


@pytest.mark.parametrize(
    "status, path, message",
    [
        (
            401,
            "/api/repos/create",
            "the Hub answers 401, this token may not do that; log in with another (hf auth login)",
        ),
        (403, "/commit/", "the Hub answers 403, this token may not do that; log in with another (hf auth login)"),
        (409, "/commit/", "the Hub answers 409, the repository changed at the same time; look at what came in and try"),
        (412, "/commit/", "the Hub answers 412, the repository changed at the same time; look at what came in and try"),
        (429, "/commit/", "the Hub answers 429, too many requests; wait and try again"),
        (500, "/commit/", "the Hub answers 500, try again later"),
        (503, "/api/models/ada/model/refs", "the Hub answers 503, try again later"),
        (404, "/preupload/", "the Hub answers 404, try again later"),
        (403, "/objects/[0-9a-f]{64}", "the Hub answers 403, this token may not do that"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line_and_changes_nothing(hub, folder, status, path, message, capsys):
    hub.refuse(path, status, times=ALWAYS)
    assert push(folder, "ada/model") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pertstate push: error: ada/model: {message}"), captured.err
    assert len(captured.err.splitlines()) == 1 and os.environ["HF_TOKEN"] not in captured.err + captured.out
    if status != 401:
        assert hub.read("ada/model") == {} and len(hub.repository("ada/model").history()) == 1


def test_an_expired_token_and_a_namespace_of_others(hub, folder, capsys):
    assert push(folder, "bea/model") == 1
    assert "bea/model: the Hub answers 403, this token may not do that" in capsys.readouterr().err
    hub.expire(os.environ["HF_TOKEN"])
    assert push(folder, "ada/model") == 1
    error = capsys.readouterr().err
    assert "ada/model: the Hub answers 401, this token may not do that" in error and os.environ["HF_TOKEN"] not in error
    assert not hub.repositories
    for name in ("a/b/c", "ada/mo del", "ada/../model"):
        assert push(folder, name) == 1
        assert "Repo id must" in capsys.readouterr().err or "Cannot have" in error


def test_an_upload_that_broke_is_completed_by_the_next(hub, screen, folder, tmp_path, capsys):
    push_checkpoint(folder, "ada/model")
    head, before = hub.repository("ada/model").at().id, hub.read("ada/model")
    other = save(tmp_path / "other", screen, seed=1)
    hub.refuse("/objects/", 403, method="PUT")
    assert push(other, "ada/model") == 1
    assert "ada/model: the Hub answers 403" in capsys.readouterr().err
    hub.cut("/commit/main", of="request", after=10)
    assert push(other, "ada/model") == 1
    assert f"ada/model: {hub.url} cannot be reached" in capsys.readouterr().err
    assert hub.repository("ada/model").at().id == head and hub.read("ada/model") == before
    # Files that arrived are not sent again.
    stored = hub.count("PUT", "/objects/")
    assert push(other, "ada/model") == 0
    assert hub.count("PUT", "/objects/") == stored
    after = hub.read("ada/model")
    assert {name: after[name] for name in contents(other)} == contents(other)
    assert hub.repository("ada/model").at().parent == head


def test_an_upload_cut_in_the_middle_and_a_busy_storage_are_tried_again(hub, folder):
    hub.cut("/objects/", of="request", after=10_000)
    hub.refuse("/objects/", 503, method="PUT")
    push_checkpoint(folder, "ada/model")
    assert set(hub.read("ada/model")) == whole(folder)
    puts = [seen.status for seen in hub.requests if seen.method == "PUT"]
    assert sorted(puts, key=str) == [200, 503, None]


def test_two_pushes_at_once_are_one_after_the_other_or_a_clear_conflict(hub, screen, tmp_path):
    folders = [save(tmp_path / str(seed), screen, seed=seed) for seed in (1, 2)]
    push_checkpoint(save(tmp_path / "0", screen), "ada/model")
    start = threading.Barrier(2)

    def one(folder):
        start.wait()
        try:
            return push_checkpoint(folder, "ada/model").oid
        except OSError as error:
            assert "ada/model: the Hub answers 412, the repository changed at the same time" in str(error)
            return None

    with ThreadPoolExecutor(2) as pool:
        commits = list(pool.map(one, folders))
    landed = {commit: folder for commit, folder in zip(commits, folders) if commit is not None}
    assert landed and len(hub.repository("ada/model").history()) == 2 + len(landed)
    # Whatever the order, every commit is one of the two, whole.
    for commit, folder in landed.items():
        files = hub.read("ada/model", commit)
        assert set(files) == whole(folder) and {name: files[name] for name in contents(folder)} == contents(folder)


def test_without_the_hub(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert push(folder, "ada/model") == 1
    assert "ada/model: HF_HUB_OFFLINE keeps this process away from the Hub; unset it" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    assert push(folder, "ada/model") == 1
    assert f"ada/model: {hub.url} cannot be reached (ConnectError" in capsys.readouterr().err


# Loading by name


ALONE = """
import json, runpy, sys
for name in ("pertstate", "pertstate.cli", "geomloss", "accelerate", "datasets", "peft", "pytest"):
    sys.modules[name] = None
import anndata as ad, torch
from transformers import AutoConfig, AutoModel, AutoProcessor
torch.set_num_threads(1)
examples, wrong = json.loads(sys.argv[1])
refused = []
for example in examples:
    seen = runpy.run_path(example)
    assert type(seen["model"]).__module__.startswith("transformers_modules.")
    seen["predicted"].write_h5ad(example + ".h5ad")
for name, revision, token in wrong:
    for loads in (AutoConfig, AutoModel, AutoProcessor):
        where = {"revision": revision, "token": token, "cache_dir": "cache of somebody else"}
        try:
            loads.from_pretrained(name, trust_remote_code=True, **where)
        except OSError as error:
            refused.append(str(error))
print(json.dumps(refused))
"""
INSTALLED = """
import json, sys
import anndata as ad, torch
import pertstate
from transformers import AutoConfig, AutoModel, AutoProcessor
torch.set_num_threads(1)
controls, name, pushes, *revisions = sys.argv[1:]
if pushes == "push":
    # Objects onto a repository that has a card: they leave it what it is.
    model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    revisions.append(model.push_to_hub(name, commit_message="model").oid)
    revisions.append(processor.push_to_hub(name, commit_message="processor", revision="main").oid)
    model.push_to_hub("ada/bare")
found = []
for revision in revisions:
    assert type(AutoConfig.from_pretrained(name, revision=revision)) is pertstate.StateConfig
    model = AutoModel.from_pretrained(name, revision=revision).eval()
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    assert type(model) is pertstate.StateForPerturbation and type(processor) is pertstate.StateProcessor
    sentences = processor(ad.read_h5ad(controls), perturbation="pert_0")
    with torch.no_grad():
        found.append([revision, processor.decode(model(**sentences), sentences).X.tolist()])
print(json.dumps(found))
"""


def python(code: str, folder: Path, *arguments, **environment):
    """Run `code` in a process of its own, which reads at its start where the Hub is. Returns the last line that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    done = launches.run(["-c", code, *arguments], environment, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert os.environ["HF_TOKEN"] not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def predict(folder, screen) -> np.ndarray:
    _, processor, _ = read_checkpoint(folder)
    model = StateForPerturbation.from_pretrained(folder).eval()
    sentences = processor(screen, perturbation="pert_0")
    with torch.no_grad():
        return processor.decode(model(**sentences), sentences).X


@pytest.mark.slow
def test_a_pushed_checkpoint_predicts_the_same_everywhere(hub, screen, folder, tmp_path):
    """The lines of the card work without the package, the Auto classes with it, and both revisions from the cache alone."""
    screen.write_h5ad(tmp_path / "controls.h5ad")
    other = save(tmp_path / "other", screen, seed=1)
    commits = [push_checkpoint(f, "lab/model", private=True).oid for f in (folder, other)]
    expected = [predict(f, screen) for f in (folder, other)]
    assert not np.array_equal(*expected)
    examples = []
    for i, commit in enumerate(commits):
        card = ModelCard(hub.read("lab/model", commit)["README.md"].decode()).text
        [lines] = [t.content for t in MarkdownIt().parse(card) if t.type == "fence" and t.info == "python"]
        assert '"COMMIT"' in lines and "revision=revision, trust_remote_code=True" in lines
        examples.append(tmp_path / f"example_{i}.py")
        examples[-1].write_text(lines.replace("COMMIT", commit))
    # And the lines of the guide.
    guide = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    [lines] = [t.content for t in MarkdownIt().parse(guide) if t.type == "fence" and '"user/screen"' in t.content]
    lines = lines.replace("COMMIT", commits[1]).replace("user/screen", "lab/model").replace("STAT2", "pert_0")
    examples.append(tmp_path / "example_2.py")
    examples[-1].write_text(lines)
    # Somebody who may not see the repository is told the same as if there were none.
    may_not, anybody = hub.add_user("bea"), None
    wrong = [["lab/model", "0" * 40, anybody], ["lab/model", "v9", anybody], ["lab/nothing", "main", anybody]]
    wrong += [["lab/model", commits[0], token] for token in (may_not, False)]
    refused = python(ALONE, tmp_path, json.dumps([list(map(str, examples)), wrong]))
    for i, array in enumerate([*expected, expected[1]]):
        assert np.array_equal(ad.read_h5ad(tmp_path / f"example_{i}.py.h5ad").X, array)
    assert len(refused) == 15
    assert all("is not a valid git identifier" in error for error in refused[:6]), refused
    assert all("is not a local folder and is not a valid model identifier" in error for error in refused[6:])
    assert not any(may_not in error for error in refused)
    with_package = python(INSTALLED, tmp_path, "controls.h5ad", "lab/model", "push", *commits)
    assert [revision for revision, _ in with_package[:2]] == commits
    for (_, found), array in zip(with_package, [*expected, expected[1], expected[1]]):
        assert np.array_equal(np.array(found, dtype=np.float32), array)
    assert hub.read("lab/model")["README.md"].decode().count("single-cell") == 1
    assert "## Training data" in hub.read("lab/model")["README.md"].decode()
    assert set(TAGS) <= set(ModelCard(hub.read("ada/bare")["README.md"].decode()).data.tags)
    assert not unspoken(hub)
    # The cache alone, offline and with the Hub gone.
    hub.stop()
    offline = python(INSTALLED, tmp_path, "controls.h5ad", "lab/model", "", *commits, HF_HUB_OFFLINE="1")
    assert offline == with_package[:2]


def test_the_command_line_predicts_by_name_and_revision(hub, screen, folder, tmp_path, capsys):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    commit = push_checkpoint(folder, "ada/model").oid
    push_checkpoint(save(tmp_path / "other", screen, seed=1), "ada/model")

    def run(name, revision, output="out.h5ad"):
        words = ["predict", "--model", name, "--revision", revision, "--adata", tmp_path / "screen.h5ad"]
        words += ["--output", tmp_path / output, "--perturbation", "pert_0", "--quiet", "--overwrite"]
        return pertstate.cli.main([str(word) for word in words])

    assert run("ada/model", commit) == 0
    predicted = ad.read_h5ad(tmp_path / "out.h5ad")
    assert predicted.uns["pertstate"]["checkpoint"] == f"ada/model@{commit}"
    assert (
        pertstate.cli.main(
            ["predict", "--model", str(folder), "--adata", str(tmp_path / "screen.h5ad"), "--output"]
            + [str(tmp_path / "local.h5ad"), "--perturbation", "pert_0", "--quiet"]
        )
        == 0
    )
    assert np.array_equal(predicted.X, ad.read_h5ad(tmp_path / "local.h5ad").X)
    for name, revision in (("ada/model", "v9"), ("ada/nothing", "main")):
        capsys.readouterr()
        assert run(name, revision) == 1
        error = capsys.readouterr().err
        assert f"{name}@{revision}: the Hub has no such model or revision, or it is private" in error
    hub.stop()
    assert run("ada/model", commit, "again.h5ad") == 0
    assert np.array_equal(ad.read_h5ad(tmp_path / "again.h5ad").X, predicted.X)
    assert run("ada/other", "main") == 1
    assert "this model or revision is not in the cache" in capsys.readouterr().err


# Training


@pytest.fixture
def run(tmp_path, screen):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    content = {
        "data": {"datasets": {"screen": str(tmp_path / "screen.h5ad")}, "test_contexts": ["type_1"]},
        "model": {"preset": "tiny", "set_size": 4},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "push_to_hub": True,
            "hub_model_id": "ada/model",
            "hub_token": os.environ.get("HF_TOKEN"),
        },
    }

    def run(model=None, **training):
        content["training"] |= training
        content["model"] = model or content["model"]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        train.main([str(tmp_path / "run.yaml")])
        return tmp_path / "out"

    return run


def test_a_run_pushes_each_checkpoint_whole_and_the_last_with_its_figures(hub, run, tmp_path):
    folder = run(hub_token=os.environ["HF_TOKEN"], hub_private_repo=True)
    repository = hub.repository("ada/model")
    history = repository.history()[::-1]
    titles = ["initial commit", "Training in progress, step 2", "Training in progress, step 4", "End of training"]
    assert [commit.title for commit in history] == titles and repository.private
    for commit in history[1:]:
        files = hub.read("ada/model", commit.id)
        assert set(files) == whole(folder)
        assert not any(os.environ["HF_TOKEN"].encode() in content for content in files.values())
        copy = tmp_path / commit.id
        copy.mkdir()
        for name, content in files.items():
            (copy / name).write_bytes(content)
        read_checkpoint(copy)
    last = hub.read("ada/model")
    assert {name: last[name] for name in contents(folder)} == contents(folder)
    cards = [hub.read("ada/model", commit.id)["README.md"].decode() for commit in history[1:]]
    assert ["model-index" in card for card in cards] == [False, False, True]
    assert all(str(tmp_path) not in card and "ada/model" in card for card in cards)


def test_a_run_goes_on_where_the_hub_is_down_and_its_folder_stays_where_the_last_push_fails(hub, run, caplog):
    hub.refuse("/commit/", 503, times=ALWAYS)
    with pytest.raises(OSError, match="ada/model: the Hub answers 503, try again later"):
        run(hub_token=os.environ["HF_TOKEN"])
    assert "checkpoint-2 was not pushed, the training goes on: ada/model: the Hub answers 503" in caplog.text
    assert hub.read("ada/model") == {}


def test_a_run_that_may_not_push_does_not_start(hub, run, tmp_path):
    hub.expire(os.environ["HF_TOKEN"])
    with pytest.raises(PermissionError, match="ada/model: the Hub answers 401, this token may not do that"):
        run(hub_token=os.environ["HF_TOKEN"])
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_whose_card_the_hub_refuses_does_not_start(hub, run, tmp_path):
    with pytest.raises(ValueError, match="license.* must be one of"):
        run(hub_token=os.environ["HF_TOKEN"], license="my-own-1.0")
    assert not (tmp_path / "out" / "config.json").exists() and hub.read("ada/model") == {}


def test_an_adapter_that_nobody_could_load_is_not_trained_to_be_pushed(hub, run, folder, tmp_path, monkeypatch, screen):
    model = {"pretrained": str(folder)}
    with pytest.raises(
        ValueError,
        match="push_to_hub: others can use an adapter only if .* is a folder; push that and name the repository",
    ):
        run(model=model, lora_rank=2)
    output = run(model=model, lora_rank=2, push_to_hub=False)
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft" and "holds the adapter alone" in card.text
    [lines] = [t.content for t in MarkdownIt().parse(card.text) if t.type == "fence" and t.info == "python"]
    (tmp_path / "example.py").write_text(lines)
    screen.write_h5ad(tmp_path / "controls.h5ad")
    monkeypatch.chdir(tmp_path)
    assert np.isfinite(runpy.run_path("example.py")["predicted"].X).all()


def test_states_of_the_optimiser_are_not_pushed():
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would push states of the optimiser"):
            StateTrainingArguments(push_to_hub=True, hub_strategy=strategy, use_cpu=True)


def test_the_address_of_a_commit(hub, folder):
    commit = push_checkpoint(folder, "ada/model", token=os.environ["HF_TOKEN"])
    assert address_of(commit) == f"{hub.url}/ada/model/tree/{commit.oid}"
