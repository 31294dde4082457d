"""The Sinkhorn divergence between two sets of cells, of all sentences of a batch together."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from pertstate.losses.energy import has_tensor_cores


# Bytes of the costs of the sentences that are taken together, and of the part of them that is worked on at once: on a CPU these
# fit its caches, on a GPU its memory. A sentence that is larger is taken alone.
TOGETHER = {"cpu": 1 << 21, "cuda": 1 << 28}
AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 28}


def _temperatures(diameters: np.ndarray, blur: float) -> np.ndarray:
    """
    The temperatures of geomloss' annealing for sentences of these diameters, `(steps, B)`: from the squared diameter, divided by
    4 at each step, to the squared blur. A sentence that needs fewer steps than another has a 0 in each of the others.
    """
    of_sentences = []
    for diameter in diameters:
        # Without extent, and where a cell is NaN or infinite, there is nothing to anneal.
        if diameter == 0 or not math.isfinite(diameter):
            of_sentences.append([blur**2])
            continue
        logs = np.arange(2 * np.log(diameter), 2 * np.log(blur), 2 * np.log(0.5))
        of_sentences.append([diameter**2, *np.exp(logs), blur**2])
    temperatures = np.zeros((max(map(len, of_sentences)), len(diameters)))
    for column, of_sentence in enumerate(of_sentences):
        temperatures[: len(of_sentence), column] = of_sentence
    return temperatures


def _on_tensor_cores(values: torch.Tensor) -> bool:
    return values.dtype == torch.float32 and has_tensor_cores(values.device)


def _product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`(B, N, K) x (B, K, M)`, not in TF32, which would lose the digits of sets that are close together."""
    if _on_tensor_cores(first):
        from pertstate.losses.sinkhorn_kernels import product

        return product(first, second)
    return torch.bmm(first, second)


def _extent(
    sets: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] | None, together: bool
) -> tuple[np.ndarray, np.ndarray]:
    """
    The diameters `(B,)` of pairs of sets, which are those of the boxes around them, or of the box around all `together`; and the
    cells up to the last one that is there, `(B, 2)`. A GPU is waited for once.
    """
    if weights is not None:
        absent = [(of == 0).unsqueeze(-1) for of in weights]
        highest = [of.masked_fill(none, -math.inf).amax(dim=1) for of, none in zip(sets, absent)]
        lowest = [of.masked_fill(none, math.inf).amin(dim=1) for of, none in zip(sets, absent)]
        places = [torch.arange(1, of.shape[1] + 1, device=of.device) * (of != 0) for of in weights]
        sizes = [of.amax(dim=1).double() for of in places]
    else:
        highest, lowest = [of.amax(dim=1) for of in sets], [of.amin(dim=1) for of in sets]
        sizes = [of.new_full(of.shape[:1], of.shape[1], dtype=torch.float64) for of in sets]
    top, bottom = torch.maximum(*highest), torch.minimum(*lowest)
    if together:
        top, bottom = top.amax(dim=0).expand_as(top), bottom.amin(dim=0).expand_as(bottom)
    diameters = torch.linalg.vector_norm(top - bottom, dim=1)
    figures = torch.stack((diameters.double(), *sizes)).cpu().numpy()
    return figures[0], figures[1:].T.astype(int)


def _together(sizes: np.ndarray, cells: torch.Tensor) -> Iterator[tuple[torch.Tensor | slice, int, int]]:
    """Which sentences are taken together, those of like sizes, and the cells of the longest of each of their two sets."""
    together, alike = TOGETHER[cells.device.type], (sizes == sizes[0]).all()
    order = np.arange(len(sizes)) if alike else np.argsort(sizes.sum(axis=1), kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order):
            of_both = sizes[order[start : stop + 1]].max(axis=0).sum()
            if (stop + 1 - start) * cells.element_size() * of_both**2 > together:
                break
            stop += 1
        widths = sizes[order[start:stop]].max(axis=0).tolist()
        yield slice(start, stop) if alike else torch.from_numpy(order[start:stop]).to(cells.device), *widths
        start = stop


