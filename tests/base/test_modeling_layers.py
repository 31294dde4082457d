"""Shared layers: what is written by hand for speed equals what autograd makes of its definition."""

import pytest
import torch
from torch import nn

from pertstate.base.modeling_layers import (
    BatchNormMLP,
    GatedFeedForward,
    MaskedBatchNorm,
    Packing,
    RMSNorm,
    UnseenMeanEmbedding,
)
from pertstate.configuration_state import StateConfig


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


@pytest.mark.parametrize("before, after", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_packing_is_the_real_cells_in_their_order_with_the_tokens_around_them(before, after):
    lengths = torch.tensor([2, 4, 1])
    mask = torch.arange(4) < lengths[:, None]
    packing = Packing.of(mask, None, wait=False, hidden_size=512).with_tokens(before, after)
    length = before + 4 + after
    padded = torch.arange(1.0, 3 * length + 1).view(3, length, 1)
    whole = nn.functional.pad(mask, (before, after), value=True)
    packed = packing.pack(padded)
    assert torch.equal(packed[0, :, 0], padded[whole][:, 0])
    assert packing.sizes == (lengths + before + after).tolist()
    assert torch.equal(packing.pad(packed), padded * whole.unsqueeze(-1))
    assert torch.equal(packing.apply(lambda cells: cells + 1, padded), (padded + 1) * whole.unsqueeze(-1))


def test_a_cpu_packs_where_the_padding_would_cost_more():
    mask = torch.arange(32) < torch.tensor([[32], [20]])
    assert Packing.of(mask, None, wait=False, hidden_size=128) is None  # 6 padded cells a sentence, 98,304
    assert Packing.of(mask, None, wait=False, hidden_size=132).sizes == [32, 20]  # 104,544
    assert Packing.of(mask & False, None, wait=False, hidden_size=64).sizes == [0, 0]  # 131,072
    assert Packing.of(mask | True, None, wait=False, hidden_size=4096) is None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 16), (7, 16), (16,)])
def test_the_norm_of_a_cpu_is_that_of_torch(shape, frozen):
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.weight.requires_grad_(not frozen)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    exact = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    found, expected = norm(x), nn.functional.rms_norm(exact, (16,), weight, 1e-3)
    found.backward(grad)
    expected.backward(grad.double())
    assert type(found.grad_fn).__name__ == "_RootMeanSquareNormBackward"
    pairs = [(found, expected), (x.grad, exact.grad)] + ([] if frozen else [(norm.weight.grad, weight.grad)])
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert (norm.weight.grad is None) == frozen


def test_a_compiled_norm_and_one_in_half_precision_are_of_torch():
    norm, x = RMSNorm(16, eps=1e-6), torch.randn(4, 16)
    torch.testing.assert_close(torch.compile(norm, backend="eager")(x), norm(x))
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x), rtol=2e-2, atol=2e-2)


def test_batch_norm_over_padded_sentences_is_batch_norm_over_their_real_cells():
    torch.manual_seed(0)
    cells = torch.randn(3, 5, 4) * 3 + 1
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    cells[~mask] = 1e6
    norm, reference = MaskedBatchNorm(4), nn.BatchNorm1d(4)

    output = norm(cells, mask)

    torch.testing.assert_close(output[mask], reference(cells[mask]), rtol=0, atol=0)
    assert torch.equal(norm.running_mean, reference.running_mean)
    assert torch.equal(norm.running_var, reference.running_var)
    assert torch.equal(norm.eval()(cells, mask)[mask], reference.eval()(cells[mask]))
    whole, unmasked = MaskedBatchNorm(4), MaskedBatchNorm(4)
    assert torch.equal(whole(cells, torch.ones_like(mask)), unmasked(cells))


def test_batch_norm_refuses_to_train_on_a_single_cell():
    with pytest.raises(ValueError, match=r"expected at least 2 cells in a training batch, found 1; raise per_device"):
        MaskedBatchNorm(4)(torch.randn(1, 3, 4), torch.tensor([[True, False, False]]))


def test_a_frozen_batch_norm_is_left_as_it_is():
    norm = MaskedBatchNorm(4)
    cells, mask = torch.randn(3, 5, 4), torch.rand(3, 5) > 0.3
    norm(cells + 2, mask)
    expected = norm.eval()(cells)
    norm.train().requires_grad_(False)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert torch.equal(norm(cells, mask), expected)
    assert torch.equal(norm(cells[:1, :1]), expected[:1, :1])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert not torch.equal(norm.requires_grad_(True)(cells, mask), expected)


def test_padded_cells_send_no_gradient_through_a_batch_norm_mlp():
    torch.manual_seed(0)
    mlp = BatchNormMLP(4, 8, 2, "relu", 0.0)
    cells = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    mlp(cells, mask).square().sum().backward()
    assert (cells.grad[~mask] == 0).all() and (cells.grad[mask] != 0).any(dim=-1).all()


def test_unseen_ids_have_the_mean_of_the_known_rows_and_are_counted_in_a_warning(caplog):
    embedding = UnseenMeanEmbedding(3, 2, "context")
    ids = torch.tensor([[0, -1], [2, -1]])
    with caplog.at_level("WARNING"):
        rows = embedding(ids)
    assert not caplog.records  # not in training, where control cells of held-out contexts take part
    assert torch.equal(rows[:, 0], embedding.weight[[0, 2]])
    assert torch.equal(rows[:, 1], embedding.weight.mean(dim=0).expand(2, 2))
    rows[0, 1].sum().backward()
    torch.testing.assert_close(embedding.weight.grad, torch.full((3, 2), 1 / 3))

    embedding.eval()
    with caplog.at_level("WARNING"):
        embedding(ids)
        embedding(ids)
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 4 context ids are -1, not seen in training: they are given the mean of the 3 known rows (said once)"
    ]
