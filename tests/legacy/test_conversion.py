"""`pertstate convert`: folders of the published research code become checkpoints that predict the same."""

import json
import os
import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from legacy_writer import BATCHES, CONTEXTS, GENES, HIDDEN, INPUT, PERTURBATIONS, LegacyFolderWriter, one_hot_map
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from test_parity import CASES
from transformers import AutoModel, AutoProcessor

from pertstate.cli import main
from pertstate.data.restricted_pickle import RefusedPickleError
from pertstate.families import FAMILIES
from pertstate.legacy.conversion import convert
from pertstate.legacy.weights import config_from_legacy, state_dict_from_legacy


FAMILY_NAMES = ("state", "old_neuralot", "pseudobulk", "embedsum")


def converted(writer: LegacyFolderWriter, folder: Path, **options):
    """Convert a training folder. Returns the model and the processor of the checkpoint."""
    convert(writer.write(folder / "legacy"), folder / "out", **options)
    return AutoModel.from_pretrained(folder / "out").eval(), AutoProcessor.from_pretrained(folder / "out")


def predictions(model, processor, cells: torch.Tensor, name: str, batches=None) -> torch.Tensor:
    batch = {"control_cells": cells, "perturbation_ids": torch.from_numpy(processor.encode([name])["perturbation_ids"])}
    if batches is not None:
        batch["batch_ids"] = torch.from_numpy(processor.encode_batches(batches))[None]
    with torch.inference_mode():
        return model(**batch).predictions


def fails(writer: LegacyFolderWriter, folder: Path, message: str, error=ValueError, **options):
    """Assert that a conversion gives an error of one line and writes nothing."""
    with pytest.raises(error, match=message) as raised:
        convert(writer.write(folder / "legacy"), folder / "out", **options)
    assert "\n" not in str(raised.value)
    assert not (folder / "out").exists()


# What it predicts


@pytest.mark.shared
def test_the_sample_predicts_as_the_research_code_did(shared, tmp_path, capsys):
    assert main(["convert", str(shared / "legacy"), str(tmp_path / "out")]) == 0
    assert "attention: bidirectional" in capsys.readouterr().out
    model, processor = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModel, AutoProcessor))
    inputs, expected = (load_file(shared / "legacy" / f"{name}.safetensors") for name in ("inputs", "expected"))
    assert processor.vocabulary.perturbations == ["GATA1", "JAK2", "KLF1", "STAT1", "TP53", "non-targeting"]
    assert set(expected) == set(processor.vocabulary.perturbations)
    batches = [processor.vocabulary.batches[i] for i in inputs["batch_ids"][0]]
    for name, wanted in expected.items():
        found = predictions(model.eval(), processor, inputs["control_cells"], name, batches)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    # They differ by more than that between perturbations.
    assert (expected["GATA1"] - expected["non-targeting"]).abs().max() > 0.01


