"""
The energy distance on a GPU whose tensor cores multiply half precision: the same value and gradient, several times faster.

A float32 number is the sum of two float16 numbers to 22 bits, once the cells of a sentence are moved to their centre and
scaled to at most 1. So the Gram matrix is two half-precision products, which are summed in float32, and the gradient is
three. Between the products, each matrix is passed over once.
"""

import torch
import triton
import triton.language as tl


CELLS_OF_BLOCK = 16  # whose values are split by one program
CELLS_OF_SUM = 64  # that are added up at once
GENES_OF_BLOCK = 128
PAIRS = (32, 128)  # rows and columns of a tile of the matrix of distances
LARGEST_GRAM = 1 << 28  # bytes; sentences beyond it are taken one after another
# Below this part of the squared norms, a squared distance is computed from the differences: from the norms it would lose its digits.
NEAR = 0.1


@triton.jit
def _centre(x, y, a, b, centre, largest, size_x, size_y, genes, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """For some genes of a sentence: the mean of its cells, and the largest distance of a value from 0."""
    sentence, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < genes
    total = tl.zeros((BLOCK,), tl.float32)
    highest = tl.zeros((BLOCK,), tl.float32)
    count = 0.0
    for start in range(0, size_x, CELLS):
        row = start + tl.arange(0, CELLS)
        used = tl.load(a + sentence * size_x + row, row < size_x, 0.0) != 0
        place = (sentence * size_x + row)[:, None] * genes + column[None, :]
        values = tl.load(x + place, used[:, None] & there[None, :], 0.0).to(tl.float32)
        total += tl.sum(values, 0)
        highest = tl.maximum(highest, tl.max(tl.abs(values), 0))
        count += tl.sum(used.to(tl.float32), 0)
    for start in range(0, size_y, CELLS):
        row = start + tl.arange(0, CELLS)
        used = tl.load(b + sentence * size_y + row, row < size_y, 0.0) != 0
        place = (sentence * size_y + row)[:, None] * genes + column[None, :]
        values = tl.load(y + place, used[:, None] & there[None, :], 0.0).to(tl.float32)
        total += tl.sum(values, 0)
        highest = tl.maximum(highest, tl.max(tl.abs(values), 0))
        count += tl.sum(used.to(tl.float32), 0)
    mean = total / count
    tl.store(centre + sentence * genes + column, mean, there)
    # Twice the largest value bounds the distance from the mean.
    tl.store(largest + sentence * genes + column, 2.0 * highest, there)


@triton.jit
def _split(x, y, a, b, centre, scale, high, low, size_x, size_y, genes, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """Some cells of a sentence, moved to the centre and scaled, as the sum of two half-precision numbers; padded cells are 0."""
    sentence, size = tl.program_id(0).to(tl.int64), size_x + size_y
    row = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = column < genes
    factor = tl.load(scale + sentence)
    mean = tl.load(centre + sentence * genes + column, there, 0.0)
    in_x, in_y = row < size_x, (row >= size_x) & (row < size)
    used_x = tl.load(a + sentence * size_x + row, in_x, 0.0) != 0
    used_y = tl.load(b + sentence * size_y + row - size_x, in_y, 0.0) != 0
    place_x = (sentence * size_x + row)[:, None] * genes + column[None, :]
    place_y = (sentence * size_y + row - size_x)[:, None] * genes + column[None, :]
    values = tl.load(x + place_x, used_x[:, None] & there[None, :], 0.0).to(tl.float32)
    values += tl.load(y + place_y, used_y[:, None] & there[None, :], 0.0).to(tl.float32)
    values = tl.where((used_x | used_y)[:, None], (values - mean[None, :]) * factor, 0.0)
    first = values.to(tl.float16)
    second = (values - first.to(tl.float32)).to(tl.float16)
    place = (sentence * size + row)[:, None] * genes + column[None, :]
    inside = (row < size)[:, None] & there[None, :]
    tl.store(high + place, first, inside)
    tl.store(low + place, second, inside)


@triton.jit
def _differences(high, low, first, row, column, size, genes):
    """The squared distances of a tile, gene by gene: exact where two cells are near one another, and much slower."""
    of_row, of_column = (first + row) * genes, (first + column) * genes
    squared = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for gene in range(0, genes):
        one = tl.load(high + of_row + gene, row < size, 0.0).to(tl.float32)
        one += tl.load(low + of_row + gene, row < size, 0.0).to(tl.float32)
        other = tl.load(high + of_column + gene, column < size, 0.0).to(tl.float32)
        other += tl.load(low + of_column + gene, column < size, 0.0).to(tl.float32)
        apart = one[:, None] - other[None, :]
        squared += apart * apart
    return squared


@triton.jit
def _pairs(
    gram, rest, high, low, weights, scale, energy, sums, push_high, push_low, size_x, size, genes, near,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """
    Some rows of the distances of a sentence: their part of the energy, and for cells of x the weights of the gradient.

    Rows of y against columns of x are those of x against y once more. They are summed all the same: x and y cancel within a row,
    so that the sum rounds less.
    """
    sentence, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    row = first + tl.arange(0, ROWS)
    inside = row < size
    own = gram + sentence * size * size
    norm = tl.load(own + row * size + row, inside, 0.0) + tl.load(rest + sentence * size + row, inside, 0.0)
    weight = tl.load(weights + sentence * size + row, inside, 0.0)
    total = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float32)
    of_x = row < size_x
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = inside[:, None] & (column < size)[None, :]
        one = tl.load(own + row[:, None] * size + column[None, :], there, 0.0)
        other = tl.load(own + column[None, :] * size + row[:, None], there, 0.0)
        against = tl.load(own + column * size + column, column < size, 0.0)
        against += tl.load(rest + sentence * size + column, column < size, 0.0)
        norms = norm[:, None] + against[None, :]
        squared = norms - (one + other)
        itself = row[:, None] == column[None, :]
        close = there & ~itself & (squared < near * norms)
        if tl.sum(close.to(tl.int32)) > 0:
            squared = tl.where(close, _differences(high, low, sentence * size, row, column, size, genes), squared)
        # Identical cells have distance 0 and gradient 0. NaN stays NaN.
        same = itself | (squared <= 0.0)
        distance = tl.sqrt(tl.where(same, 0.0, squared))
        against = tl.load(weights + sentence * size + column, column < size, 0.0)
        total += tl.sum(tl.where(there, distance * against[None, :], 0.0), 1)
        if GRADIENT:
            if first < size_x:
                push = tl.where(same | ~there, 0.0, against[None, :] * size / distance)
                pull += tl.sum(push, 1)
                of_push = push.to(tl.float16)
                place = (sentence * size_x + row)[:, None] * size + column[None, :]
                kept = there & of_x[:, None]
                tl.store(push_high + place, of_push, kept)
                tl.store(push_low + place, (push - of_push.to(tl.float32)).to(tl.float16), kept)
    part = tl.sum(weight * total, 0)
    factor = tl.load(scale + sentence)
    tl.store(energy + sentence * tl.num_programs(1) + tl.program_id(1), -0.5 * part / factor)
    if GRADIENT:
        tl.store(sums + sentence * size_x + row, pull, of_x)


@triton.jit
def _gradient(
    moved, sums, high, low, weights, grad, out, size_x, size, genes, BLOCK: tl.constexpr, CELLS: tl.constexpr
):
    """D energy / d x_i = -a_i sum_j c_j (z_i - z_j) / D_ij, of `moved` = sum_j c_j z_j / D_ij and `sums` = sum_j c_j / D_ij."""
    sentence = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < size_x)[:, None] & (column < genes)[None, :]
    weight = tl.load(weights + sentence * size + row, row < size_x, 0.0)
    pull = tl.load(sums + sentence * size_x + row, row < size_x, 0.0)
    cells = (sentence * size + row)[:, None] * genes + column[None, :]
    own = tl.load(high + cells, inside, 0.0).to(tl.float32) + tl.load(low + cells, inside, 0.0).to(tl.float32)
    place = (sentence * size_x + row)[:, None] * genes + column[None, :]
    towards = tl.load(moved + place, inside, 0.0)
    factor = tl.load(grad + sentence) / size
    value = factor * weight[:, None] * (towards - pull[:, None] * own)
    tl.store(out + place, value.to(out.dtype.element_ty), inside)


def _product(
    first: torch.Tensor, second: torch.Tensor, onto: torch.Tensor | None = None, times: float = 1.0
) -> torch.Tensor:
    """
    Half-precision matrices multiplied and summed in float32, `(B, N, K) x (B, K, M)`; so many times added to `onto`, which
    changes, where it is given.
    """
    if onto is None:
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.baddbmm(onto, first, second, alpha=times, out_dtype=torch.float32, out=onto)


class HalfProducts(torch.autograd.Function):
    """
    [`energy_distance`] of sets `x` (B, S, D) with weights `a` (B, S), and `y` (B, S', D) with `b` (B, S'). Only `x` has a
    gradient.

    With z moved to its centre and scaled, z = h + l, h and l of half precision: z z^T is h h^T + h (2 l)^T, made symmetric,
    but for l l^T, of which the diagonal alone counts.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (sentences, size_x, genes), size_y = x.shape, y.shape[1]
        size = size_x + size_y
        x, y, a, b = x.contiguous(), y.contiguous(), a.contiguous(), b.contiguous()
        blocks = triton.cdiv(genes, GENES_OF_BLOCK)
        centre, largest = x.new_empty(2, sentences, genes, dtype=torch.float32)
        _centre[(sentences, blocks)](
            x, y, a, b, centre, largest, size_x, size_y, genes, GENES_OF_BLOCK, CELLS_OF_SUM, num_warps=8
        )  # fmt: skip
        # A power of two: nothing is rounded.
        scale = torch.ldexp(torch.ones_like(largest[:, 0]), -torch.frexp(largest.amax(dim=1)).exponent)
        high, low = x.new_empty(2, sentences, size, genes, dtype=torch.float16)
        _split[(sentences, triton.cdiv(size, CELLS_OF_BLOCK), blocks)](
            x, y, a, b, centre, scale, high, low, size_x, size_y, genes, GENES_OF_BLOCK, CELLS_OF_BLOCK
        )  # fmt: skip
        # Between two different cells l l^T is below the rounding error; between a cell and itself it counts.
        rest = torch.linalg.vector_norm(low, dim=2, dtype=torch.float32).square_()
        weights = torch.cat((a, -b), dim=1)
        rows, columns = PAIRS
        parts = x.new_empty(sentences, triton.cdiv(size, rows), dtype=torch.float32)
        gradient = ctx.needs_input_grad[0]
        sums = x.new_empty(sentences, size_x if gradient else 0, dtype=torch.float32)
        push_high, push_low = x.new_empty(2, sentences, size_x if gradient else 0, size, dtype=torch.float16)
        together = max(1, LARGEST_GRAM // (4 * size * size))
        for start in range(0, sentences, together):
            some = slice(start, start + together)
            gram = _product(high[some], high[some].mT)
            gram = _product(high[some], low[some].mT, onto=gram, times=2.0)
            _pairs[(len(gram), parts.shape[1])](
                gram, rest[some], high[some], low[some], weights[some], scale[some], parts[some], sums[some],
                push_high[some], push_low[some], size_x, size, genes, NEAR, gradient, rows, columns,
            )  # fmt: skip
        ctx.save_for_backward(high, low, weights, sums, push_high, push_low)
        ctx.dtype = x.dtype
        return parts.sum(dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        high, low, weights, sums, push_high, push_low = ctx.saved_tensors
        sentences, size, genes = high.shape
        size_x = sums.shape[1]
        moved = _product(push_high, high)
        moved = _product(push_high, low, onto=moved)
        moved = _product(push_low, high, onto=moved)
        out = moved if ctx.dtype == torch.float32 else torch.empty_like(moved, dtype=ctx.dtype)
        blocks = (sentences, triton.cdiv(size_x, CELLS_OF_BLOCK), triton.cdiv(genes, GENES_OF_BLOCK))
        _gradient[blocks](
            moved, sums, high, low, weights, grad.contiguous(), out, size_x, size, genes, GENES_OF_BLOCK, CELLS_OF_BLOCK
        )  # fmt: skip
        return out, None, None, None
