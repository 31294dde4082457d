"""Runs that start from a checkpoint: all of it, its adapters, its heads, or on control cells alone."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import cellstate_cli
from cellstate import StateProcessor, train
from cellstate.data import simulate_screen
from cellstate.hub.checkpoints import load_adapter, load_whole


TRAINING = {
    "max_steps": 6,
    "logging_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """
    A screen in three files: `first.h5ad` of three cell types and three perturbations, `second.h5ad` of two other cell
    types with one perturbation more, `controls.h5ad` of control cells of the last type; and `base`, trained on the first.
    """
    folder = tmp_path_factory.mktemp("finetuning")
    adata = simulate_screen(num_contexts=5, num_perturbations=4, num_genes=40, cells_per_group=16, seed=1)
    types, names = adata.obs["cell_type"], adata.obs["perturbation"]
    first = types.isin(["type_0", "type_1", "type_2"]) & (names != "pert_3")
    adata[first].write_h5ad(folder / "first.h5ad")
    adata[types.isin(["type_3", "type_4"])].write_h5ad(folder / "second.h5ad")
    adata[(types == "type_4") & (names == "control")].write_h5ad(folder / "controls.h5ad")
    run(folder, "base", "first", {"batch_key": "batch"}, {"preset": "tiny", "set_size": 8})
    return folder


def run(folder: Path, name: str, file: str, data: dict | None = None, model: dict | None = None, **training) -> dict:
    """The figures of a run that writes `folder / name`."""
    content = {
        "data": {"datasets": {"screen": str(folder / f"{file}.h5ad")}, **(data or {})},
        "model": {"pretrained": str(folder / "base")} if model is None else model,
        "training": {**TRAINING, "output_dir": str(folder / name), **training},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return train.main([str(path)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(
        path / ("model.safetensors" if (path / "model.safetensors").exists() else "adapter_model.safetensors")
    )


def predictions(model, processor, file: Path, perturbation: str = "pert_1") -> torch.Tensor:
    sentences = processor(ad.read_h5ad(file), perturbation=perturbation, context="type_3")
    with torch.inference_mode():
        return model.eval()(**sentences).predictions


# The whole model


def test_a_run_starts_from_the_weights_of_the_checkpoint(folder, caplog):
    """Without any step that moves, the run leaves the checkpoint with the names of the new data."""
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
    assert (new.batch_key, new.normalize, new.set_size) == ("batch", "log1p_cp10k", 8)
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
    assert cellstate_cli.main(words[:5]) == 0
    run(folder, "from_file", "second", max_steps=3)
    run(folder, "from_store", "second", {"datasets": None, "store": str(folder / "store")}, max_steps=3)
    one, other = weights(folder / "from_file"), weights(folder / "from_store")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(KeyError, match="1 of 2 listed genes are not in the data: .'gene_99'"):
        run(folder, "x", "second", {"datasets": None, "store": str(folder / "store"), "genes": ["gene_1", "gene_99"]})


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "hidden_size", 32, "model.hidden_size=32 contradicts the checkpoint .*, which has 64; leave it out"),
        ("model", "preset", "small", "model.preset='small': the sizes are those of the checkpoint"),
        ("model", "model_type", "state-pseudobulk", "model.model_type='state-pseudobulk' contradicts .* has 'state'"),
        ("model", "residual", "none", "model.residual='none' contradicts .* What may differ: set_size, hidden_dropout"),
        ("model", "hiden_size", 64, "unknown field 'hiden_size' in section 'model'; did you mean 'hidden_size'"),
        ("model", "feature_chunks", 99, "feature_chunks=99 exceeds output_dim=40"),
        ("data", "normalize", "none", "data.normalize='none' contradicts the checkpoint .*, which has log1p_cp10k"),
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
        ("stream", "path", "somewhere", "trained further on files or a store, found a stream; make a store of it"),
        ("training", "train_fully", ["output_head"], "train_fully: without effect as there is no lora_rank"),
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
    with pytest.raises(ValueError, match="model.pretrained_revision='v1' is of a Hub repository, .*base is a folder"):
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
        with pytest.raises(ValueError, match=f"{field}: is for a checkpoint that is trained further; name one that"):
            run(folder, "x", "first", {}, {"preset": "tiny"}, **options)
    with pytest.raises(ValueError, match="data.controls_only: is for a checkpoint that is trained further"):
        run(folder, "x", "first", {"controls_only": True}, {"preset": "tiny"})
    with pytest.raises(ValueError, match="model.pretrained_revision: is for a checkpoint that is trained further"):
        run(folder, "x", "first", {}, {"preset": "tiny", "pretrained_revision": "main"})


def test_flags_start_from_a_checkpoint(folder):
    path = folder / "flags.yaml"
    path.write_text(yaml.safe_dump({"data": {"datasets": str(folder / "second.h5ad")}, "training": TRAINING}))
    words = ["--pretrained", folder / "base", "--output_dir", folder / "flags", "--lora_rank", "2", "--set_size", "6"]
    train.main([str(path), *map(str, words), "--train_fully", "output_head"])
    saved = json.loads((folder / "flags" / "adapter_config.json").read_text())
    assert saved["r"] == 2 and saved["modules_to_save"] == ["output_head", "perturbation_encoder.embedding"]
    assert json.loads((folder / "flags" / "processor_config.json").read_text())["set_size"] == 6


# Adapters


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter with rows of a new perturbation."""
    run(folder, "adapter", "second", lora_rank=3, lora_alpha=6, lora_mlp=True, train_fully=["output_head"])
    return folder / "adapter"