@pytest.mark.shared
@pytest.mark.parametrize("case", CASES)
def test_reference_weights_in_a_folder_predict_the_reference_outputs(shared, tmp_path, case):
    options = json.loads((shared / "parity" / case / "config.json").read_text())
    inputs, expected, weights = (
        load_file(shared / "parity" / case / f"{name}.safetensors") for name in ("inputs", "outputs", "weights")
    )
    writer = LegacyFolderWriter()
    for name in ("input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim"):
        writer.dims[name] = options[name]
    decodes = options["decoder_cfg"] is not None
    writer.dims["gene_names"] = [f"gene_{i}" for i in range(options["gene_dim" if decodes else "input_dim"])]
    writer.config["model"] = {"name": options["model_name"], "kwargs": {}}
    writer.config["data"]["kwargs"] |= {name: options[name] for name in ("embed_key", "output_space")}
    writer.maps["pert_onehot_map.pt"] = one_hot_map([f"p{i}" for i in range(options["pert_dim"])])
    writer.maps["batch_onehot_map.torch"] = one_hot_map([f"b{i}" for i in range(options["batch_dim"])])
    writer.content |= {"state_dict": weights, "hyper_parameters": options}
    model, processor = converted(writer, tmp_path)
    names = [f"p{i}" for i in inputs["perturbation_ids"].tolist()]
    batches = [[f"b{i}" for i in row] for row in inputs["batch_ids"].tolist()]
    for i, name in enumerate(names):
        found = predictions(model, processor, inputs["control_cells"][i : i + 1], name, batches[i])
        torch.testing.assert_close(found, expected["predictions"][i : i + 1], atol=1e-5, rtol=0)
    assert processor.values == ("embedding" if options["embed_key"] == "X_state" else "log1p")
    assert processor.gene_input == ("X" if decodes else None)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_family_keeps_its_weights_and_names(tmp_path, family):
    writer = LegacyFolderWriter(family)
    model, processor = converted(writer, tmp_path)
    options = {**writer.config["model"]["kwargs"], **writer.dims, "model_name": family, "embed_key": "X_hvg"}
    config = config_from_legacy(options)
    wanted = FAMILIES[config.model_type].model(config).eval()
    wanted.load_state_dict(state_dict_from_legacy(writer.content["state_dict"], config))
    assert type(model) is type(wanted)
    torch.manual_seed(1)
    cells, batches = torch.rand(1, 4, INPUT), [BATCHES[i] for i in (1, 0, 0, 1)]
    for i, name in enumerate(PERTURBATIONS):
        with torch.inference_mode():
            ids = {"perturbation_ids": torch.tensor([[i]]), "batch_ids": torch.tensor([[1, 0, 0, 1]])}
            expected = wanted(control_cells=cells, **ids).predictions
        torch.testing.assert_close(predictions(model, processor, cells, name, batches), expected, atol=0, rtol=0)
    vocabulary = processor.vocabulary
    found = (vocabulary.genes, vocabulary.perturbations, vocabulary.contexts, vocabulary.batches)
    assert found == (GENES, PERTURBATIONS, CONTEXTS, BATCHES)
    assert (model.config.num_perturbations, model.config.num_contexts, model.config.num_batches) == (4, 3, 2)
    assert processor.batch_key == ("plate" if family in ("state", "pseudobulk") else None)
    kept = (processor.perturbation_key, processor.context_key, processor.control, processor.combination_separator)
    assert kept == ("gene", "cell_line", "non-targeting", None)
    assert (processor.input, processor.values, processor.normalize, processor.set_size) == ("X", "log1p", "none", 4)


def test_a_converted_checkpoint_predicts_from_a_file(tmp_path, capsys):
    """It finds genes and batches by name, and the control has its own row of the weights."""
    model, processor = converted(LegacyFolderWriter(), tmp_path)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"gene": "non-targeting", "cell_line": "k562", "plate": BATCHES * 2}, index=list("abcd"))
    shuffled = GENES[::-1]
    cells = ad.AnnData(rng.gamma(1.0, size=(4, INPUT)).astype(np.float32), obs=obs, var=pd.DataFrame(index=shuffled))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words = [
        "predict",
        "--model",
        tmp_path / "out",
        "--adata",
        tmp_path / "cells.h5ad",
        "--output",
        tmp_path / "p.h5ad",
    ]
    words += ["--perturbation", "TP53", "non-targeting", "--quiet"]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    found = ad.read_h5ad(tmp_path / "p.h5ad")
    assert found.var_names.tolist() == GENES
    ordered = cells[:, GENES]
    for i, name in ((2, "TP53"), (3, "non-targeting")):
        mine = found[found.obs["gene"] == name]
        rows = ordered[mine.obs["control_barcode"].astype(str)]
        batch = {"perturbation_ids": torch.tensor([[i]])}
        batch["batch_ids"] = torch.tensor([[BATCHES.index(b) for b in rows.obs["plate"]]])
        with torch.inference_mode():
            expected = model(control_cells=torch.from_numpy(rows.X.copy())[None], **batch).predictions[0]
        np.testing.assert_allclose(mine.X, expected, atol=1e-6)
    assert np.abs(found[found.obs["gene"] == "TP53"].X - found[found.obs["gene"] == "non-targeting"].X).max() > 1e-3
    # Without the row, the control would be "no perturbation".
    assert processor.encode(["non-targeting"])["perturbation_ids"].tolist() == [[3]]


