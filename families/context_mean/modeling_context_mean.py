"""The mean perturbed cell of a context, whatever the perturbation."""

import torch
from torch import nn

from ...base.modeling_fitted import FittedPreTrainedModel, TrainingMeans, is_control
from ...base.modeling_perturbation import PerturbationOutput
from .configuration_context_mean import ContextMeanConfig


class ContextMeanForPerturbation(FittedPreTrainedModel):
    r"""
    The mean of the context's perturbed training cells, over all perturbations, every cell weighing the same. For the
    control it is the mean of the context's control cells. In a context without perturbed training cells it is the mean of
    the sentence's own control cells, and the sentence counts as unseen. All cells of a sentence are predicted alike.

    Args:
        config ([`ContextMeanConfig`]): sizes; `num_contexts` is required.
    """

    config: ContextMeanConfig
    config_class = ContextMeanConfig
    perturbed_means: nn.Parameter
    control_means: nn.Parameter

    def __init__(self, config: ContextMeanConfig):
        super().__init__(config)
        if config.num_contexts is None:
            raise ValueError("ContextMeanConfig needs num_contexts to build a model, found None")
        self._add_table("perturbed_means", config.num_contexts, config.output_dim)
        self._add_table("control_means", config.num_contexts, config.output_dim)
        self._add_seen(config.num_contexts)
        self.post_init()

    def fit(self, means: TrainingMeans):
        """Take the means of every context that was trained on."""
        self._check_means(means)
        self._set_rows(means.context_ids, perturbed_means=means.context_means, control_means=means.control_means)

    def forward(
        self,
        control_cells: torch.Tensor,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        batch_ids: torch.Tensor | None = None,
        cell_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gene_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> PerturbationOutput:
        """
        Inputs, output and errors as in [`PerturbationPreTrainedModel`]. Of the perturbation, only whether there is one
        is used; batches are not used.

        Raises:
            ValueError: `context_ids` are missing, or of a wrong shape.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        sentences, cells = control_cells.shape[:2]
        if context_ids is None or tuple(context_ids.shape) != (sentences,):
            found = "none" if context_ids is None else tuple(context_ids.shape)
            raise ValueError(
                f"context_ids: expected shape ({sentences},), found {found}; a context mean is of the context alone"
            )
        context = context_ids.clamp(min=0)
        known = (context_ids >= 0) & self.seen[context]
        control = is_control(perturbation_ids, perturbation_features).unsqueeze(-1)
        of_context = torch.where(
            control, self.control_means[context].unsqueeze(1), self.perturbed_means[context].unsqueeze(1)
        )
        if cell_mask is None:
            of_sentence = control_cells.mean(dim=1)
        else:
            real = cell_mask.bool().unsqueeze(-1)
            of_sentence = torch.where(real, control_cells, 0).sum(dim=1) / real.sum(dim=1)
        predictions = torch.where(known[:, None, None], of_context, of_sentence.unsqueeze(1).to(of_context.dtype))
        return self._outputs(
            predictions.expand(-1, cells, -1).contiguous(),
            ~known,
            "their context has no perturbed training cells, so that the mean of their control cells is given",
        )


__all__ = ["ContextMeanForPerturbation"]
