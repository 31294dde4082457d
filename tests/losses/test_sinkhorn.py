"""Our Sinkhorn divergence is geomloss' one of each pair of sets alone, in value and gradient."""

import pytest
import torch
from geomloss import SamplesLoss

from pertstate.losses import sinkhorn
from pertstate.losses.sinkhorn import SinkhornLoss, sinkhorn_divergence


GEOMLOSS = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")


def of_geomloss(x, y, a=None, b=None, of=GEOMLOSS, dtype=torch.float64):
    """The value of each pair, and the gradient of their sum."""
    x, y = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()
    weights = [None if w is None else w.to(dtype) for w in (a, b)]
    values = []
    for i in range(len(x)):
        pair = x[i : i + 1], y[i : i + 1]
        given = pair if a is None else (weights[0][i : i + 1], pair[0], weights[1][i : i + 1], pair[1])
        values.append(of(*given))
    value = torch.cat(values)
    return value.detach(), torch.autograd.grad(value.sum(), (x, y))


def of_ours(x, y, a=None, b=None, blur=0.05):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = sinkhorn_divergence(x, y, a, b, blur)
    return value.detach(), torch.autograd.grad(value.sum(), (x, y))


def assert_equal(found, expected, value: float, gradient: float):
    torch.testing.assert_close(found[0].double(), expected[0], rtol=value, atol=1e-12)
    for one, other in zip(found[1], expected[1]):
        assert (one - other).norm() <= gradient * other.norm() + 1e-12


def pairs(dtype=torch.float64) -> dict[str, tuple]:
    torch.manual_seed(0)
    x, y = torch.randn(3, 20, 50, dtype=dtype).relu(), torch.randn(3, 13, 50, dtype=dtype).relu()
    y = y * torch.tensor([0.3, 1.0, 5.0], dtype=dtype)[:, None, None]  # each needs another number of steps
    a, b = torch.rand(3, 20, dtype=dtype), torch.rand(3, 13, dtype=dtype)
    return {
        "sets": (x, y),
        "weights": (x, y, a / a.sum(dim=1, keepdim=True), b / b.sum(dim=1, keepdim=True)),
        "close": (x, x + 0.05 * torch.randn_like(x)),
        "one cell": (x[:, :1], y[:, :1]),
        "one against several": (x[:, :1], y),
        "inside the blur": (x / 1e4, y / 1e4),
    }


@pytest.mark.parametrize("case", list(pairs()))
def test_value_and_gradient_are_those_of_geomloss(case):
    given = pairs()[case]
    exact = of_geomloss(*given)
    assert_equal(of_ours(*given), exact, value=1e-9, gradient=1e-9)
    # In float32 the temperature is near the rounding error of the costs, which moves the shares of cells that are about as near.
    single = [values.float() for values in given]
    found, theirs = of_ours(*single), of_geomloss(*single, dtype=torch.float32)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-4, atol=1e-9)
    for one, other, wanted in zip(found[1], theirs[1], exact[1]):
        assert (one - wanted).norm() <= max(1e-4 * wanted.norm(), 1.1 * (other - wanted).norm())


@pytest.mark.parametrize("blur", [0.5, 3.0])
def test_another_blur(blur):
    x, y = pairs()["sets"]
    expected = of_geomloss(x, y, of=SamplesLoss("sinkhorn", p=2, blur=blur, backend="tensorized"))
    assert_equal(of_ours(x, y, blur=blur), expected, value=1e-9, gradient=1e-9)


def test_a_batch_without_padding_is_annealed_as_geomloss_does_it_from_the_diameter_of_all():
    x, y = (values[:, :13].contiguous() for values in pairs()["sets"])
    expected = GEOMLOSS(x.requires_grad_(), y)
    torch.testing.assert_close(SinkhornLoss(0.05)(x.float(), y.float(), None).double(), expected, rtol=1e-6, atol=0)
    found = sinkhorn_divergence(x, y, together=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (one,), (other,) = (torch.autograd.grad(of.sum(), x) for of in (found, expected))
    assert (one - other).norm() <= 1e-9 * other.norm()
    assert not torch.allclose(sinkhorn_divergence(x, y), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("padding", [0.0, 1e4])
def test_a_padded_batch_is_its_sentences_alone(padding):
    torch.manual_seed(1)
    x, y = torch.randn(4, 9, 30), torch.randn(4, 9, 30)
    mask = torch.rand(4, 9) < 0.6
    mask[0], mask[1] = True, torch.arange(9) == 3
    x[~mask], y[~mask] = padding, -padding
    x.requires_grad_()
    found = SinkhornLoss(0.05)(x, y, mask)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    for i, of_sentence in enumerate(mask):
        value, (of_x, _) = of_geomloss(x[i : i + 1, of_sentence], y[i : i + 1, of_sentence])
        torch.testing.assert_close(found[i : i + 1].double(), value, rtol=1e-4, atol=0)
        assert (gradient[i, of_sentence] - of_x[0]).norm() <= 1e-4 * of_x.norm()
        assert not gradient[i, ~of_sentence].any()


def test_large_sets_are_taken_in_parts(monkeypatch):
    x, y = pairs()["sets"]
    whole = of_ours(x, y)
    monkeypatch.setitem(sinkhorn.TOGETHER, "cpu", 1)
    monkeypatch.setitem(sinkhorn.AT_ONCE, "cpu", 8 * 13 * 3)
    assert_equal(of_ours(x, y), whole, value=1e-12, gradient=1e-12)


def test_equal_sets_have_divergence_and_gradient_zero():
    x = pairs()["sets"][0]
    value, gradients = of_ours(x, x)
    assert value.abs().max() < 1e-12 and all(gradient.abs().max() < 1e-12 for gradient in gradients)
    point = torch.ones(1, 4, 3)
    value, gradients = of_ours(point, point)
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_the_gradient_of_each_pair_is_scaled_and_what_needs_none_gets_none():
    x, y = pairs()["sets"]
    _, (gradient, _) = of_ours(x, y)
    x = x.requires_grad_()
    sinkhorn_divergence(x, y).backward(torch.tensor([1.0, -2.0, 0.0]).double())
    torch.testing.assert_close(x.grad, gradient * torch.tensor([1.0, -2.0, 0.0])[:, None, None])
    assert y.grad is None


def test_half_precision_is_computed_in_float32():
    x, y = (values.float() for values in pairs()["sets"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn_divergence(x, y)
    assert torch.equal(inside, sinkhorn_divergence(x, y))
    assert sinkhorn_divergence(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_cell_is_not_hidden(value):
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    x[1, 2, 3] = value
    x.requires_grad_()
    divergences = sinkhorn_divergence(x, y)
    assert torch.isfinite(divergences[0]) and torch.isnan(divergences[1])
    divergences.sum().backward()
    assert torch.isnan(x.grad[1]).any() and torch.isfinite(x.grad[0]).all()
