"""Runs that start from a checkpoint: all of it, its heads, or on control cells alone."""

import contextlib
import io
import json
import logging
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
import yaml
from finetuning_runs import TRAINING, make_folder, predictions, run, weights
from transformers import AutoModel, AutoProcessor

import pertstate.cli
from pertstate import StateProcessor, train
from pertstate.data import prepare, simulate_screen
from pertstate.data.arguments import DataArguments
from pertstate.families import FAMILIES
from pertstate.hub.checkpoints import load_whole
from pertstate.training.pretrained import is_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("finetuning"))


# The whole model


def test_a_run_starts_from_the_weights_of_the_checkpoint(folder, caplog):
    """If no step changes a weight, the run leaves the weights of the checkpoint, with the names of the new data."""
    with caplog.at_level(logging.INFO):
        run(folder, "still", "second", learning_rate=0.0, max_steps=1)
    assert "perturbations: 3 kept, 1 added (pert_3), 0 dropped" in caplog.text
    before, after = weights(folder / "base"), weights(folder / "still")
    rows = "perturbation_encoder.embedding.weight"
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [rows]
    assert torch.equal(after[rows][:3], before[rows])
    torch.testing.assert_close(after[rows][3], before[rows].mean(dim=0))
    old, new = (StateProcessor.from_pretrained(folder / name) for name in ("base", "still"))
    assert new.vocabulary.perturbations == [*old.vocabulary.perturbations, "pert_3"]
    assert new.vocabulary.contexts == ["type_0", "type_1", "type_2", "type_3", "type_4"]
    assert new.vocabulary.genes == old.vocabulary.genes
    assert (new.batch_key, new.normalize, new.set_size) == ("batch", "counts_to_log1p", 8)
    model, base = (AutoModel.from_pretrained(folder / name) for name in ("still", "base"))
    expected = predictions(base, old, folder / "second.h5ad")
    assert torch.equal(predictions(model, new, folder / "second.h5ad"), expected)


def test_steps_move_everything(folder):
    run(folder, "moved", "second")
    before, after = weights(folder / "base"), weights(folder / "moved")
    assert [
        name for name in before if before[name].shape == after[name].shape and torch.equal(before[name], after[name])
    ] == []


def test_options_of_training_may_differ(folder):
    run(
        folder,
        "options",
        "second",
        {},
        {"pretrained": str(folder / "base"), "set_size": 6, "loss": "mse", "hidden_size": 64},
    )
    config = json.loads((folder / "options" / "config.json").read_text())
    assert (config["set_size"], config["loss"], config["num_perturbations"], config["num_contexts"]) == (6, "mse", 4, 5)
    assert json.loads((folder / "options" / "processor_config.json").read_text())["set_size"] == 6


def test_names_of_columns_may_differ(folder):
    adata = ad.read_h5ad(folder / "second.h5ad")
    adata.obs = adata.obs.rename(columns={"perturbation": "guide", "cell_type": "line"})
    adata.obs["guide"] = adata.obs["guide"].cat.rename_categories({"control": "NT"})
    adata.layers["raw"], adata.X = adata.X, np.log1p(adata.X)
    adata.write_h5ad(folder / "renamed.h5ad")
    names = {"perturbation_key": "guide", "context_key": "line", "control": "NT", "input": "layers/raw"}
    run(folder, "renamed", "renamed", names, max_steps=2)
    run(folder, "plain", "second", max_steps=2)
    one, other = weights(folder / "renamed"), weights(folder / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)
    processor = StateProcessor.from_pretrained(folder / "renamed")
    assert (processor.perturbation_key, processor.control, processor.input) == ("guide", "NT", "layers/raw")


def test_a_list_of_genes_changes_those_of_the_checkpoint(folder):
    genes = [f"gene_{i}" for i in range(30, 4, -1)]
    run(folder, "genes", "second", {"genes": genes}, learning_rate=0.0, max_steps=1)
    assert StateProcessor.from_pretrained(folder / "genes").vocabulary.genes == genes
    before, after = weights(folder / "base"), weights(folder / "genes")
    columns = [StateProcessor.from_pretrained(folder / "base").vocabulary.genes.index(name) for name in genes]
    assert torch.equal(after["cell_encoder.layers.0.weight"], before["cell_encoder.layers.0.weight"][:, columns])
    assert torch.equal(after["output_head.layers.0.weight"], before["output_head.layers.0.weight"][columns])


