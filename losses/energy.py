"""The energy distance between two sets of cells, exact, in one matrix product."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import nn


# Squared cells times features of a sentence, up to which a CPU computes the padding of a batch faster than it leaves it out.
_CHEAP_SENTENCE = 2**20


class _EnergyDistance(torch.autograd.Function):
    """
    With z = (x_1..x_S, y_1..y_S'), signed weights c = (a, -b) and D_ij = |z_i - z_j|,

        energy = sum_ij a_i b_j |x_i - y_j| - 1/2 sum_ik a_i a_k |x_i - x_k| - 1/2 sum_jl b_j b_l |y_j - y_l|
               = -1/2 c^T D c,          d energy / d z_i = -c_i sum_j c_j (z_i - z_j) / D_ij  (0 where D_ij = 0).

    One Gram matrix gives all distances; the gradient is one more matrix product. Nothing of shape (S, S, D) exists.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        cells = torch.cat((x, y), dim=1)
        weights = torch.cat((a, -b), dim=1)
        # Distances do not change when all cells move together; near the origin the Gram matrix rounds less.
        used = (weights != 0).to(cells.dtype).unsqueeze(-1)
        cells.sub_(torch.bmm(used.transpose(1, 2), cells) / used.sum(dim=1, keepdim=True)).mul_(used)
        gram = torch.bmm(cells, cells.transpose(1, 2))
        norms = gram.diagonal(dim1=1, dim2=2)
        scale = norms.unsqueeze(1) + norms.unsqueeze(2)
        squared = scale - 2 * gram
        # Below the rounding error of the Gram matrix two cells count as identical: distance 0, gradient 0. NaN stays NaN.
        same = squared <= 8 * torch.finfo(cells.dtype).eps * scale
        distances = squared.masked_fill_(same, 0.0).sqrt_()
        energy = -0.5 * torch.einsum("bi,bij,bj->b", weights, distances, weights)
        inverse = distances.reciprocal().masked_fill_(same, 0.0)
        ctx.save_for_backward(cells, weights, inverse)
        ctx.split = x.shape[1]
        return energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        cells, weights, inverse = ctx.saved_tensors
        split, needs_x, needs_y = ctx.split, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        rows = slice(0 if needs_x else split, None if needs_y else split)
        push = grad[:, None, None] * weights[:, rows, None] * inverse[:, rows] * weights[:, None, :]
        # sum_j push_ij (z_j - z_i), the term of z_i on the diagonal, where inverse and so push are 0.
        push.diagonal(offset=rows.start, dim1=1, dim2=2).copy_(-push.sum(dim=2))
        moved = torch.bmm(push, cells)
        return (
            moved[:, :split] if needs_x else None,
            moved[:, -(cells.shape[1] - split) :] if needs_y else None,
            None,
            None,
        )


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies half-precision matrices in hardware, this torch sums them in float32, and Triton is there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return "dtype" in torch.ops.aten.bmm.overloads() and find_spec("triton") is not None


def energy_distance(
    x: torch.Tensor, y: torch.Tensor, a: torch.Tensor | None = None, b: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Energy distance (Székely & Rizzo 2013) of each of B pairs of weighted sets of cells, diagonals included.

    Args:
        x (`torch.Tensor` of shape `(B, S, D)`), y (`torch.Tensor` of shape `(B, S', D)`): the two sets.
        a (`torch.Tensor` of shape `(B, S)`, *optional*), b (`torch.Tensor` of shape `(B, S')`, *optional*):
            Weights of the cells, each row summing to 1; a cell of weight 0 is not there. Uniform where not given.
            No gradient flows to them.

    Returns:
        `torch.Tensor` of shape `(B,)`, in the units of the cells. Half precision is computed in float32.
    """
    if a is None:
        a = x.new_full(x.shape[:2], 1 / x.shape[1])
    if b is None:
        b = y.new_full(y.shape[:2], 1 / y.shape[1])
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if dtype == torch.float32 and not y.requires_grad and has_tensor_cores(x.device):
            from pertstate.losses.energy_kernels import HalfProducts

            return HalfProducts.apply(x, y, a.to(dtype), b.to(dtype))
        return _EnergyDistance.apply(x.to(dtype), y.to(dtype), a.to(dtype), b.to(dtype))


class EnergyLoss(nn.Module):
    """
    Energy distance between predicted and observed cells:
    `mean_ij |x_i - y_j| - 1/2 mean_ik |x_i - x_k| - 1/2 mean_jl |y_j - y_l|`, the value of geomloss'
    `SamplesLoss("energy")`.

    Inputs:
        - predictions `(B, S, D)`, targets `(B, S, D)`, mask `(B, S)` bool or None: the real cells of both.
    Output:
        - `(B,)`, one distance a sentence.

    Example:
    ```python
    >>> EnergyLoss()(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    tensor([1.7321])
    ```
    """

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return energy_distance(predictions, targets)
        _, cells, features = predictions.shape
        if mask.device.type == "cpu" and cells**2 * features > _CHEAP_SENTENCE:
            # Without the padding, which a GPU computes faster than it leaves it out.
            sentences = zip(predictions.unbind(), targets.unbind(), mask.bool().unbind())
            return torch.cat([energy_distance(x[real][None], y[real][None]) for x, y, real in sentences])
        weights = mask / mask.sum(dim=1, keepdim=True)
        return energy_distance(predictions, targets, weights, weights)
