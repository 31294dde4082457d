"""The objective of scVI: the evidence lower bound on counts."""

import torch

from pertstate.base.constants import CELL_MASK
from pertstate.base.messages import given
from pertstate.families.scvi.configuration_scvi import SCVIConfig
from pertstate.families.scvi.modeling_scvi import SCVIOutput
from pertstate.losses.counts import count_log_likelihood
from pertstate.losses.objective import Objective


class SCVIObjective(Objective):
    """
    Named terms of the loss of an [`SCVIForPerturbation`] (Lopez et al. 2018; beta warm-up as Sønderby et al. 2016).

    - `reconstruction`: negative log-likelihood of the counts of perturbed cell i, summed over genes, under the distribution
      that control cell i gives
    - `kl`: KL divergence of the control cell's posterior N(m, v) from N(0, 1), `sum(v + m^2 - 1 - log v) / 2`
    - `kl_weight`: min(1, epoch / `kl_warmup_epochs`), or the same in steps; 1 in evaluation, so that losses of different
      times can be compared
    - `elbo`: `-(reconstruction + kl)`
    - `loss`: `reconstruction + kl_weight * kl`

    Args:
        config ([`SCVIConfig`]): likelihood and warm-up.

    Raises:
        ValueError: the batch lacks `labels`; a control cell has no counts; the warm-up is in epochs, and the length of an
            epoch is not known.
    """

    config: SCVIConfig

    def forward(self, outputs: SCVIOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = batch.get(CELL_MASK)
        log_prob = count_log_likelihood(outputs, batch)
        with torch.autocast(device_type=log_prob.device.type, enabled=False):
            mean = given("posterior_mean", outputs.posterior_mean).float()
            variance = given("posterior_variance", outputs.posterior_variance).float()
            kl = 0.5 * (variance + mean.square() - 1 - variance.log()).sum(dim=-1)
        reconstruction = -self.mean_over_cells(log_prob, mask).mean()
        kl = self.mean_over_cells(kl, mask).mean()
        weight = self._kl_weight() if self.training else 1.0
        return {
            "reconstruction": reconstruction,
            "kl": kl,
            "kl_weight": kl.new_tensor(weight),
            "elbo": -(reconstruction + kl),
            "loss": reconstruction + weight * kl,
        }

    def _kl_weight(self) -> float:
        done: float | None
        whole: float
        if self.config.kl_warmup_steps is not None:
            done, whole = self.step, self.config.kl_warmup_steps
        else:
            done, whole = self.epoch, given("kl_warmup_epochs", self.config.kl_warmup_epochs)
        if whole == 0:
            return 1.0
        if done is None:
            raise ValueError(
                f"kl_warmup_epochs={whole} needs a stream's first look to see all of it, and it did not; set "
                "kl_warmup_steps, or leave stream.fill_cells out"
            )
        return min(1.0, done / whole)
