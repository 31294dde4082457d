"""The likelihood of observed counts under what a model on counts gives."""

import torch

from cellstate.count_distributions import negative_binomial_log_prob, zero_inflated_negative_binomial_log_prob
from cellstate.modeling_counts import CountsOutput
from cellstate.modeling_perturbation import CELL_MASK, CONTROL_CELLS, LABELS


def count_log_prob(outputs: CountsOutput, counts: torch.Tensor) -> torch.Tensor:
    """
    Log-probability of counts `(B, S, G)` under the distribution that a model gives, in float32 whatever the precision of
    the rest.
    """
    with torch.autocast(device_type=counts.device.type, enabled=False):
        if outputs.dropout_logits is None:
            return negative_binomial_log_prob(counts.float(), outputs.mean, outputs.inverse_dispersion)
        return zero_inflated_negative_binomial_log_prob(
            counts.float(), outputs.mean, outputs.inverse_dispersion, outputs.dropout_logits
        )


def check_totals(batch: dict[str, torch.Tensor]):
    """ValueError where a real control cell has no counts: they give the total that predictions are scaled to."""
    empty = batch[CONTROL_CELLS].sum(dim=-1) == 0
    if batch.get(CELL_MASK) is not None:
        empty = empty & batch[CELL_MASK]
    if empty.any():
        raise ValueError(
            f"{LABELS} cannot be predicted from control cells without counts of the model's genes, found "
            f"{int(empty.sum())} in a batch; leave cells without counts out of the data (sc.pp.filter_cells(adata, "
            "min_counts=1), on the model's genes)"
        )
