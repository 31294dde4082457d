"""The Sinkhorn divergence between two sets of cells."""

import torch
from torch import nn


class SinkhornLoss(nn.Module):
    """
    Debiased entropic optimal transport with squared Euclidean cost (Feydy et al. 2019), geomloss'
    `SamplesLoss("sinkhorn", p=2)`.

    Args:
        blur (`float`): entropic blur, in the units of the cells.

    Raises:
        ImportError: geomloss is not installed.

    Inputs:
        - predictions `(B, S, D)`, targets `(B, S, D)`, mask `(B, S)` bool or None: the real cells of both.
    Output:
        - `(B,)`, one divergence a sentence, in squared units of the cells.

    Example:
    ```python
    >>> SinkhornLoss(blur=0.05)(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    tensor([1.5000])
    ```
    """

    def __init__(self, blur: float):
        super().__init__()
        try:
            from geomloss import SamplesLoss
        except ImportError as error:
            raise ImportError("the Sinkhorn divergence needs geomloss: pip install 'pertstate[sinkhorn]'") from error
        self.divergence = SamplesLoss("sinkhorn", p=2, blur=blur, backend="tensorized")

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(device_type=predictions.device.type, enabled=False):
            predictions, targets = predictions.float(), targets.float()
            if mask is None:
                return self.divergence(predictions, targets)
            # Padded cells would widen geomloss' annealing range, so each padded sentence goes alone.
            return torch.stack(
                [self.divergence(x[m][None], y[m][None])[0] for x, y, m in zip(predictions, targets, mask)]
            )