class _Costs:
    """
    Half of the squared distances between all cells of some sentences, and the potentials of optimal transport on them.

    Args:
        cells (`torch.Tensor` of shape `(B, N, D)`): the cells of both sets, those of the first one first, moved to their centre.
        logs (`torch.Tensor` of shape `(B, N)`): the logs of their weights, -inf of padded cells.
        split (`int`): cells of the first set.
    """

    def __init__(self, cells: torch.Tensor, logs: torch.Tensor, split: int):
        self.logs = logs
        self.first, self.second = slice(0, split), slice(split, None)
        gram = _product(cells, cells.mT)
        norms = gram.diagonal(dim1=1, dim2=2) / 2
        self.values = gram.neg_().add_(norms.unsqueeze(1)).add_(norms.unsqueeze(2)).clamp_(min=0)
        self.values.diagonal(dim1=1, dim2=2).zero_()

    def scores(
        self, rows: slice, columns: slice, potentials: torch.Tensor, temperatures: torch.Tensor, out=None
    ) -> torch.Tensor:
        """`log w_j + (p_j - C_ij) / temperature` of some rows and columns, `(B, rows, columns)`."""
        inverse = -1 / temperatures[:, None, None]
        scores = torch.mul(self.values[:, rows, columns], inverse, out=out)
        return scores.add_((self.logs[:, columns] + potentials[:, columns] / temperatures[:, None]).unsqueeze(1))

    def softmin(
        self, rows: slice, columns: slice, potentials: torch.Tensor, temperatures: torch.Tensor
    ) -> torch.Tensor:
        """`-temperature log sum_j w_j exp((p_j - C_ij) / temperature)`, `(B, rows)`."""
        sentences, count, width = self.values[:, rows, columns].shape
        together = max(1, AT_ONCE[self.values.device.type] // (self.values.element_size() * sentences * width))
        # The largest score is 0, beside which this one vanishes. Exponentials below it are slow on a CPU.
        lowest = math.ceil(math.log(torch.finfo(self.values.dtype).tiny))
        found = self.values.new_empty(sentences, count)
        buffer = self.values.new_empty(sentences * min(together, count) * width)
        for start in range(0, count, together):
            some = slice(start, min(start + together, count))
            of_rows = slice(rows.start + some.start, rows.start + some.stop)
            place = buffer[: sentences * (some.stop - some.start) * width].view(sentences, -1, width)
            scores = self.scores(of_rows, columns, potentials, temperatures, out=place)
            largest = scores.amax(dim=2, keepdim=True)
            sums = scores.sub_(largest).clamp_(min=lowest).exp_().sum(dim=2).log_()
            torch.add(sums, largest.squeeze(2), out=found[:, some])
        return found.mul_(-temperatures[:, None])

    def softmins(self, own: torch.Tensor, cross: torch.Tensor, temperatures: torch.Tensor):
        """The softmin of each cell over its own set, with the potentials `own`, and over the other one, with `cross`."""
        first, second = self.first, self.second
        pairs = (first, first, own), (second, second, own), (first, second, cross), (second, first, cross)
        found = [self.softmin(rows, columns, of, temperatures) for rows, columns, of in pairs]
        return torch.cat(found[:2], dim=1), torch.cat(found[2:], dim=1)

    def potentials(self, temperatures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The potentials of transport to a cell's own set and to the other one, each `(B, N)`, after all steps of annealing."""
        if _on_tensor_cores(self.values):
            from pertstate.losses.sinkhorn_kernels import potentials

            return potentials(self.values, self.logs, temperatures, self.first.stop)
        zeros = torch.zeros_like(self.logs)
        own, cross = self.softmins(zeros, zeros, temperatures[0])
        for step in temperatures:
            left = step > 0
            new_own, new_cross = self.softmins(own, cross, torch.where(left, step, 1.0))
            # Half of the way: both potentials change at once.
            own = torch.where(left[:, None], (own + new_own) / 2, own)
            cross = torch.where(left[:, None], (cross + new_cross) / 2, cross)
        return own, cross


class _SinkhornDivergence(torch.autograd.Function):
    """
    With the potentials f of transport between two sets, and p of each set to itself, after the last step of annealing,

        divergence = sum_i a_i (f_i - p_i) + sum_j b_j (f_j - p_j),     d divergence / d x_i = a_i (sum_k q_ik x_k - sum_j t_ij y_j)

    where t_i are the shares of x_i that go to each y_j, and q_i those to each x_k. The potentials are taken as they are, as those
    of an optimum may be (Danskin's theorem).
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        y: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        blur: float,
        padded: bool,
        together: bool,
    ):
        diameters, sizes = _extent((x, y), (a, b) if padded else None, together)
        temperatures = torch.from_numpy(_temperatures(diameters, blur)).to(x)
        found = x.new_empty(len(x))
        gradients = [torch.zeros_like(of) if needed else None for of, needed in zip((x, y), ctx.needs_input_grad)]
        for some, width_x, width_y in _together(sizes, x):
            parts, shares = (x[some, :width_x], y[some, :width_y]), (a[some, :width_x], b[some, :width_y])
            cells, weights = torch.cat(parts, dim=1), torch.cat(shares, dim=1)
            # Distances do not change when all cells move together; near the origin the Gram matrix rounds less.
            if padded:
                used = (weights != 0).unsqueeze(-1)
                cells.masked_fill_(~used, 0)
                cells.sub_(cells.sum(dim=1, keepdim=True) / used.sum(dim=1, keepdim=True)).masked_fill_(~used, 0)
            else:
                cells.sub_(cells.mean(dim=1, keepdim=True))
            costs = _Costs(cells, weights.log(), width_x)
            own, cross = costs.potentials(temperatures[:, some])
            last = torch.full_like(own[:, 0], blur**2)
            last_own, last_cross = costs.softmins(own, cross, last)
            found[some] = (weights * (last_cross - last_own)).sum(dim=1)
            sides = (costs.first, costs.second, width_x), (costs.second, costs.first, width_y)
            for gradient, (rows, others, width) in zip(gradients, sides):
                if gradient is not None:
                    to_own = costs.scores(rows, rows, own, last).softmax(dim=2)
                    to_others = costs.scores(rows, others, cross, last).softmax(dim=2)
                    moved = _product(to_own, cells[:, rows]).sub_(_product(to_others, cells[:, others]))
                    gradient[some, :width] = moved.mul_(weights[:, rows].unsqueeze(-1))
        ctx.save_for_backward(*gradients)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        moved = [None if gradient is None else grad[:, None, None] * gradient for gradient in ctx.saved_tensors]
        return *moved, None, None, None, None, None


def sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    blur: float = 0.05,
    together: bool = False,
) -> torch.Tensor:
    """
    Debiased entropic optimal transport, with half of the squared Euclidean distance as its cost (Feydy et al. 2019), of each of B
    pairs of weighted sets of cells: what geomloss' `SamplesLoss("sinkhorn", p=2, blur=blur)` gives for each pair alone.

    The temperature is annealed as geomloss does it, from the squared diameter of the two sets to the squared blur.

    Args:
        x (`torch.Tensor` of shape `(B, S, D)`), y (`torch.Tensor` of shape `(B, S', D)`): the two sets.
        a (`torch.Tensor` of shape `(B, S)`, *optional*), b (`torch.Tensor` of shape `(B, S')`, *optional*):
            Weights of the cells, each row summing to 1; a cell of weight 0 is not there. Uniform where not given.
            No gradient flows to them.
        blur (`float`): entropic blur, in the units of the cells.
        together (`bool`): anneal each pair from the diameter of all of them, as geomloss does with a batch. The value of a pair
            then depends a little on the others.

    Returns:
        `torch.Tensor` of shape `(B,)`, in squared units of the cells. Half precision is computed in float32.
    """
    padded = a is not None or b is not None
    if a is None:
        a = x.new_full(x.shape[:2], 1 / x.shape[1])
    if b is None:
        b = y.new_full(y.shape[:2], 1 / y.shape[1])
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return _SinkhornDivergence.apply(
            x.to(dtype), y.to(dtype), a.to(dtype), b.to(dtype), float(blur), padded, together
        )


class SinkhornLoss(nn.Module):
    """
    [`sinkhorn_divergence`] of predicted and observed cells. The sentences of a batch without padding are annealed together, as
    published models were trained; each sentence of a padded batch is annealed alone.

    Args:
        blur (`float`): entropic blur, in the units of the cells.

    Inputs:
        - predictions `(B, S, D)`, targets `(B, S, D)`, mask `(B, S)` bool or None: the real cells of both.
    Output:
        - `(B,)`, one divergence a sentence, in squared units of the cells.

    Example:
    ```python
    >>> SinkhornLoss(blur=0.05)(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), None)
    tensor([1.5000])
    ```
    """

    def __init__(self, blur: float):
        super().__init__()
        self.blur = blur

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        weights = None if mask is None else mask / mask.sum(dim=1, keepdim=True)
        return sinkhorn_divergence(predictions, targets, weights, weights, self.blur, together=mask is None)