def test_a_store_trains_further_as_the_file_does(folder):
    content = {"data": {"datasets": {"screen": str(folder / "second.h5ad")}, "batch_key": "batch"}}
    (folder / "prepare.yaml").write_text(yaml.safe_dump(content))
    words = ["prepare", "--config", str(folder / "prepare.yaml"), "--output", str(folder / "store"), "--quiet"]
    assert pertstate.cli.main(words[:5]) == 0
    run(folder, "from_file", "second", max_steps=3)
    run(folder, "from_store", "second", {"datasets": None, "store": str(folder / "store")}, max_steps=3)
    one, other = weights(folder / "from_file"), weights(folder / "from_store")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(KeyError, match="1 of 2 listed genes are not in the data: .'gene_99'"):
        run(folder, "x", "second", {"datasets": None, "store": str(folder / "store"), "genes": ["gene_1", "gene_99"]})


def test_a_stream_trains_further_as_the_file_does(folder):
    """Both start from the same weights and names. Only the order of sentences differs in a stream."""
    data = {"datasets": {"screen": str(folder / "second.h5ad")}, "batch_key": "batch"}
    store = prepare(DataArguments(**data), folder / "streamed", quiet=True)
    content = {
        "stream": {"path": str(store.path), "block_size": 64},
        "model": {"pretrained": str(folder / "base")},
        "training": {**TRAINING, "output_dir": str(folder / "from_stream"), "learning_rate": 0.0, "max_steps": 1},
    }
    (folder / "stream.yaml").write_text(yaml.safe_dump(content))
    train.main([str(folder / "stream.yaml")])
    run(folder, "of_files", "second", learning_rate=0.0, max_steps=1)
    one, other = weights(folder / "from_stream"), weights(folder / "of_files")
    assert all(torch.equal(one[name], other[name]) for name in other)
    of_stream, of_files = (StateProcessor.from_pretrained(folder / name) for name in ("from_stream", "of_files"))
    assert of_stream.to_dict() == of_files.to_dict() and of_stream.vocabulary == of_files.vocabulary


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "hidden_size", 32, "model.hidden_size=32 contradicts the checkpoint .*, which has 64; leave it out"),
        ("model", "preset", "small", "model.preset='small': the sizes are those of the checkpoint"),
        ("model", "model_type", "state-pseudobulk", "model.model_type='state-pseudobulk' contradicts .* has 'state'"),
        (
            "model",
            "residual",
            "none",
            "model.residual='none' contradicts .* These may differ: set_size, hidden_dropout",
        ),
        ("model", "hiden_size", 64, "unknown field 'hiden_size' in section 'model'; did you mean 'hidden_size'"),
        ("model", "feature_chunks", 99, "feature_chunks=99 exceeds output_dim=40"),
        ("data", "normalize", "none", "data.normalize='none' contradicts the checkpoint .*, which has counts_to_log1p"),
        ("data", "target_sum", 1e6, "data.target_sum=1000000.0 contradicts .* has 10000.0"),
        (
            "data",
            "genes",
            20,
            r"data.genes=20 contradicts .* its own 40 \(a list of genes, or genes_file, changes them\)",
        ),
        ("data", "hvg_on_all", True, "data.hvg_on_all=True contradicts"),
        ("data", "input", "obsm/X_pca", "data.input='obsm/X_pca' contradicts .* which has 'X', log1p values"),
        ("data", "test_contexts", ["type_3", "type_4"], "the splits leave no cell for training"),
        ("training", "train_fully", ["output_head"], "train_fully: no effect without lora_rank"),
        ("training", "lora_rank", 0, "lora_rank must be at least 1, found 0; null trains the model itself"),
        (
            "training",
            "freeze_backbone",
            "with lora",
            "freeze_backbone=true: with lora_rank the backbone is frozen already",
        ),
    ],
)
def test_what_contradicts_the_checkpoint_is_named(folder, tmp_path, section, field, value, message):
    content = {
        "data": {"datasets": {"screen": str(folder / "second.h5ad")}},
        "model": {"pretrained": str(folder / "base")},
        "training": {**TRAINING, "output_dir": str(tmp_path / "run")},
    }
    if value == "with lora":
        content["training"] |= {"lora_rank": 2, "freeze_backbone": True}
    else:
        content.setdefault(section, {})[field] = value
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        train.main([str(tmp_path / "run.yaml")])
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="model.pretrained .*nowhere: no such checkpoint folder"):
        run(folder, "x", "second", {}, {"pretrained": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="expected a checkpoint, found a folder without config.json"):
        run(folder, "x", "second", {}, {"pretrained": str(tmp_path)})
    with pytest.raises(
        ValueError, match="model.pretrained_revision='v1': only a Hub repository has revisions, and .*base is a folder"
    ):
        run(folder, "x", "second", {}, {"pretrained": str(folder / "base"), "pretrained_revision": "v1"})
    run(folder, "fitted", "first", {}, {"model_type": "state-perturbation-mean"})
    with pytest.raises(
        ValueError, match="state-perturbation-mean is fitted in one pass, there is nothing to train further"
    ):
        run(folder, "x", "second", {}, {"pretrained": str(folder / "fitted")})
    for field, options in (
        ("training.lora_rank", {"lora_rank": 4}),
        ("training.freeze_backbone", {"freeze_backbone": True}),
    ):
        with pytest.raises(ValueError, match=f"{field}: only for training a checkpoint further; name one that"):
            run(folder, "x", "first", {}, {"preset": "tiny"}, **options)
    with pytest.raises(ValueError, match="data.controls_only: only for training a checkpoint further"):
        run(folder, "x", "first", {"controls_only": True}, {"preset": "tiny"})
    with pytest.raises(ValueError, match="model.pretrained_revision: only for training a checkpoint further"):
        run(folder, "x", "first", {}, {"preset": "tiny", "pretrained_revision": "main"})


def test_the_model_says_whether_it_reads_published_weights(folder, tmp_path):
    assert [name for name, family in FAMILIES.items() if family.model.reads_published] == ["state-scgpt"]
    for family in FAMILIES:
        assert is_published({"model_type": family, "pretrained": str(tmp_path)}) == (family == "state-scgpt")
    # A checkpoint of this package, a name on the Hub, and a run without a family do not have published weights.
    assert not is_published({"model_type": "state-scgpt", "pretrained": str(folder / "base")})
    assert not is_published({"model_type": "state-scgpt", "pretrained": "ada/model"})
    assert not is_published({"pretrained": str(tmp_path)})


def test_flags_start_from_a_checkpoint(folder):
    path = folder / "flags.yaml"
    path.write_text(yaml.safe_dump({"data": {"datasets": str(folder / "second.h5ad")}, "training": TRAINING}))
    words = ["--pretrained", folder / "base", "--output_dir", folder / "flags", "--lora_rank", "2", "--set_size", "6"]
    train.main([str(path), *map(str, words), "--train_fully", "output_head"])
    saved = json.loads((folder / "flags" / "adapter_config.json").read_text())
    assert saved["r"] == 2 and saved["modules_to_save"] == ["output_head", "perturbation_encoder.embedding"]
    assert json.loads((folder / "flags" / "processor_config.json").read_text())["set_size"] == 6


# Less than everything


def test_a_frozen_backbone_keeps_its_weights(folder):
    options = {"freeze_backbone": True, "save_strategy": "steps", "save_steps": 3}
    run(folder, "frozen", "second", **options, max_steps=3)
    # Loading makes every parameter a trainable one; a run that continues freezes again.
    run(folder, "frozen", "second", **options, resume_from_checkpoint="last")
    before, after = weights(folder / "base"), weights(folder / "frozen")
    still = {
        name for name in before if before[name].shape == after[name].shape and torch.equal(before[name], after[name])
    }
    assert still == {name for name in before if name.startswith("backbone.")}
    run(folder, "sum", "first", {}, {"model_type": "state-embed-sum", "preset": "tiny", "set_size": 8}, max_steps=1)
    with pytest.raises(ValueError, match="state-embed-sum has no backbone that could be frozen; its parts are"):
        run(folder, "x", "second", {}, {"pretrained": str(folder / "sum")}, freeze_backbone=True)


def test_control_cells_alone_are_enough(folder):
    run(folder, "controls", "controls", {"controls_only": True})
    before, after = weights(folder / "base"), weights(folder / "controls")
    rows = "perturbation_encoder.embedding.weight"
    # No perturbation was seen, so the rows of perturbations stay as they were. All other weights moved.
    assert torch.equal(before[rows], after[rows])
    assert {name for name in before if torch.equal(before[name], after[name])} == {rows}
    vocabulary = StateProcessor.from_pretrained(folder / "controls").vocabulary
    assert vocabulary.contexts == ["type_0", "type_1", "type_2", "type_4"]
    assert vocabulary.perturbations == ["pert_0", "pert_1", "pert_2"]
    with pytest.raises(ValueError, match="the splits leave no cell for training"):
        run(folder, "x", "controls")
    with pytest.raises(ValueError, match="controls_only=true trains on the control cells of all contexts, so"):
        run(folder, "x", "controls", {"controls_only": True, "heldout_controls": False})


def test_perturbed_cells_beside_the_controls_are_only_scored(folder):
    """A file with only the controls gives the same bits. The held-out cells are predicted and scored."""
    adata = ad.read_h5ad(folder / "second.h5ad")
    adata[adata.obs["perturbation"] != "pert_3"].write_h5ad(folder / "known.h5ad")
    held = {"controls_only": True, "contexts": ["type_4"], "test_contexts": ["type_4"]}
    metrics = run(folder, "beside", "known", held)
    run(folder, "unheld", "known", {"controls_only": True, "contexts": ["type_4"]})
    run(folder, "alone", "controls", {"controls_only": True})
    alone = weights(folder / "alone")
    for name in ("beside", "unheld"):
        found = weights(folder / name)
        assert all(torch.equal(found[key], alone[key]) for key in alone)
    assert np.isfinite(metrics["test_energy"]) and metrics["test_mae"] != metrics["test_no_change_mae"]
    # No perturbed cell is trained on here. The baseline knows the changes that the checkpoint was trained on, as the model does.
    assert np.isfinite(metrics["test_perturbation_mean_mae"])


def test_fine_tuning_on_a_new_cell_type_beats_training_from_scratch(tmp_path):
    """Both take equal steps on the same 8 cells of each perturbation. The score is the mean error of the mean of the others."""
    names = ["pert_0", "pert_1", "pert_2"]
    adata = simulate_screen(
        num_contexts=12, num_perturbations=len(names), num_genes=80, cells_per_group=32, effect=2.0, seed=7
    )
    of_new = (adata.obs["cell_type"] == "type_11").to_numpy()
    control = (adata.obs["perturbation"] == "control").to_numpy()
    first = adata.obs.groupby(["cell_type", "perturbation"], observed=True).cumcount().to_numpy() < 8
    adata[~of_new].write_h5ad(tmp_path / "many.h5ad")
    adata[of_new & (control | first)].write_h5ad(tmp_path / "few.h5ad")
    held_out = adata[of_new & (control | ~first)]
    scratch = {"preset": "tiny", "set_size": 16}
    steps = {"max_steps": 400, "learning_rate": 3e-3, "lr_scheduler_type": "linear", "per_device_train_batch_size": 8}
    run(tmp_path, "base", "many", {}, scratch, **steps)
    run(tmp_path, "scratch", "few", {}, scratch, max_steps=20)
    run(tmp_path, "further", "few", max_steps=20)
    run(tmp_path, "lora", "few", max_steps=20, lora_rank=4, train_fully=["output_head"])
    errors = {}
    for run_name in ("scratch", "further", "lora"):
        model, processor = load_whole(str(tmp_path / run_name))
        means = {
            name: processor.features(held_out[(held_out.obs["perturbation"] == name).to_numpy()]).mean(axis=0)
            for name in ("control", *names)
        }
        of_run = []
        for name in names:
            sentences = processor(held_out, perturbation=name)
            with torch.inference_mode():
                predicted = model.eval()(**sentences).predictions[sentences["cell_mask"]].numpy()
            of_run.append(np.abs(predicted.mean(axis=0) - means[name]).mean())
        errors[run_name] = np.mean(of_run)
    no_change = np.mean([np.abs(means["control"] - means[name]).mean() for name in names])
    assert errors["scratch"] < no_change
    assert errors["further"] < 0.85 * errors["scratch"] and errors["lora"] < 0.85 * errors["scratch"]


def test_the_documented_lines_run(tmp_path, monkeypatch):
    """The files and the code of docs/fine_tuning.md run after a demonstration of two steps."""
    root = Path(__file__).parents[2]
    blocks = re.findall(r"```(\w*)\n(.*?)```", (root / "docs" / "fine_tuning.md").read_text(), flags=re.DOTALL)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    simulate_screen(seed=0).write_h5ad("demo/screen.h5ad")
    short = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
    train.main([str(root / "configs" / "demo.yaml"), *short, "--eval_strategy", "no", "--save_strategy", "no"])
    files = [text for kind, text in blocks if kind == "yaml"]
    for text in files:
        name = text.split()[1]
        Path(name).write_text(text)
        train.main([name, *short])
    commands = next(text for kind, text in blocks if kind == "bash").splitlines()
    assert [line.split("#")[0].split()[:3] for line in commands] == [
        ["pertstate", "train", "further.yaml"],
        ["pertstate", "train", "further.yaml"],
        ["pertstate", "merge", "demo/adapter"],
    ]
    train.main([*commands[1].split("#")[0].split()[2:], *short])
    assert pertstate.cli.main(commands[2].split("#")[0].split()[1:]) == 0
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for kind, text in blocks:
            if kind == "python":
                exec(text, names)
    assert printed.getvalue() == next(text for kind, text in blocks if kind == "")
    processor = AutoProcessor.from_pretrained("demo/adapter")
    sentences = processor(ad.read_h5ad("demo/screen.h5ad"), perturbation="pert_1", context="type_11")
    with torch.inference_mode():
        found = names["model"](**sentences).predictions
        expected = AutoModel.from_pretrained("demo/merged").eval()(**sentences).predictions
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
