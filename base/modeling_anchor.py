"""What training cells show of perturbations and controls, applied to control cells: where a State model starts from."""

import numpy as np
import torch
from torch import nn

from .messages import given


# Added to both means before their ratio is taken, in the units of `expm1`. Cells are mostly scaled to 10,000 counts: this is
# one count of a gene in a million, below which a ratio of means is noise.
PSEUDOCOUNT = 1e-2
# A factor of expression beyond e to this is none that cells have.
_LARGEST_LOG_FOLD = 30.0


class Anchor(nn.Module):
    r"""
    Control cells `x` changed by what training means show of their perturbation, without gradients.

    Of expression, half of the mean change and half of the geometric mean fold change,

        1/2 max(0, x + sum_k d_k change_k) + 1/2 log1p(expm1(x) exp(sum_k d_k log_fold_k))

    over the perturbations k that are applied together, at their doses d_k; of an embedding, `x + sum_k d_k change_k`. With
    perturbation features f, `f W + b` takes the place of each sum; the control (features of 0) is left as it is. Until
    [`Anchor.set`] is given what the training cells show, nothing changes.

    The mean of n control cells is not what the context expresses, but that plus noise, which all its predictions would share.
    Where a prediction is given the mean expression of all control cells of its context, its expression is multiplied by
    `exp(r)` of [`Anchor.correction`].

    Args:
        width (`int`): perturbations, or the width of perturbation features.
        features (`int`): features of a cell.
        contexts (`int`): contexts in the vocabulary; 0 leaves controls as they are.
        expression (`bool`): cells are log1p expression.
        by_features (`bool`): perturbations are given by features.
    """

    change: torch.Tensor
    log_fold: torch.Tensor
    control_expression: torch.Tensor
    control_counts: torch.Tensor
    control_variation: torch.Tensor

    def __init__(self, width: int, features: int, contexts: int, expression: bool, by_features: bool):
        super().__init__()
        self.expression, self.by_features = expression, by_features
        self.corrects = expression and contexts > 0
        for name in self.tables:
            self.register_buffer(name, torch.zeros(width, features))
            if by_features:
                self.register_buffer(f"shared_{name}", torch.zeros(features))
        if self.corrects:
            self.register_buffer("control_expression", torch.zeros(contexts, features))
            self.register_buffer("control_counts", torch.zeros(contexts))
            self.register_buffer("control_variation", torch.zeros(features))

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables with a row for each perturbation: `change`, and of expression `log_fold`."""
        return ("change", "log_fold") if self.expression else ("change",)

    def set(self, **tables: np.ndarray):
        """
        Take what training cells show.

        Args:
            tables (`np.ndarray`): by name.

                - `change` and `log_fold` of shape `(width, features)`
                - with perturbation features `shared_change` and `shared_log_fold` of shape `(features,)`
                - `control_expression` of shape `(contexts, features)`: the mean of `expm1` of each context's control cells
                - `control_counts` of shape `(contexts,)`: their number, 0 of a context that is not to be used
                - `control_variation` of shape `(features,)`: the mean over contexts of `var(expm1(x)) / (mean + c)^2`, the
                  variance being that between cells

        Raises:
            ValueError: a shape is another one.
        """
        for name, values in tables.items():
            own = getattr(self, name)
            if values.shape != tuple(own.shape):
                raise ValueError(f"{name}: expected shape {tuple(own.shape)}, found {values.shape}")
            own.copy_(torch.as_tensor(values))

    @torch.no_grad()
    def forward(
        self,
        cells: torch.Tensor,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        control_expression: torch.Tensor | None = None,
        control_counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Control cells `(B, S, D)` and their perturbation to changed cells `(B, S, D)`, float32.

        Args:
            control_expression (`torch.Tensor` of shape `(B, D)`, *optional*): the mean of `expm1` of all control cells of the
                sentence's context, where it is to be corrected.
            control_counts (`torch.Tensor` of shape `(B,)`, *optional*): the number of these cells.
        """
        if perturbation_features is not None:
            weights = perturbation_features.float()
            weights = weights if weights.dim() == 3 else weights.unsqueeze(1)
            perturbed = (weights != 0).any(dim=-1, keepdim=True).float()
            sums = {name: weights @ getattr(self, name).float() for name in self.tables}
            if self.by_features:
                sums = {name: of + perturbed * getattr(self, f"shared_{name}").float() for name, of in sums.items()}
        else:
            ids = given("perturbation_ids", perturbation_ids)
            weights = (ids >= 0).float()
            perturbed = weights.amax(dim=1)[:, None, None]
            if perturbation_doses is not None:
                weights = weights * perturbation_doses.float()
            rows = ids.clamp(min=0)
            sums = {
                name: (weights.unsqueeze(-1) * getattr(self, name).float()[rows]).sum(dim=1, keepdim=True)
                for name in self.tables
            }
        cells = cells.float()
        moved = cells + sums["change"]
        if not self.expression:
            return moved
        factor = sums["log_fold"].clamp(max=_LARGEST_LOG_FOLD).exp()
        changed = (moved.relu() + torch.log1p(torch.expm1(cells) * factor)) / 2
        if control_expression is None or not self.corrects:
            return changed
        counts = given("control_counts", control_counts)
        correction = self.correction(control_expression, counts, given("context_ids", context_ids))
        return torch.log1p(torch.expm1(changed) * (perturbed * correction.unsqueeze(1)).exp())

    def correction(self, expression: torch.Tensor, counts: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        r"""
        The log of the factor from the measured mean expression of a context's control cells to its estimate, which is shrunk
        towards the control cells of the other training contexts, gene by gene, by empirical Bayes (Efron & Morris 1973): with
        `l = log(e + c)` of a mean expression e, and the squared standard error `s^2 = variation / n`,

            r = s^2 / (s^2 + t^2) (log(mean of the others' e + c) - l),   t^2 = max(0, var(l) - mean(s^2))

        The variance `t^2` between contexts is that over the others and the context itself. A gene in which the context differs
        by more than its noise is left as it is.

        Args:
            expression (`torch.Tensor` of shape `(B, D)`), counts (`torch.Tensor` of shape `(B,)`): of the control cells.
            context_ids (`torch.Tensor` of shape `(B,)`): which training context it is, -1 for another one.

        Returns:
            `torch.Tensor` of shape `(B, D)`; 0 where there are no other contexts.
        """
        contexts = torch.arange(len(self.control_counts), device=context_ids.device)
        others = ((self.control_counts > 0) & (contexts != context_ids[:, None])).float()  # (B, C)
        number = others.sum(dim=1, keepdim=True)
        logs = torch.log(self.control_expression.float() + PSEUDOCOUNT)
        own = torch.log(expression.float() + PSEUDOCOUNT)
        mean = (others @ logs + own) / (number + 1)
        # The sum over the others of (l - mean)^2, without a tensor of (B, C, D).
        squares = others @ logs**2 - 2 * mean * (others @ logs) + number * mean**2 + (own - mean) ** 2
        inverse = 1 / counts.float().clamp(min=1)
        inverses = (others @ (1 / self.control_counts.float().clamp(min=1)) + inverse) / (number[:, 0] + 1)
        variation = self.control_variation.float()
        between = (squares / number.clamp(min=1) - inverses[:, None] * variation).clamp(min=0)
        noise = inverse[:, None] * variation
        shrinkage = torch.where(noise > 0, noise / (noise + between).clamp(min=1e-12), 0)
        pooled = torch.log(others @ self.control_expression.float() / number.clamp(min=1) + PSEUDOCOUNT)
        return torch.where(number > 0, shrinkage * (pooled - own), 0)


__all__ = ["PSEUDOCOUNT", "Anchor"]
