"""What the families that model counts share: from a decoder's hidden state to the distribution of a gene's counts."""

import torch
from torch import nn
from transformers import initialization as init


class CountHead(nn.Module):
    r"""
    Negative binomial counts of each gene (Lopez et al. 2018, Nature Methods 15): `shares = softmax(Linear(hidden))` of the
    control cell's total are the means; each gene has an inverse dispersion `exp(r)`, r learned from N(0, 1).

    Args:
        hidden_size, num_genes (`int`): widths.
        zero_inflated (`bool`): also give the log-odds of additional zeros.
        library_size (`float`, *optional*): counts that predictions are scaled to before log1p; None: the control cell's.
    """

    def __init__(self, hidden_size: int, num_genes: int, zero_inflated: bool, library_size: float | None):
        super().__init__()
        self.library_size = library_size
        self.shares = nn.Linear(hidden_size, num_genes)
        self.dropout_logits = nn.Linear(hidden_size, num_genes) if zero_inflated else None
        self.log_inverse_dispersion = nn.Parameter(torch.empty(num_genes))

    def init_own_weights(self):
        """Those that are not of a layer of torch; a model's `_init_weights` calls it."""
        init.normal_(self.log_inverse_dispersion)

    def forward(self, hidden: torch.Tensor, control_cells: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """
        Args:
            hidden (`torch.Tensor` of shape `(B, S, H)`), control_cells (`torch.Tensor` of shape `(B, S, G)`): raw counts.

        Returns:
            in float32, `predictions` (B, S, G), log1p expression: of the counts that are left after additional zeros;
            `mean` (B, S, G) of the negative binomial distribution, `inverse_dispersion` (G,), and `dropout_logits`
            (B, S, G) or None.
        """
        shares = self.shares(hidden).float().softmax(dim=-1)
        total = control_cells.float().sum(dim=-1, keepdim=True)
        dropout, seen = None, shares
        if self.dropout_logits is not None:
            dropout = self.dropout_logits(hidden).float()
            seen = shares * torch.sigmoid(-dropout)
        if self.library_size is None:
            predictions = torch.log1p(total * seen)
        else:
            predictions = torch.log1p(self.library_size * seen / seen.sum(dim=-1, keepdim=True))
        return {
            "predictions": predictions,
            "mean": total * shares,
            "inverse_dispersion": self.log_inverse_dispersion.float().exp(),
            "dropout_logits": dropout,
        }


__all__ = ["CountHead"]
