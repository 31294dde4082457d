"""Low-rank adapters: what a run of them trains and writes, how they load, merge and continue."""

import json
import os
import shutil
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pytest
import torch
import yaml
from finetuning_runs import TRAINING, make_folder, predictions, run, weights
from huggingface_hub import HfApi
from transformers import AutoModel, AutoProcessor

import pertstate.cli
from pertstate.hub.checkpoints import load_adapter, load_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("finetuning"))


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter with rows of a new perturbation."""
    run(folder, "adapter", "second", lora_rank=3, lora_alpha=6, lora_mlp=True, train_fully=["output_head"])
    return folder / "adapter"


@pytest.fixture(scope="module")
def merged(folder, adapter) -> Path:
    assert pertstate.cli.main(["merge", str(adapter), str(folder / "merged")]) == 0
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
    # All its weights have moved: B starts at 0, the others start from the checkpoint.
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
    """These are the lines of docs/fine_tuning.md."""
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
    """Its base model is found, and is resized to its vocabulary if that has new names."""
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
        assert pertstate.cli.main([*map(str, words), "--output", str(folder / f"{name}.h5ad"), "--quiet"]) == 0
    one, other = (ad.read_h5ad(folder / f"{name}.h5ad") for name in ("adapter", "merged"))
    np.testing.assert_allclose(one.X, other.X, atol=1e-5)
    assert len(one) == 32


def test_merging_looks_for_the_base_where_it_is_told(folder, adapter, merged, tmp_path, capsys):
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    saved = json.loads((moved / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(saved))
    assert pertstate.cli.main(["merge", str(moved), str(tmp_path / "out")]) == 1
    assert "(--base names another one)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert pertstate.cli.main(["merge", str(moved), str(tmp_path / "out"), "--base", str(folder / "base")]) == 0
    one, other = weights(tmp_path / "out"), weights(merged)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_merged_says_so(folder, adapter, tmp_path, capsys):
    def refused(*words) -> str:
        assert pertstate.cli.main(["merge", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "is no adapter: expected adapter_config.json" in refused(folder / "base", tmp_path / "out")
    assert "is the adapter's own folder" in refused(adapter, adapter)
    assert "no such checkpoint folder" in refused(tmp_path / "none", tmp_path / "out")
    assert "is a revision of --base; give both" in refused(adapter, tmp_path / "out", "--base-revision", "main")
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
    with pytest.raises(ValueError, match="is an adapter .*; make a checkpoint of it first: pertstate merge"):
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
    from pertstate.training.arguments import StateTrainingArguments
    from pertstate.training.lora import add_adapter

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
    with pytest.raises(ValueError, match="'backbone.layers.0.attention_norm' ends like one of .'norm'., so peft would"):
        add_adapter(model, args, [], None)
    with pytest.raises(ValueError, match=".'dispersion'. got rows for new names, and belong to no layer"):
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
    """Batch normalisation beside adapters stays as it is, with its running statistics."""
    section = {"model_type": family, "preset": "tiny", "set_size": 8, **fields}
    run(folder, family, "first", {"batch_key": "batch", **data}, section, max_steps=1)
    run(folder, f"{family}-lora", "second", {}, {"pretrained": str(folder / family)}, lora_rank=2, max_steps=3)
    adapted, processor = load_adapter(str(folder / f"{family}-lora"))
    merged = tmp_path / "merged"
    assert pertstate.cli.main(["merge", str(folder / f"{family}-lora"), str(merged)]) == 0
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
    """Both are on the Hub. The base is taken at the revision on which the adapter was trained."""
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
    commit = api.upload_folder(repo_id="ada/adapter", folder_path=local).oid
    content = {
        "data": {"datasets": {"screen": str(folder / "second.h5ad")}},
        "model": {"pretrained": "ada/base", "pretrained_revision": "main"},
        "training": {**TRAINING, "output_dir": str(tmp_path / "run"), "lora_rank": 2, "max_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    # transformers reads where the Hub is when it is imported.
    script = """
import sys, pertstate.cli
from pertstate import train
assert pertstate.cli.main(["merge", "ada/adapter", sys.argv[1]]) == 0
train.main([sys.argv[2]])
from transformers import AutoModel
assert AutoModel.from_pretrained("ada/adapter").config.num_perturbations == 4
"""
    done = launches.run(["-c", script, tmp_path / "out", tmp_path / "run.yaml"], {**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    made = f"from the adapter `ada/adapter`, revision `{commit}`, and its base model `ada/base`, revision `{revision}`."
    assert made in (tmp_path / "out" / "README.md").read_text()
    one, other = weights(tmp_path / "out"), weights(merged)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("ada/base", newest)