@pytest.fixture(scope="module")
def merged(folder, adapter) -> Path:
    assert cellstate_cli.main(["merge", str(adapter), str(folder / "merged")]) == 0
    return folder / "merged"


def test_an_adapter_folder_holds_what_was_trained_and_nothing_else(folder, adapter):
    names = {path.name for path in adapter.iterdir()}
    needed = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "processor_config.json",
        "vocabulary.json",
        "README.md",
    }
    assert needed | {"training_args.json"} <= names
    assert not names & {"config.json", "model.safetensors", ".partial", "adapter_config.json.partial"}
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder / "base") and saved["revision"] is None
    assert (saved["r"], saved["lora_alpha"], len(saved["target_modules"])) == (3, 6, 2 * 5)
    tensors = weights(adapter)
    assert tensors["base_model.model.backbone.layers.1.attention.qkv_proj.lora_A.weight"].shape == (3, 64)
    assert tensors["base_model.model.perturbation_encoder.embedding.weight"].shape == (4, 64)
    whole = {name for name in tensors if "lora" not in name}
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in whole} == {
        "output_head",
        "perturbation_encoder",
    }
    # Everything that it holds has moved: B starts at 0, the others from the checkpoint.
    base = weights(folder / "base")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            assert tensor.abs().max() > 0, name
        elif "lora" not in name:
            known = base[name.removeprefix("base_model.model.")]
            assert not torch.equal(tensor[: len(known)], known), name
    card = (adapter / "README.md").read_text()
    assert "## Training data" in card and "pert_3" in card


