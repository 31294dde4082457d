"""
The energy distance's kernels for a GPU: value and gradient are those of float64. Without a GPU, Triton's interpreter runs
them.
"""

import pytest
import torch

from pertstate.losses.energy import energy_distance


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def half_products(monkeypatch):
    from pertstate.losses import energy_kernels

    if DEVICE == "cpu":
        # Only a GPU can give products of half-precision matrices in float32. Elsewhere they are multiplied in float32, where the
        # product of two half-precision numbers is exact.
        def product(first, second, onto=None, times=1.0):
            made = torch.bmm(first.float(), second.float())
            return made if onto is None else onto.add_(made, alpha=times)

        monkeypatch.setattr(energy_kernels, "_product", product)
    with torch.device(DEVICE):
        yield energy_kernels.HalfProducts.apply


def weights_of(mask: torch.Tensor) -> torch.Tensor:
    return mask / mask.sum(dim=1, keepdim=True)


@pytest.mark.filterwarnings("ignore:.*encountered in divide")
@pytest.mark.parametrize(
    "sizes, apart, scale",
    [
        ((2, 40, 40, 60), 1.0, 1.0),
        ((2, 40, 40, 60), 0.05, 1e-12),
        ((2, 33, 50, 130), 1.0, 1e12),
        ((2, 33, 50, 130), 0.05, 1.0),
        ((1, 5, 3, 20), 1.0, 1.0),
        ((1, 5, 9, 20), 0.0, 1.0),
    ],
)
def test_values_and_gradients_are_those_of_float64(half_products, sizes, apart, scale):
    torch.manual_seed(0)
    sentences, size_x, size_y, genes = sizes
    y = torch.randn(sentences, size_y, genes).relu() + 3
    x = y[:, :1].repeat(1, size_x, 1) if size_x > size_y else y[:, :size_x].clone()
    x += apart * torch.randn_like(x)
    x[0, 1], y[0, 2] = x[0, 0], y[0, 1]  # cells that stand twice
    x, y = x * scale, y * scale
    of_x, of_y = torch.ones(sentences, size_x, dtype=torch.bool), torch.ones(sentences, size_y, dtype=torch.bool)
    of_x[0, size_x - 1 :], of_y[0, size_y - 1 :] = False, False
    a, b = weights_of(of_x), weights_of(of_y)
    grad = torch.arange(1.0, sentences + 1)

    x.requires_grad_()
    value = half_products(x, y, a, b)
    (gradient,) = torch.autograd.grad(value, x, grad)
    exact = x.detach().double().requires_grad_()
    wanted = energy_distance(exact, y.double(), a.double(), b.double())
    (of_wanted,) = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6 * scale)
    norm = (gradient.double() - of_wanted)[of_x].norm() / of_wanted[of_x].norm().clamp(min=1e-3)
    assert norm < 1e-4 and not gradient[~of_x].any()


@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_half_precision_goes_in_and_nan_stays(half_products):
    torch.manual_seed(1)
    x, y = torch.randn(2, 8, 30), torch.randn(2, 8, 30)
    a = torch.full((2, 8), 1 / 8)
    rounded = x.bfloat16().requires_grad_()
    value = half_products(rounded, y, a, a)
    (gradient,) = torch.autograd.grad(value.sum(), rounded)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, energy_distance(rounded.detach().float(), y), rtol=1e-5, atol=1e-6)
    x[1, 3, 2] = torch.nan
    found = half_products(x, y, a, a)
    assert found[0].isfinite() and found[1].isnan()


def test_large_sets_are_taken_one_after_another(half_products, monkeypatch):
    from pertstate.losses import energy_kernels

    torch.manual_seed(2)
    x, y = torch.randn(3, 9, 20), torch.randn(3, 9, 20)
    a = torch.full((3, 9), 1 / 9)
    whole = half_products(x, y, a, a)
    monkeypatch.setattr(energy_kernels, "LARGEST_GRAM", 4 * 18 * 18)
    torch.testing.assert_close(half_products(x, y, a, a), whole, rtol=0, atol=0)
