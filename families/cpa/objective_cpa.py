"""The objective of the compositional perturbation autoencoder: reconstruction, and a game against the adversaries."""

import math

import torch

from pertstate.base.constants import (
    BATCH_IDS,
    CELL_MASK,
    CONTEXT_IDS,
    LABELS,
    PERTURBATION_DOSES,
    PERTURBATION_FEATURES,
    PERTURBATION_IDS,
)
from pertstate.base.messages import given
from pertstate.families.cpa.configuration_cpa import CPAConfig
from pertstate.families.cpa.modeling_cpa import CPAOutput
from pertstate.losses.counts import count_log_likelihood
from pertstate.losses.objective import Objective


class _WithGradient(torch.autograd.Function):
    """A value whose gradient by `inputs` is already known. Nothing else that it depends on gets a gradient."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient.to(inputs.dtype))
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


class CPAObjective(Objective):
    r"""
    Named terms of the loss of a [`CPAForPerturbation`] (Lotfollahi et al. 2023, Mol Syst Biol 19:e11517).

    - `reconstruction`: negative log-likelihood of perturbed cell i, summed over genes, under the distribution that control
      cell i gives
    - `perturbation_adversary`, `context_adversary`, `batch_adversary`: cross-entropy of each adversary on the basal states.
      The target of a combination is an equal share for each of its perturbations; that of control cells (no perturbation,
      or at dose 0) a class of its own. Cells of unknown context or batch (id -1) are left out.
    - `perturbation_accuracy`, ..: share of cells whose highest score is right (for a combination, any of its parts)
    - `penalty`: sum over the adversaries of mean |gradient by the basal state of the sum of the scores|^2, a mean over
      cells and latent dimensions
    - `adversarial_weight`: lambda, 0 for `adversary_warmup_steps`, then rising to the config's `adversarial_weight` in
      `adversary_ramp_steps`
    - `loss`: what the autoencoder and the adversaries each minimise, in one sum:

          reconstruction - lambda * adversaries        by the autoencoder's parameters,
          adversaries + penalty_weight * penalty       by the adversaries' parameters,

      and neither has a gradient for the other's parameters. In evaluation it is `reconstruction` alone, which does not
      depend on the schedule.

    Args:
        config ([`CPAConfig`]): likelihood, adversaries and schedule.
    """

    config: CPAConfig

    def forward(self, outputs: CPAOutput, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = batch.get(CELL_MASK)
        reconstruction = -self.mean_over_cells(self._log_prob(outputs, batch), mask).mean()
        terms = {"reconstruction": reconstruction, "loss": reconstruction}
        if not self.training or not self.config.adversaries:
            return terms
        total, penalty = reconstruction.new_zeros(()), reconstruction.new_zeros(())
        basal, seen = given("basal", outputs.basal), given("adversary_input", outputs.adversary_input)
        for name, logits in given("adversary_logits", outputs.adversary_logits).items():
            targets = self._targets(name, batch)
            known = (targets.sum(dim=-1) > 0).expand(logits.shape[:2])
            known = known if mask is None else known & mask
            cross_entropy = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1)
            right = targets.expand_as(logits).gather(-1, logits.argmax(dim=-1, keepdim=True)).squeeze(-1) > 0
            terms[f"{name}_adversary"] = self._mean_over_known(cross_entropy, known)
            terms[f"{name}_accuracy"] = self._mean_over_known(right.float(), known)
            total = total + terms[f"{name}_adversary"]
            (gradient,) = torch.autograd.grad(logits.sum(), seen, create_graph=True)
            penalty = penalty + self.mean_over_cells(gradient.square().mean(dim=-1), mask).mean()
        weight = self._adversarial_weight()
        terms["penalty"], terms["adversarial_weight"] = penalty, penalty.new_tensor(weight)
        terms["loss"] = reconstruction + total + self.config.penalty_weight * penalty
        if weight > 0:
            (gradient,) = torch.autograd.grad(total, seen, retain_graph=True)
            terms["loss"] = terms["loss"] - weight * _WithGradient.apply(basal, total.detach(), gradient)
        return terms

    def _log_prob(self, outputs: CPAOutput, batch) -> torch.Tensor:
        """(B, S) log-likelihood of the perturbed cells."""
        if self.config.reads_counts:
            return count_log_likelihood(outputs, batch)
        mean, variance = given("mean", outputs.mean), given("variance", outputs.variance)
        squares = (self.required(batch, LABELS).float() - mean).square() / variance
        return -0.5 * (squares + variance.log() + math.log(2 * math.pi)).sum(dim=-1)

    def _targets(self, name: str, batch) -> torch.Tensor:
        """Shares of the classes that are right, (B, 1 or S, classes); all 0 where nothing is known."""
        if name == "perturbation":
            return self._perturbations(batch)
        ids = self.required(batch, CONTEXT_IDS).unsqueeze(1) if name == "context" else self.required(batch, BATCH_IDS)
        classes = torch.nn.functional.one_hot(ids.clamp(min=0), self.config.adversaries[name])
        return (classes * (ids >= 0).unsqueeze(-1)).float()

    def _perturbations(self, batch) -> torch.Tensor:
        if batch.get(PERTURBATION_FEATURES) is not None:  # multi-hot
            present = (batch[PERTURBATION_FEATURES] != 0).float()
            present = present if present.dim() == 3 else present.unsqueeze(1)
        else:
            ids, doses = self.required(batch, PERTURBATION_IDS), batch.get(PERTURBATION_DOSES)
            given = (ids >= 0) if doses is None else (ids >= 0) & (doses != 0)
            present = torch.zeros(len(ids), self.config.perturbation_width, device=ids.device)
            present = present.scatter_add(1, ids.clamp(min=0), given.float()).unsqueeze(1)
        together = present.sum(dim=-1, keepdim=True)
        return torch.cat([present / together.clamp(min=1), (together == 0).float()], dim=-1)

    @staticmethod
    def _mean_over_known(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Mean over the sentences with any known cell, each over those; 0 where there is none."""
        counts = known.sum(dim=1)
        means = torch.where(known, values, 0.0).sum(dim=1) / counts.clamp(min=1)
        return means.sum() / (counts > 0).sum().clamp(min=1)

    def _adversarial_weight(self) -> float:
        config = self.config
        beyond = self.step - config.adversary_warmup_steps
        if beyond < 0:
            return 0.0
        reached = min(1.0, beyond / config.adversary_ramp_steps) if config.adversary_ramp_steps else 1.0
        return config.adversarial_weight * reached
