"""Our energy distance equals geomloss' and the textbook double sum, in value and gradient."""

import pytest
import torch
from geomloss import SamplesLoss

from pertstate.losses.energy import EnergyLoss, energy_distance


def textbook(x, y, a, b):
    """The definition, with the subgradient 0 at distance 0."""

    def mean_distance(u, v, p, q):
        difference = u[:, None] - v[None]
        squared = difference.square().sum(-1)
        zero = squared == 0
        return (p[:, None] * q * torch.where(zero, 1.0, squared).sqrt().masked_fill(zero, 0.0)).sum()

    pairs = zip(x, y, a, b)
    return torch.stack(
        [
            mean_distance(u, v, p, q) - mean_distance(u, u, p, p) / 2 - mean_distance(v, v, q, q) / 2
            for u, v, p, q in pairs
        ]
    )


def uniform(x):
    return x.new_full(x.shape[:2], 1 / x.shape[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("sizes", [(16, 16), (7, 13), (1, 5)])
def test_value_and_gradients_are_the_definition(dtype, tolerance, sizes):
    torch.manual_seed(0)
    x, y = (torch.randn(3, n, 20, dtype=dtype) + 5 for n in sizes)
    x[1, 0] = y[1, 0]  # a cell that stands in both sets
    if sizes[0] > 1:
        x[2, 1] = x[2, 0]  # and one twice in the same
    x.requires_grad_(), y.requires_grad_()
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    ours = energy_distance(x, y)
    gradients = torch.autograd.grad((weight * ours).sum(), (x, y))
    reference = textbook(x.double(), y.double(), uniform(x).double(), uniform(y).double())
    expected = torch.autograd.grad((weight.double() * reference).sum(), (x, y))
    torch.testing.assert_close(ours, reference.to(dtype), atol=tolerance, rtol=tolerance)
    for found, right in zip(gradients, expected):
        torch.testing.assert_close(found, right, atol=tolerance, rtol=100 * tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("sizes", [(16, 16), (7, 13)])
def test_equals_geomloss(dtype, tolerance, sizes):
    torch.manual_seed(1)
    x, y = (torch.rand(3, n, 50, dtype=dtype).requires_grad_() for n in sizes)
    reference = SamplesLoss("energy", backend="tensorized")(x, y)
    expected = torch.autograd.grad(reference.sum(), (x, y))
    ours = energy_distance(x, y)
    found = torch.autograd.grad(ours.sum(), (x, y))
    # geomloss rounds distances below 1e-4 up, its own diagonals among them.
    torch.testing.assert_close(ours, reference, atol=1.1e-4, rtol=tolerance)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# Of a sentence of 10 cells and 12,000 features a CPU leaves the padding out; of one of 8, it gives it no weight.
@pytest.mark.parametrize("features", [8, 12_000])
def test_masked_cells_are_not_there(features):
    torch.manual_seed(2)
    x, y = torch.randn(2, 10, features), torch.randn(2, 10, features)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    padded = x.clone()
    padded[1, 6:] = 1e4
    padded.requires_grad_()
    ours = EnergyLoss()(padded, y, mask)
    torch.testing.assert_close(ours[1], energy_distance(x[1:, :6], y[1:, :6])[0])
    ours.sum().backward()
    assert padded.grad[1, 6:].abs().max() == 0


def test_identical_sets_have_distance_and_gradient_zero():
    x = torch.randn(2, 12, 30, dtype=torch.float32)
    twin = x.flip(1).clone().requires_grad_()
    value = energy_distance(twin, x)
    assert value.abs().max() < 1e-6
    value.sum().backward()
    assert torch.isfinite(twin.grad).all()
    same = torch.ones(1, 4, 3, requires_grad=True)
    energy_distance(same, torch.ones(1, 4, 3)).sum().backward()
    assert same.grad.abs().max() == 0


def test_gradcheck():
    torch.manual_seed(3)
    x, y = (torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    assert torch.autograd.gradcheck(energy_distance, (x, y))
    assert torch.autograd.gradcheck(lambda u: energy_distance(u, y.detach()), (x,))
    assert torch.autograd.gradcheck(lambda v: energy_distance(x.detach(), v), (y,))


def test_half_precision_is_computed_in_float32():
    x, y = torch.randn(1, 6, 9), torch.randn(1, 6, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = energy_distance(x, y)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, energy_distance(x, y))
    assert energy_distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_cell_is_not_hidden(value):
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    x[1, 2, 3] = value
    x.requires_grad_()
    distances = energy_distance(x, y)
    assert torch.isfinite(distances[0]) and torch.isnan(distances[1])
    distances.sum().backward()
    assert torch.isnan(x.grad[1]).any()
