"""
The Sinkhorn divergence's kernels for a GPU: value and gradient are those without them. Without a GPU, Triton's interpreter runs
them.
"""

import pytest
import torch

from pertstate.losses import sinkhorn
from pertstate.losses.sinkhorn import sinkhorn_divergence


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    from pertstate.losses import sinkhorn_kernels

    if DEVICE == "cpu":
        # Only a GPU can give products of half-precision matrices in float32.
        def product(first, second, onto=None, times=1.0):
            made = torch.bmm(first.float(), second.float())
            return made if onto is None else onto.add_(made, alpha=times)

        monkeypatch.setattr(sinkhorn_kernels, "_product", product)
        monkeypatch.setattr(sinkhorn, "has_tensor_cores", lambda device: True)
    with torch.device(DEVICE):
        yield sinkhorn_kernels


def on_both(x, y, a, b):
    """Value and gradient in float32 with the kernels, and in float64, for which there are none."""
    results = []
    for dtype in (torch.float32, torch.float64):
        of_x, of_y = (values.to(dtype).requires_grad_() for values in (x, y))
        weights = [None if w is None else w.to(dtype) for w in (a, b)]
        value = sinkhorn_divergence(of_x, of_y, *weights)
        results.append((value.detach().double(), *torch.autograd.grad(value.sum(), (of_x, of_y))))
    return results


@pytest.mark.parametrize("sizes, apart", [((2, 40, 40, 60), 1.0), ((2, 40, 40, 60), 0.05), ((3, 5, 150, 20), 1.0)])
def test_values_and_gradients_are_those_of_float64(kernels, sizes, apart):
    torch.manual_seed(0)
    sentences, size_x, size_y, genes = sizes
    y = torch.randn(sentences, size_y, genes).relu()
    x = y[:, :size_x] + apart * torch.randn(sentences, size_x, genes)
    x[0] *= 4  # another number of steps
    found, wanted = on_both(x, y, None, None)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=0)
    for one, other in zip(found[1:], wanted[1:]):
        assert (one - other).norm() <= 3e-4 * other.norm()


def test_padded_cells_are_not_there(kernels):
    torch.manual_seed(1)
    x, y = torch.randn(2, 19, 30), torch.randn(2, 19, 30)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[1, 3:] = False
    weights = mask / mask.sum(dim=1, keepdim=True)
    found, wanted = on_both(x, y, weights, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=0)
    assert (found[1] - wanted[1]).norm() <= 1e-4 * wanted[1].norm() and not found[1][1, 3:].any()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_products_have_the_digits_of_float32(kernels, scale):
    torch.manual_seed(2)
    first, second = torch.randn(2, 5, 70) * scale, torch.randn(2, 70, 9)
    second[1] = 0
    exact = torch.bmm(first.double(), second.double())
    found = kernels.product(first, second)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5 * scale)