def test_a_merged_adapter_is_a_checkpoint_like_any_other(folder, adapter, merged):
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_state.py", "README.md", "training_args.json"} <= names
    assert not any(name.startswith("adapter") for name in names)
    model, processor = AutoModel.from_pretrained(merged), AutoProcessor.from_pretrained(merged)
    adapted, of_adapter = load_adapter(str(adapter))
    for name in ("pert_0", "pert_3"):
        expected = predictions(adapted, of_adapter, folder / "second.h5ad", name)
        found = predictions(model, processor, folder / "second.h5ad", name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    base, of_base = load_whole(str(folder / "base"))
    assert (predictions(base, of_base, folder / "second.h5ad") - found).abs().max() > 1e-3
    before, after = weights(folder / "base"), weights(merged)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "cell_encoder.layers.0.weight" in same and "backbone.norm.weight" in same
    assert "backbone.layers.0.attention.qkv_proj.weight" not in same and "output_head.layers.0.weight" not in same
    # It can be trained further itself.
    run(folder, "again", "second", {}, {"pretrained": str(merged)}, lora_rank=2, max_steps=1)
    assert json.loads((folder / "again" / "adapter_config.json").read_text())["modules_to_save"] is None


def test_peft_loads_an_adapter_on_a_resized_base(folder, adapter, merged):
    """As docs/fine_tuning.md says."""
    from peft import PeftModel

    processor = AutoProcessor.from_pretrained(adapter)
    expected = predictions(AutoModel.from_pretrained(merged), processor, folder / "second.h5ad")

    def base():
        model = AutoModel.from_pretrained(folder / "base")
        model.resize_vocabulary(AutoProcessor.from_pretrained(folder / "base").vocabulary, processor.vocabulary)
        return model

    by_peft = PeftModel.from_pretrained(base(), adapter)
    torch.testing.assert_close(predictions(by_peft, processor, folder / "second.h5ad"), expected, atol=1e-5, rtol=0)
    model = base()
    model.load_adapter(str(adapter))
    torch.testing.assert_close(predictions(model, processor, folder / "second.h5ad"), expected, atol=1e-5, rtol=0)


def test_an_adapter_loads_by_its_name_alone(folder, adapter, merged):
    """Its base model is found and resized to its vocabulary, where it has new names."""
    run(folder, "same_names", "first", lora_rank=2)
    assert json.loads((folder / "same_names" / "adapter_config.json").read_text())["modules_to_save"] is None
    adapted, processor = load_adapter(str(folder / "same_names"))
    expected = predictions(adapted, processor, folder / "second.h5ad")
    found = predictions(AutoModel.from_pretrained(folder / "same_names"), processor, folder / "second.h5ad")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    processor = AutoProcessor.from_pretrained(adapter)
    model = AutoModel.from_pretrained(adapter)
    assert model.config.num_perturbations == 4
    expected = predictions(AutoModel.from_pretrained(merged), processor, folder / "second.h5ad", "pert_3")
    found = predictions(model, processor, folder / "second.h5ad", "pert_3")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    model = AutoModel.from_pretrained(folder / "base")
    model.load_adapter(str(adapter))
    torch.testing.assert_close(
        predictions(model, processor, folder / "second.h5ad", "pert_3"), expected, atol=1e-5, rtol=0
    )


def test_prediction_takes_an_adapter(folder, adapter, merged):
    for name in ("adapter", "merged"):
        words = ["predict", "--model", folder / name, "--adata", folder / "controls.h5ad", "--perturbation", "pert_3"]
        assert cellstate_cli.main([*map(str, words), "--output", str(folder / f"{name}.h5ad"), "--quiet"]) == 0
    one, other = (ad.read_h5ad(folder / f"{name}.h5ad") for name in ("adapter", "merged"))
    np.testing.assert_allclose(one.X, other.X, atol=1e-5)
    assert len(one) == 32


def test_merging_looks_for_the_base_where_it_is_told(folder, adapter, merged, tmp_path, capsys):
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    saved = json.loads((moved / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(saved))
    assert cellstate_cli.main(["merge", str(moved), str(tmp_path / "out")]) == 1
    assert "(say where it is with --base)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cellstate_cli.main(["merge", str(moved), str(tmp_path / "out"), "--base", str(folder / "base")]) == 0
    one, other = weights(tmp_path / "out"), weights(merged)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_merged_says_so(folder, adapter, tmp_path, capsys):
    def refused(*words) -> str:
        assert cellstate_cli.main(["merge", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "is no adapter: expected adapter_config.json" in refused(folder / "base", tmp_path / "out")
    assert "is the adapter's own folder" in refused(adapter, adapter)
    assert "no such checkpoint folder" in refused(tmp_path / "none", tmp_path / "out")
    assert "is of --base; give both" in refused(adapter, tmp_path / "out", "--base-revision", "main")
    assert "is a file; name a folder" in refused(adapter, folder / "first.h5ad")
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    torch.save(weights(adapter), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert "expected the adapter's weights in adapter_model.safetensors, found none" in refused(
        pickled, tmp_path / "out"
    )
    run(
        folder,
        "other",
        "first",
        {"batch_key": "batch"},
        {"preset": "tiny", "hidden_size": 32, "set_size": 8},
        max_steps=1,
    )
    assert "does not fit the base model" in refused(adapter, tmp_path / "out", "--base", folder / "other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is an adapter .*; make a checkpoint of it first: cellstate merge"):
        run(folder, "x", "second", {}, {"pretrained": str(adapter)})


def test_a_run_of_adapters_resumes_to_the_same_bits(folder):
    options = {"lora_rank": 2, "lora_dropout": 0.2, "save_strategy": "steps", "save_steps": 3}
    run(folder, "unbroken", "second", **options)
    run(folder, "broken", "second", **options, max_steps=3)
    names = {path.name for path in (folder / "broken" / "checkpoint-3").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "vocabulary.json", "optimizer.pt"} <= names
    assert not names & {"config.json", "model.safetensors"}
    run(folder, "broken", "second", **options, resume_from_checkpoint="last")
    one, other = weights(folder / "unbroken"), weights(folder / "broken")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(
        *(
            weights(folder / "unbroken" / f"checkpoint-{n}")["base_model.model.perturbation_encoder.embedding.weight"]
            for n in (3, 6)
        )
    )


def test_the_best_adapter_is_kept(folder):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    run(folder, "best", "second", {"val_contexts": ["type_4"]}, lora_rank=2, learning_rate=5.0, **options)
    state = json.loads((folder / "best" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 6
    best, kept = weights(folder / "best" / f"checkpoint-{state['best_global_step']}"), weights(folder / "best")
    assert all(torch.equal(best[name], kept[name]) for name in best)


def test_every_layer_but_adapters_and_named_parts_is_frozen(folder):
    from cellstate.training.arguments import StateTrainingArguments
    from cellstate.training.lora import add_adapter

    args = StateTrainingArguments(lora_rank=2, train_fully=["cell_encoder"], use_cpu=True)
    grown = ["perturbation_encoder.embedding.weight"]
    adapted = add_adapter(AutoModel.from_pretrained(folder / "base"), args, grown, "a1b2c3")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    parts = {name.split("model.model.")[1].split(".modules_to_save")[0] for name in trained if "lora_" not in name}
    assert parts == {"cell_encoder", "perturbation_encoder.embedding"}
    assert adapted.peft_config["default"].revision == "a1b2c3"
    assert adapted.peft_config["default"].lora_alpha == 2
    args.train_fully = ["backbone"]
    with pytest.raises(
        ValueError, match="leaves no layer for adapters; leave lora_rank out, or train fewer parts whole"
    ):
        add_adapter(AutoModel.from_pretrained(folder / "base"), args, [], None)
    args.train_fully = ["backbone.norm"]
    add_adapter(AutoModel.from_pretrained(folder / "base"), args, [], None)
    args.train_fully = ["backbone.layers.0.attention_norm"]
    add_adapter(AutoModel.from_pretrained(folder / "base"), args, [], None)
    model = AutoModel.from_pretrained(folder / "base")
    model.norm = torch.nn.LayerNorm(64)
    args.train_fully = ["norm"]
    with pytest.raises(
        ValueError, match="'backbone.layers.0.attention_norm' ends like one of .'norm'., and peft would"
    ):
        add_adapter(model, args, [], None)
    with pytest.raises(ValueError, match="new names gave .'dispersion'. rows, which belong to no layer"):
        add_adapter(AutoModel.from_pretrained(folder / "base"), args, ["dispersion"], None)


@pytest.mark.parametrize(
    ("family", "data", "fields"),
    [
        ("state-embed-sum", {}, {}),
        ("state-scvi", {"normalize": "none"}, {}),
        ("state-cpa", {}, {}),
        ("state-scgpt", {}, {"perturbation_type": "chemical"}),
    ],
)
def test_every_kind_of_family_has_adapters(folder, tmp_path, family, data, fields):
    """Batch normalisation beside adapters stays as it is, its running figures too."""
    section = {"model_type": family, "preset": "tiny", "set_size": 8, **fields}
    run(folder, family, "first", {"batch_key": "batch", **data}, section, max_steps=1)
    run(folder, f"{family}-lora", "second", {}, {"pretrained": str(folder / family)}, lora_rank=2, max_steps=3)
    adapted, processor = load_adapter(str(folder / f"{family}-lora"))
    merged = tmp_path / "merged"
    assert cellstate_cli.main(["merge", str(folder / f"{family}-lora"), str(merged)]) == 0
    model = AutoModel.from_pretrained(merged)
    expected = predictions(adapted, processor, folder / "second.h5ad", "pert_3")
    found = predictions(model, processor, folder / "second.h5ad", "pert_3")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    before, after = weights(folder / family), weights(merged)
    moved = {
        name
        for name in before
        if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    }
    assert moved
    norms = {name for name in before if "norm" in name and not name.startswith(("adversaries", "drug_encoder"))}
    assert not norms & moved and bool(norms) == (family != "state-embed-sum")
    if family == "state-cpa":
        assert "adversaries.batch.layers.norms.0.running_mean" in moved


def test_an_adapter_merges_from_the_hub(folder, adapter, merged, hub, tmp_path):
    """Both on the Hub, the base by the revision that the adapter was trained on."""
    api = HfApi()
    for name in ("base", "adapter"):
        api.create_repo(f"ada/{name}")
    revision = api.upload_folder(repo_id="ada/base", folder_path=folder / "base").oid
    run(folder, "newer", "first", {"batch_key": "batch"}, {"preset": "tiny", "set_size": 8}, max_steps=1, seed=1)
    newest = api.upload_folder(repo_id="ada/base", folder_path=folder / "newer").oid
    local = tmp_path / "adapter"
    shutil.copytree(adapter, local)
    saved = json.loads((local / "adapter_config.json").read_text())
    saved |= {"base_model_name_or_path": "ada/base", "revision": revision}
    (local / "adapter_config.json").write_text(json.dumps(saved))
    api.upload_folder(repo_id="ada/adapter", folder_path=local)
    content = {
        "data": {"datasets": {"screen": str(folder / "second.h5ad")}},
        "model": {"pretrained": "ada/base", "pretrained_revision": "main"},
        "training": {**TRAINING, "output_dir": str(tmp_path / "run"), "lora_rank": 2, "max_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    # transformers reads where the Hub is when it is imported.
    script = """
import sys, cellstate_cli
from cellstate import train
assert cellstate_cli.main(["merge", "ada/adapter", sys.argv[1]]) == 0
train.main([sys.argv[2]])
from transformers import AutoModel
assert AutoModel.from_pretrained("ada/adapter").config.num_perturbations == 4
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = weights(tmp_path / "out"), weights(merged)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("ada/base", newest)


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
    # No perturbation was seen, so their rows are as they were; all else moved.
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
    """The same bits as from a file that holds the controls alone; what is held out is predicted and scored."""
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
    # The baseline that adds mean changes knows none.
    assert metrics["test_perturbation_mean_mae"] == metrics["test_no_change_mae"]


def test_fine_tuning_on_a_new_cell_type_beats_training_from_scratch(tmp_path):
    """At equal steps on the same 8 cells of each perturbation, scored on its other cells by the mean error of the mean."""
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
    """The files and code of docs/fine_tuning.md, after a demonstration that took two steps."""
    root = Path(__file__).parents[1]
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
        ["accelerate", "launch", "train.py"],
        ["accelerate", "launch", "train.py"],
        ["cellstate", "merge", "demo/adapter"],
    ]
    train.main([*commands[1].split("#")[0].split()[3:], *short])
    assert cellstate_cli.main(commands[2].split("#")[0].split()[1:]) == 0
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
