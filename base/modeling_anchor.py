"""What training means show of a perturbation, applied to control cells: where a State model starts from."""

import numpy as np
import torch
from torch import nn

from .messages import given


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

    Args:
        width (`int`): perturbations, or the width of perturbation features.
        features (`int`): features of a cell.
        expression (`bool`): cells are log1p expression.
        by_features (`bool`): perturbations are given by features.
    """

    change: torch.Tensor
    log_fold: torch.Tensor

    def __init__(self, width: int, features: int, expression: bool, by_features: bool):
        super().__init__()
        self.expression, self.by_features = expression, by_features
        for name in self.tables:
            self.register_buffer(name, torch.zeros(width, features))
            if by_features:
                self.register_buffer(f"shared_{name}", torch.zeros(features))

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables with a row for each perturbation: `change`, and of expression `log_fold`."""
        return ("change", "log_fold") if self.expression else ("change",)

    def set(self, **tables: np.ndarray):
        """
        Take what training cells show.

        Args:
            tables (`np.ndarray`): by name: `change` and `log_fold` of shape `(width, features)`, and with perturbation features
                `shared_change` and `shared_log_fold` of shape `(features,)`.

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
    ) -> torch.Tensor:
        """Control cells `(B, S, D)` and their perturbation to changed cells `(B, S, D)`, float32."""
        if perturbation_features is not None:
            weights, perturbed = perturbation_features.float(), None
            weights = weights if weights.dim() == 3 else weights.unsqueeze(1)
            if self.by_features:
                perturbed = (weights != 0).any(dim=-1, keepdim=True).float()
            sums = {name: self._by_features(name, weights, perturbed) for name in self.tables}
        else:
            ids = given("perturbation_ids", perturbation_ids)
            weights = (ids >= 0).float()
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
        return (moved.relu() + torch.log1p(torch.expm1(cells) * factor)) / 2

    def _by_features(self, name: str, weights: torch.Tensor, perturbed: torch.Tensor | None) -> torch.Tensor:
        found = weights @ getattr(self, name).float()
        return found if perturbed is None else found + perturbed * getattr(self, f"shared_{name}").float()


__all__ = ["Anchor"]
