"""`pertstate info` of checkpoints and adapters."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.cli import main
from pertstate.data import simulate_screen
from pertstate.hub.card import render_card


@pytest.fixture(scope="module")
def processor() -> StateProcessor:
    adata = simulate_screen(num_contexts=2, num_perturbations=3, num_genes=12, cells_per_group=6, seed=0)
    return StateProcessor.fit(adata, set_size=4, batch_key="batch")


@pytest.fixture
def model(processor) -> StateForPerturbation:
    torch.manual_seed(0)
    return StateForPerturbation(StateConfig.from_preset("tiny", input_dim=12, num_perturbations=3, set_size=4))


def said(capsys, folder) -> str:
    assert main(["info", str(folder)]) == 0
    return capsys.readouterr().out


def test_the_whole_text_of_a_checkpoint(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (
        said(capsys, tmp_path)
        == f"""\
{tmp_path}: checkpoint of state, {model.num_parameters():,} parameters
reads: counts, scaled to 10,000 per cell and log1p from X, 12 features; sentences of 4 cells
columns: perturbation 'perturbation' (control 'control'), context 'cell_type', batch 'batch'
genes (12): ['gene_0', 'gene_1', 'gene_2', 'gene_3', 'gene_4'] and 7 more
perturbations (3): ['pert_0', 'pert_1', 'pert_2']
contexts (2): ['type_0', 'type_1']
ready: pertstate predict --model {tmp_path} --adata CELLS.h5ad --output PREDICTED.h5ad
"""
    )


def test_the_column_of_doses_is_named(tmp_path, capsys):
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=12, cells_per_group=6, seed=0)
    adata.obs["uM"] = np.where(adata.obs["perturbation"] == "control", 0.0, 2.5)
    processor = StateProcessor.fit(adata, set_size=4, dose_key="uM")
    model = StateForPerturbation(StateConfig.from_preset("tiny", **StateConfig.sizes(processor), set_size=4))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "context 'cell_type', dose 'uM'\n" in said(capsys, tmp_path)
    card = render_card(None, model.config, processor)
    assert "- `uM`: the dose\n" in card and "- doses trained on: 2 of `uM`: `pert_0@2.5`, `pert_1@2.5`\n" in card


def test_tables_that_are_not_learned_are_no_parameters(processor, tmp_path, capsys):
    model = StateForPerturbation(
        StateConfig.from_preset("tiny", residual="anchor", **StateConfig.sizes(processor), set_size=4)
    )
    assert {name for name, _ in model.named_buffers()} <= {*model.state_dict()} and list(model.buffers())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (
        said(capsys, tmp_path).splitlines()[0].endswith(f": checkpoint of state, {model.num_parameters():,} parameters")
    )


def test_a_checkpoint_in_shards(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    text = said(capsys, tmp_path)
    first, *_, last = text.splitlines()
    assert first == f"{tmp_path}: checkpoint of state, {model.num_parameters():,} parameters in {len(shards)} files"
    assert last.startswith("ready: pertstate predict")
    shards[1].unlink()
    text = said(capsys, tmp_path)
    assert text.splitlines()[0] == f"{tmp_path}: checkpoint of state" and "genes (12)" in text
    assert "before it can be used:" in text and f"names '{shards[1].name}', which is not there" in text


def test_a_checkpoint_that_lacks_files(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    text = said(capsys, tmp_path)
    assert text.endswith("before it can be used:\n- vocabulary.json is missing: nobody knows which gene is which\n")
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "- " + str(weights) + ": its weights are not a whole safetensors file" in said(capsys, tmp_path)
    weights.unlink()
    assert "expected weights in model.safetensors or model.safetensors.index.json, found neither" in said(
        capsys, tmp_path
    )


def test_an_adapter(model, processor, tmp_path, capsys):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model.name_or_path = str(base)
    targets = model.lora_targets(False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=["output_head"])
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    text = said(capsys, folder)
    parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lines = text.splitlines()
    assert lines[:4] == [
        f"{folder}: adapter of rank 3, alpha 6, {parameters:,} parameters",
        f"base model: {base}",
        f"adapted: {len(targets)} layers, {sorted(targets)[:3]} and {len(targets) - 3} more",
        "trained whole: ['output_head']",
    ]
    assert "perturbations (3): ['pert_0', 'pert_1', 'pert_2']" in lines
    assert lines[-1] == f"ready: pertstate predict --model {folder} --adata CELLS.h5ad --output PREDICTED.h5ad"

    saved = json.loads((folder / "adapter_config.json").read_text())
    changed = {**saved, "base_model_name_or_path": str(tmp_path / "gone"), "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    (folder / "adapter_model.safetensors").unlink()
    text = said(capsys, folder)
    assert "trained whole" not in text
    assert "expected the adapter's weights in adapter_model.safetensors, found none" in text
    assert f"base model {tmp_path / 'gone'}: no such checkpoint folder" in text
    (folder / "adapter_config.json").write_text(json.dumps({**saved, "peft_type": "IA3"}))
    assert main(["info", str(folder)]) == 1
    assert "peft_type is 'IA3', expected 'LORA', a low-rank adapter" in capsys.readouterr().err
    (folder / "adapter_config.json").write_text(
        json.dumps({**saved, "base_model_name_or_path": "someone/model", "revision": "abc"})
    )
    assert "base model: someone/model at abc\n" in said(capsys, folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"modules_to_save": [1, "a"]},
        {"r": None},
        {"target_modules": {"a": 1}},
        {"base_model_name_or_path": 5},
        {"lora_alpha": "x"},
        {"peft_type": ["LORA"]},
    ],
)
def test_settings_of_an_adapter_that_are_none_are_told(tmp_path, capsys, entries):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **entries}))
    code = main(["info", str(tmp_path)])
    said = capsys.readouterr()
    assert code in (0, 1) and "Traceback" not in said.err and next(iter(entries)) in said.out + said.err, said
