"""Predictions, losses and gradients equal the reference outputs, for every option and family that has some."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pertstate.families import FAMILIES
from pertstate.legacy.weights import config_from_legacy, state_dict_from_legacy
from pertstate.training import objective_for


CASES = [
    "all_genes_output",
    "batch_token_and_confidence",
    "chunked_energy_loss",
    "combined_loss_regularized",
    "embed_sum",
    "embed_sum_gene_decoder",
    "gpt2_causal",
    "latent_gene_decoder_confidence",
    "latent_residual_decoder",
    "llama_bidirectional",
    "llama_causal_rope",
    "llama_head_dim_not_hidden_over_heads",
    "llama_mlp_encoders_batch_no_residual",
    "llama_no_cross_cell_attention",
    "mse_loss",
    "old_neural_ot",
    "pseudobulk",
    "pseudobulk_latent",
    "sinkhorn_loss",
]


@pytest.mark.shared
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_reference_outputs(shared, case, attention):
    folder = shared / "parity" / case
    options = json.loads((folder / "config.json").read_text())
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    config = config_from_legacy(options)
    if options["model_name"] != "embedsum":  # which has no attention
        config._attn_implementation = attention
    model = FAMILIES[config.model_type].model(config).eval()
    model.load_state_dict(state_dict_from_legacy(load_file(folder / "weights.safetensors"), config), strict=True)

    batch = {
        "control_cells": inputs["control_cells"],
        "perturbation_ids": inputs["perturbation_ids"][:, None],
        "batch_ids": inputs["batch_ids"],
        "labels": inputs["target_cells"],
    }
    if "target_genes" in inputs:
        batch["gene_labels"] = inputs["target_genes"]
    outputs = model(**batch)
    torch.testing.assert_close(outputs.predictions, expected["predictions"], atol=1e-5, rtol=0)
    if "gene_predictions" in expected:
        torch.testing.assert_close(outputs.gene_predictions, expected["gene_predictions"], atol=1e-5, rtol=0)
    if "confidence" in expected:
        torch.testing.assert_close(outputs.confidence, expected["confidence"].squeeze(-1), atol=1e-5, rtol=0)

    terms = objective_for(config)(outputs, batch)
    torch.testing.assert_close(terms["loss"], expected["total_loss"][0], atol=0, rtol=1e-4)
    terms["loss"].backward()
    if "gradient_norm" in expected:
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(norm, expected["gradient_norm"][0], atol=0, rtol=1e-4)

    logged = options["logged"]
    names = {"energy": "train/energy_loss", "sinkhorn": "train/sinkhorn_loss", "l1": "train/l1_regularization"}
    names |= {"decoder": "decoder_loss", "batch_token": "train/batch_token_loss"}
    compared = {ours: logged[theirs] for ours, theirs in names.items() if theirs in logged}
    for name, value in compared.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