def test_a_gene_decoder_comes_along(tmp_path):
    writer = LegacyFolderWriter()
    writer.config["data"]["kwargs"]["embed_key"] = writer.content["hyper_parameters"]["embed_key"] = "X_state"
    writer.content["hyper_parameters"]["decoder_cfg"] = {"latent_dim": INPUT, "gene_dim": 9, "hidden_dims": [5]}
    writer.dims["gene_dim"] = writer.content["hyper_parameters"]["gene_dim"] = 9
    writer.dims["gene_names"] = np.array([f"D{i}" for i in range(9)])
    decoder = {"0": (5, INPUT), "1": (5,), "4": (9, 5)}
    for index, shape in decoder.items():
        writer.content["state_dict"][f"gene_decoder.decoder.{index}.weight"] = torch.randn(shape)
        writer.content["state_dict"][f"gene_decoder.decoder.{index}.bias"] = torch.randn(shape[0])
    model, processor = converted(writer, tmp_path)
    assert (processor.input, processor.gene_input, processor.values) == ("obsm/X_state", "X", "embedding")
    assert processor.vocabulary.genes == [f"D{i}" for i in range(9)] and processor.feature_dim == INPUT
    weight = writer.content["state_dict"]["gene_decoder.decoder.4.weight"]
    torch.testing.assert_close(model.gene_decoder.output.weight.data, weight, atol=0, rtol=0)


def test_decoder_options_of_a_model_without_decoder_are_left_out(tmp_path):
    writer = LegacyFolderWriter()
    writer.content["hyper_parameters"]["decoder_cfg"] = {"latent_dim": INPUT, "gene_dim": 9, "hidden_dims": [5]}
    model, _ = converted(writer, tmp_path)
    assert model.config.gene_dim is None


# Variants of the files


def test_maps_of_every_kind_and_names_that_are_no_text(tmp_path):
    writer = LegacyFolderWriter()
    del writer.maps["batch_onehot_map.torch"], writer.maps["cell_type_onehot_map.torch"]
    writer.maps["batch_onehot_map.pkl"] = one_hot_map([np.int64(2), 10])
    # Two copies that agree.
    writer.maps["cell_type_onehot_map.pkl"] = {k: v.numpy() for k, v in one_hot_map(CONTEXTS).items()}
    writer.maps["cell_type_onehot_map.torch"] = one_hot_map([np.str_(name) for name in CONTEXTS])
    writer.dims["gene_names"] = np.array(GENES, dtype=object)
    writer.dims["pert_names"] = [np.str_(name) for name in reversed(PERTURBATIONS)]
    _, processor = converted(writer, tmp_path)
    vocabulary = processor.vocabulary
    assert (vocabulary.batches, vocabulary.contexts, vocabulary.genes) == (["2", "10"], CONTEXTS, GENES)
    assert all(type(name) is str for name in [*vocabulary.batches, *vocabulary.contexts])


def test_a_checkpoint_without_hyper_parameters_and_maps_that_are_not_needed(tmp_path):
    writer = LegacyFolderWriter("embedsum")
    del writer.content["hyper_parameters"], writer.dims["gene_names"]
    del writer.maps["batch_onehot_map.torch"], writer.maps["cell_type_onehot_map.torch"]
    model, processor = converted(writer, tmp_path)
    vocabulary = processor.vocabulary
    assert (vocabulary.contexts, vocabulary.batches, vocabulary.genes) == ([], [], [])
    assert model.config.num_batches is None and model.config.num_contexts is None
    assert (processor.input, processor.values) == ("obsm/X_hvg", "embedding")


def test_gene_names_from_a_file(tmp_path, capsys):
    writer = LegacyFolderWriter()
    del writer.dims["gene_names"]
    folder = writer.write(tmp_path / "legacy")
    assert main(["convert", str(folder), str(tmp_path / "unnamed")]) == 0
    assert AutoProcessor.from_pretrained(tmp_path / "unnamed").input == "obsm/X_hvg"
    (tmp_path / "genes.txt").write_text("\n".join(GENES) + "\n")
    assert main(["convert", str(folder), str(tmp_path / "named"), "--genes", str(tmp_path / "genes.txt")]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "named")
    assert (processor.input, processor.values, processor.vocabulary.genes) == ("X", "log1p", GENES)
    (tmp_path / "genes.txt").write_text("A\nB\n")
    assert main(["convert", str(folder), str(tmp_path / "x"), "--genes", str(tmp_path / "genes.txt")]) == 1
    assert "expected the names of the model's 6 genes, found 2" in capsys.readouterr().err


