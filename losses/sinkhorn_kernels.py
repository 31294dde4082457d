"""The annealing of the Sinkhorn divergence on a GPU: a step reads the costs once, and is one kernel."""

import torch
import triton
import triton.language as tl

from pertstate.losses.energy_kernels import _product


ROWS, COLUMNS = 16, 128  # of a tile of the matrix of costs


@triton.jit
def _over(
    costs, logs, of_x, of_y, row, inside, in_x, first, last, size, inverse, COLUMNS: tl.constexpr
):  # fmt: skip
    """
    `log sum_j w_j exp((p_j - C_ij) / temperature)` of some rows over the columns from `first` to `last`. The potentials p are
    `of_x` for rows of the first set, and `of_y` for those of the second.
    """
    # Below all scores that are not -inf, but finite: the difference of two of them is a number.
    highest = tl.full((row.shape[0],), -1e30, tl.float32)
    total = tl.zeros((row.shape[0],), tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < last
        weight = tl.load(logs + column, there, -float("inf"))
        for_x = weight + tl.load(of_x + column, there, 0.0) * inverse
        for_y = weight + tl.load(of_y + column, there, 0.0) * inverse
        cost = tl.load(costs + row[:, None] * size + column[None, :], inside[:, None] & there[None, :], 0.0)
        score = tl.where(in_x[:, None], for_x[None, :], for_y[None, :]) - cost * inverse
        higher = tl.maximum(highest, tl.max(score, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        highest = higher
    return highest + tl.log(total)


@triton.jit
def _step(
    costs, logs, own, cross, new_own, new_cross, temperatures, size_x, size,
    HALFWAY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The new potentials of some cells of a sentence; with `HALFWAY` they go half of the way, or nowhere at temperature 0."""
    sentence = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, in_x = row < size, row < size_x
    temperature = tl.load(temperatures + sentence)
    left = temperature > 0
    divisor = tl.where(left, temperature, 1.0)
    inverse = 1.0 / divisor
    costs += sentence * size * size
    logs += sentence * size
    own += sentence * size
    cross += sentence * size
    over_x = _over(costs, logs, own, cross, row, inside, in_x, 0, size_x, size, inverse, COLUMNS)
    over_y = _over(costs, logs, cross, own, row, inside, in_x, size_x, size, size, inverse, COLUMNS)
    next_own = -divisor * tl.where(in_x, over_x, over_y)
    next_cross = -divisor * tl.where(in_x, over_y, over_x)
    if HALFWAY:
        was_own, was_cross = tl.load(own + row, inside, 0.0), tl.load(cross + row, inside, 0.0)
        next_own = tl.where(left, (was_own + next_own) * 0.5, was_own)
        next_cross = tl.where(left, (was_cross + next_cross) * 0.5, was_cross)
    tl.store(new_own + sentence * size + row, next_own, inside)
    tl.store(new_cross + sentence * size + row, next_cross, inside)


def _halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 matrices as the sum of two half-precision ones, each times a power of 2, `(B, 1, 1)`, and this power."""
    largest = values.abs().amax(dim=(1, 2), keepdim=True)
    scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)
    scaled = values * scale
    high = scaled.half()
    return high, scaled.sub_(high).half(), scale


def product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Float32 matrices `(B, N, K) x (B, K, M)` to 22 bits, as three half-precision products that are summed in float32."""
    (high, low, scale), (other_high, other_low, other_scale) = _halves(first), _halves(second)
    moved = _product(high, other_high)
    moved = _product(high, other_low, onto=moved)
    moved = _product(low, other_high, onto=moved)
    return moved.div_(scale * other_scale)


def potentials(
    costs: torch.Tensor, logs: torch.Tensor, temperatures: torch.Tensor, size_x: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The potentials of each cell to its own set and to the other one, each `(B, N)`, after all steps.

    Args:
        costs (`torch.Tensor` of shape `(B, N, N)`), logs (`torch.Tensor` of shape `(B, N)`): float32.
        temperatures (`torch.Tensor` of shape `(steps, B)`): 0 where a sentence is done.
        size_x (`int`): cells of the first set.
    """
    sentences, size = logs.shape
    costs, logs, temperatures = costs.contiguous(), logs.contiguous(), temperatures.contiguous()
    was, now = torch.zeros(2, 2, sentences, size, dtype=costs.dtype, device=costs.device)
    grid = (sentences, triton.cdiv(size, ROWS))
    for halfway, steps in ((False, temperatures[:1]), (True, temperatures)):
        for of_step in steps:
            _step[grid](costs, logs, *was, *now, of_step, size_x, size, halfway, ROWS, COLUMNS)
            was, now = now, was
    return was[0], was[1]
