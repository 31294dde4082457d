"""The likelihood of observed counts under the distribution that a model on counts predicts."""

import torch

from pertstate.base.constants import CELL_MASK, CONTROL_CELLS, LABELS
from pertstate.base.count_distributions import negative_binomial_log_prob, zero_inflated_negative_binomial_log_prob
from pertstate.base.messages import given
from pertstate.base.modeling_counts import CountsOutput
from pertstate.losses.objective import Objective


def count_log_likelihood(outputs: CountsOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Log-likelihood of the counts of each perturbed cell, summed over genes, under the distribution that the model predicts:
    (B, S), in float32 whatever the precision of the rest. The values of padded cells have no meaning.

    Raises:
        ValueError: the batch lacks `labels`, or a control cell has no counts: its total scales the prediction.
    """
    counts, empty = Objective.required(batch, LABELS), batch[CONTROL_CELLS].sum(dim=-1) == 0
    if batch.get(CELL_MASK) is not None:
        mask = batch[CELL_MASK].bool()
        empty = empty & mask
        # The mean of a padded cell may be 0. Counts above 0 then have an infinite gradient, which no mask can remove.
        counts = counts.masked_fill(~mask.unsqueeze(-1), 0)
    if empty.any():
        raise ValueError(
            f"{LABELS} cannot be predicted from control cells without counts of the model's genes, found "
            f"{int(empty.sum())} in a batch; leave cells without counts out of the data (sc.pp.filter_cells(adata, "
            "min_counts=1), on the model's genes)"
        )
    with torch.autocast(device_type=counts.device.type, enabled=False):
        parameters = given("mean", outputs.mean), given("inverse_dispersion", outputs.inverse_dispersion)
        if outputs.dropout_logits is None:
            return negative_binomial_log_prob(counts.float(), *parameters).sum(dim=-1)
        return zero_inflated_negative_binomial_log_prob(counts.float(), *parameters, outputs.dropout_logits).sum(dim=-1)