def test_which_checkpoint_is_taken(tmp_path, caplog):
    writer = LegacyFolderWriter()
    writer.checkpoints = ["step=5.ckpt", "last.ckpt"]
    folder = writer.write(tmp_path / "legacy")
    writer.content["state_dict"]["project_out.0.bias"] += 1
    torch.save(writer.content, folder / "checkpoints" / "step=5.ckpt")
    convert(folder, tmp_path / "default")
    assert "2 checkpoints, last.ckpt is taken" in caplog.text
    convert(folder, tmp_path / "asked", checkpoint="step=5.ckpt")
    bias = [
        load_file(tmp_path / name / "model.safetensors")["output_head.layers.0.bias"] for name in ("default", "asked")
    ]
    torch.testing.assert_close(bias[1], bias[0] + 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'best.ckpt', found \['last.ckpt', 'step=5.ckpt'\]"):
        convert(folder, tmp_path / "other", checkpoint="best.ckpt")
    os.rename(folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "step=4.ckpt")
    with pytest.raises(ValueError, match="say which with --checkpoint"):
        convert(folder, tmp_path / "other")


# Attention


@pytest.mark.parametrize(
    ("recorded", "asked", "attention", "positions", "warned"),
    [
        ({"bidirectional_attention": True}, None, "bidirectional", "none", False),
        ({"bidirectional_attention": False}, None, "causal", "rope", False),
        ({}, None, "causal", "rope", True),
        ({}, "bidirectional", "bidirectional", "none", False),
        ({}, "causal", "causal", "rope", False),
        ({"bidirectional_attention": True}, "none", "none", "none", False),
    ],
)
def test_attention_is_what_was_recorded_or_asked_for(tmp_path, caplog, recorded, asked, attention, positions, warned):
    writer = LegacyFolderWriter()
    for options in (writer.config["model"]["kwargs"], writer.content["hyper_parameters"]):
        del options["transformer_backbone_kwargs"]["bidirectional_attention"]
        options["transformer_backbone_kwargs"] |= recorded
    model, _ = converted(writer, tmp_path, attention=asked)
    assert (model.config.attention, model.config.positions) == (attention, positions)
    assert ("no flag says how cells attended" in caplog.text) is warned
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Attention of this checkpoint: {attention}: " in card
    assert ("does not hold for it" in card) is (attention == "causal")
    assert ("chosen at the conversion" in card) is (asked is not None)
    assert ("no flag was recorded" in card) is (not recorded)


def test_attention_is_no_choice_of_other_families(tmp_path):
    fails(
        LegacyFolderWriter("embedsum"),
        tmp_path,
        "found a model 'embedsum', which has no such modes",
        attention="causal",
    )


# The folder that is written


def test_hostile_names_are_text_in_the_card(tmp_path):
    hostile = [
        "<script>alert(1)</script>",
        "a|b`c`",
        "{{ 7 * 7 }}\n---\n# x",
        "![x](http://y)",
        "_x_ **y**",
        "&lt;b&gt;",
    ]
    writer = LegacyFolderWriter()
    writer.dims["gene_names"] = hostile
    writer.config["data"]["kwargs"]["pert_col"] = "<b>x</b>"
    writer.config["training"] = {"<img src=x>": "]]><i>", "model-index": "\n- x: 1"}
    converted(writer, tmp_path)
    text = (tmp_path / "out" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert set(yaml.safe_load(header)) == {"library_name", "license", "model_name", "pipeline_tag", "tags"}
    rendered = MarkdownIt("commonmark").enable("table").render(body)
    for tag in ("<script", "<img", "<b>", "<i>", "<em>x", "<strong>y", "<a ", "<hr"):
        assert tag not in rendered, tag
    assert "{{ 7 * 7 }} --- # x" in rendered and "&lt;script&gt;alert(1)&lt;/script&gt;" in rendered
    assert "a|b`c`" in rendered


def test_the_card_says_where_it_came_from(tmp_path):
    converted(LegacyFolderWriter(), tmp_path)
    text = (tmp_path / "out" / "README.md").read_text()
    for said in ("final.ckpt, epoch 3, global_step 7", "| lr | 0.001 |", "| contexts | 3: k562, jurkat, rpe1 |"):
        assert said in text
    assert "The control has weights of its own" in text


def test_the_lines_of_the_card_run(tmp_path, monkeypatch):
    _, processor = converted(LegacyFolderWriter(), tmp_path)
    cells = np.random.default_rng(0).gamma(1, 1, (9, processor.feature_dim)).astype(np.float32)
    columns = {processor.perturbation_key: processor.control, processor.context_key: processor.vocabulary.contexts[0]}
    obs = pd.DataFrame(columns | {processor.batch_key: processor.vocabulary.batches[0]}, index=list("abcdefghi"))
    controls = ad.AnnData(cells, obs=obs, var=pd.DataFrame(index=processor.vocabulary.genes))
    controls.obsm[processor.input.removeprefix("obsm/")] = cells
    controls.write_h5ad(tmp_path / "out" / "controls.h5ad")
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(Path("README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    assert names["predicted"].shape == (9, len(processor.vocabulary.genes) or processor.feature_dim)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    folder = LegacyFolderWriter().write(tmp_path / "legacy")
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileExistsError, match="legacy exists and is not an empty folder; name a new one"):
        convert(folder, folder)
    with pytest.raises(FileExistsError, match="holds no checkpoint, so overwrite does not replace it"):
        convert(folder, folder, overwrite=True)
    assert sorted(folder.rglob("*")) == before


# Errors


def changed(part: str, *keys, to=None, drop=False):
    """A function that changes an entry of a part of the folder."""

    def change(writer: LegacyFolderWriter):
        entry = getattr(writer, part)
        for key in keys[:-1]:
            entry = entry[key]
        if drop:
            del entry[keys[-1]]
        else:
            entry[keys[-1]] = to

    return change


LAYER = "transformer_backbone.layers.0"
BROKEN = {
    "unknown model": (
        changed("config", "model", "name", to="cpa"),
        r"model_name='cpa' is another family; expected one",
    ),
    "no section": (changed("config", "data", drop=True), r"config.yaml: expected a section data, found \['model'"),
    "no kwargs": (
        changed("config", "data", "kwargs", to=[1]),
        "expected `name: value` lines in data.kwargs, found a list",
    ),
    "no control": (changed("config", "data", "kwargs", "control_pert", to=None), "expected a name as control_pert"),
    "another control": (changed("content", "hyper_parameters", "control_pert", to="x"), "control_pert='non-targeting'"),
    "no batch column": (changed("config", "data", "kwargs", "batch_col", drop=True), "as batch_col in data.kwargs"),
    "fewer names": (
        changed("maps", "pert_onehot_map.pt", to=one_hot_map(PERTURBATIONS[:3])),
        r"pert_onehot_map.pt: expected 4 names \(pert_dim\), found 3",
    ),
    "a smaller pert_dim": (changed("dims", "pert_dim", to=3), "pert_dim is 4, but 3 in .*var_dims.pkl"),
    "another width of vectors": (
        changed("maps", "pert_onehot_map.pt", to={name: torch.eye(5)[i] for i, name in enumerate(PERTURBATIONS)}),
        "expected one 1 among 4 numbers.*not one-hot",
    ),
    "two at one place": (
        changed("maps", "pert_onehot_map.pt", to=dict.fromkeys(PERTURBATIONS, torch.eye(4)[0])),
        "found the place of 'GATA1' for 'KLF1'",
    ),
    "features": (
        changed("maps", "pert_onehot_map.pt", to={name: torch.ones(4) for name in PERTURBATIONS}),
        "trained on perturbation features cannot be converted",
    ),
    "twice as text": (changed("maps", "batch_onehot_map.torch", to=one_hot_map([1, "1"])), r"stand twice.*\['1'\]"),
    "no name": (changed("maps", "batch_onehot_map.torch", to=one_hot_map([None, "1"])), "expected names, found None"),
    "no map": (changed("maps", "pert_onehot_map.pt", to=[1]), "expected a one-hot vector for each name, found a list"),
    "no batches": (
        changed("maps", "batch_onehot_map.torch", drop=True),
        "the model embeds batches; expected batch_onehot",
    ),
    "other copy": (
        changed("maps", "batch_onehot_map.pkl", to=one_hot_map(BATCHES[::-1])),
        "batch_onehot_map.torch and .*batch_onehot_map.pkl disagree",
    ),
    "other names": (changed("dims", "pert_names", to=["x"]), r"pert_names of var_dims.pkl.*disagree about \['GATA1'"),
    "genes": (changed("dims", "gene_names", to=["a"]), "expected the names of 6 genes, found 1 gene_names"),
    "genes of no kind": (changed("dims", "gene_names", to=3), "expected a list of names as gene_names, found a int"),
    "a size of another kind": (changed("dims", "input_dim", to="6"), "above 0 as input_dim, found '6'"),
    "another training": (changed("content", "hyper_parameters", "hidden_dim", to=9), "hidden_dim is 9, but 8 in"),
    "another flag": (
        changed("content", "hyper_parameters", "transformer_backbone_kwargs", "bidirectional_attention", to=False),
        "bidirectional_attention differs",
    ),
    "no state_dict": (changed("content", "state_dict", drop=True), "Lightning checkpoint with state_dict, found"),
    "no tensor": (changed("content", "state_dict", "project_out.0.bias", to=[1.0]), "as weight 'project_out.0.bias'"),
    "whole numbers": (
        changed("content", "state_dict", "project_out.0.bias", to=torch.arange(8)),
        "a tensor of torch.int64",
    ),
    "missing": (
        changed("content", "state_dict", "project_out.3.bias", drop=True),
        r"final.ckpt: the weights are not those of the options: missing \['output_head.layers.1.bias'\]",
    ),
    "unexpected": (
        changed("content", "state_dict", "confidence_token.confidence_token", to=torch.zeros(1, 1, 8)),
        r"unexpected \['confidence_token'\]",
    ),
    "unknown": (
        changed("content", "state_dict", "film.weight", to=torch.zeros(1)),
        r"unknown names: \['film.weight'\]",
    ),
    "of another shape": (
        changed("content", "state_dict", "project_out.3.bias", to=torch.zeros(5)),
        r"of another shape \['output_head.layers.1.bias \(5,\) for \(6,\)'\]",
    ),
    "a vector for a matrix": (
        changed("content", "state_dict", "pert_encoder.0.weight", to=torch.zeros(5)),
        r"expected a matrix, found shape \(5,\)",
    ),
    "no keys": (
        changed("content", "state_dict", f"{LAYER}.self_attn.k_proj.weight", drop=True),
        "weights q, k, v of layer 0: expected three matrices",
    ),
    "NaN": (
        changed("content", "state_dict", "project_out.3.bias", to=torch.full((6,), float("nan"))),
        r"NaN or infinity in \['output_head.layers.1.bias'\]",
    ),
    "positions": (
        changed("content", "state_dict", "transformer_backbone.wpe.weight", to=torch.ones(4, HIDDEN)),
        "a model with learned positions cannot be converted",
    ),
    "decoder": (
        changed("content", "state_dict", "gene_decoder.decoder.0.weight", to=torch.ones(4, 6)),
        "the weights hold a gene decoder; expected its options as decoder_cfg",
    ),
    "option of another kind": (
        changed("content", "hyper_parameters", "dropout", to="high"),
        r"hidden_dropout: expected float \| int, found 'high' \(str\)",
    ),
    "adapters": (changed("config", "model", "kwargs", "lora", to={"enable": True}), "trained with LoRA adapters"),
    "absurd depth": (
        changed("content", "hyper_parameters", "transformer_backbone_kwargs", "num_hidden_layers", to=10**9),
        "num_hidden_layers is 1000000000, but the checkpoint holds",
    ),
    "absurd width": (
        changed("content", "hyper_parameters", "transformer_backbone_kwargs", "intermediate_size", to=10**15),
        "of another shape",
    ),
    "more than absurd": (
        changed("content", "hyper_parameters", "transformer_backbone_kwargs", "intermediate_size", to=10**18),
        "no model can have the sizes of the options",
    ),
    "beyond numbers": (
        changed("content", "hyper_parameters", "transformer_backbone_kwargs", "head_dim", to=10**30),
        "no model can have the sizes of the options",
    ),
    "a loss of no kind": (changed("content", "hyper_parameters", "loss", to=[1]), r"legacy loss \[1\] is not known"),
    "an embedding of no name": (
        lambda writer: [
            changed(*where, "embed_key", to=["X"])(writer)
            for where in (("config", "data", "kwargs"), ("content", "hyper_parameters"))
        ],
        "expected a name as embed_key",
    ),
    "another norm": (
        changed("content", "hyper_parameters", "transformer_backbone_kwargs", "rms_norm_eps", to=1e-5),
        "expected rms_norm_eps=1e-06, found 1e-05",
    ),
    "other features out": (
        lambda writer: [
            changed(*where, to=5)(writer)
            for where in (("dims", "output_dim"), ("content", "hyper_parameters", "output_dim"))
        ],
        "reads 6 features and predicts 5 others",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_one_error(tmp_path, name):
    change, message = BROKEN[name]
    writer = LegacyFolderWriter()
    change(writer)
    fails(writer, tmp_path, message, error=(ValueError, FileNotFoundError))


@pytest.mark.parametrize("name", ["config.yaml", "var_dims.pkl", "pert_onehot_map.pt", "checkpoints/final.ckpt"])
def test_a_missing_or_truncated_file_is_named(tmp_path, name, capsys):
    folder = LegacyFolderWriter().write(tmp_path / "legacy")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    words = ["convert", str(folder), str(tmp_path / "out")]
    assert main(words) == 1
    missing = capsys.readouterr().err
    (folder / name).write_bytes(content[: len(content) // 2])
    assert main(words) == 1
    truncated = capsys.readouterr().err
    for text in (missing, truncated):
        assert text.startswith("pertstate convert: error: ") and text.count("\n") == 1
    assert Path(name).name.removesuffix(".pt") in missing or "no .ckpt file" in missing
    if name != "config.yaml":
        assert f"{name}: expected a whole file of torch.save or pickle" in truncated
    assert not (tmp_path / "out").exists()


def test_no_folder(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "out")]) == 1
    assert "config.yaml: no such file; expected a training folder" in capsys.readouterr().err


# Nothing of a pickle runs


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


PLACES = {
    "var_dims": ("dims", "gene_names"),
    "perturbations": ("maps", "pert_onehot_map.pt", "TP53"),
    "batches": ("maps", "batch_onehot_map.pkl", "plate_a"),
    "contexts": ("maps", "cell_type_onehot_map.torch", "k562"),
    "weights": ("content", "state_dict", "project_out.0.bias"),
    "hyper_parameters": ("content", "hyper_parameters", "loss"),
    "optimizer": ("content", "optimizer_states"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_malicious_pickle_is_refused_wherever_it_stands(tmp_path, place):
    writer = LegacyFolderWriter()
    writer.maps["batch_onehot_map.pkl"] = writer.maps.pop("batch_onehot_map.torch")
    changed(*PLACES[place], to=Payload(tmp_path / "mark"))(writer)
    fails(writer, tmp_path, r"the global '(nt|posix)\.mkdir'; nothing of it was run", error=RefusedPickleError)
    assert not (tmp_path / "mark").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_yaml_that_names_code_is_refused(tmp_path):
    folder = LegacyFolderWriter().write(tmp_path / "legacy")
    with open(folder / "config.yaml", "a", encoding="utf-8") as file:
        file.write(f"x: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    with pytest.raises(ValueError, match="config.yaml is not valid YAML: could not determine a constructor"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "mark").exists()
