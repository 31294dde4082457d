"""Shared layers: what is written by hand for speed equals what autograd makes of its definition."""

import pytest
import torch
from torch import nn

from cellstate import StateConfig
from cellstate.modeling_perturbation import GatedFeedForward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gated_feed_forward_equals_its_definition_bit_for_bit(dtype):
    torch.manual_seed(0)
    config = StateConfig.from_preset("tiny", num_perturbations=5)
    layer = GatedFeedForward(config).to(dtype)
    cells = torch.randn(2, 7, config.hidden_size, dtype=dtype, requires_grad=True)
    inputs = (cells, *layer.parameters())

    output = layer(cells)
    expected = layer.down_proj(nn.functional.silu(layer.gate_proj(cells)) * layer.up_proj(cells))

    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    for found, wanted in zip(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert torch.equal(found, wanted)


def test_gated_feed_forward_keeps_no_more_for_the_backward_pass_than_gate_up_and_their_product():
    config = StateConfig.from_preset("tiny", num_perturbations=5)
    layer = GatedFeedForward(config)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(torch.randn(2, 7, config.hidden_size))
    assert sum(t.numel() == 2 * 7 * config.intermediate_size for t in kept.values()) == 3
