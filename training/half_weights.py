"""Training with weights in bfloat16 and master weights in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HalfWeights:
    """
    A bfloat16 copy of the weights of a model, with which forward and backward of its training steps are computed (mixed precision
    with master weights, Micikevicius et al. 2018). The weights themselves stay in float32: they are what the optimiser changes,
    what is averaged, evaluated and saved. Gradients of a batch are bfloat16, and are summed over batches in float32.

    Args:
        model (`torch.nn.Module`): in float32.
    """

    def __init__(self, model: torch.nn.Module):
        self._weights = [weight for weight in model.parameters() if weight.dtype == torch.float32]
        self._copies: list[torch.Tensor] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights of the model are the copy, made anew. After it, the gradients are in float32."""
        masters = [weight.data for weight in self._weights]
        before = [weight.grad for weight in self._weights]
        self._copy(masters)
        for weight, copy in zip(self._weights, self._copies):
            weight.grad, weight.data = None, copy
        try:
            yield
        finally:
            found = [weight.grad for weight in self._weights]
            for weight, master in zip(self._weights, masters):
                weight.grad, weight.data = None, master
            for weight, grad, earlier in zip(self._weights, found, before):
                weight.grad = earlier if grad is None else grad.float() if earlier is None else earlier.add_(grad)

    @torch.no_grad()
    def _copy(self, masters: list[torch.Tensor]):
        if not self._copies or self._copies[0].device != masters[0].device:
            self._copies = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
        torch._foreach_copy_(self._copies, masters)
