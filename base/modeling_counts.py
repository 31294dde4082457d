"""What the families share that model raw counts, and predict log1p expression like the others."""

from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import nn
from transformers import initialization as init

from .configuration_counts import CountsConfig
from .count_distributions import (
    negative_binomial_mean_log1p,
    sample_negative_binomial,
    sample_zero_inflated_negative_binomial,
)
from .modeling_finetuning import (
    BATCHES,
    CONTEXTS,
    GENES,
    PERTURBATIONS,
)
from .modeling_layers import UnseenMeanEmbedding
from .modeling_perturbation import PerturbationOutput, PerturbationPreTrainedModel


@dataclass
class CountsOutput(PerturbationOutput):
    r"""
    A [`PerturbationOutput`] whose `predictions` are log1p expression, and the distribution of counts that they come from.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, set_size, input_dim)`):
            Mean count of the negative binomial distribution, at the total of the control cell. 0 where that has none.
        inverse_dispersion (`torch.Tensor` of shape `(input_dim,)`):
            Inverse dispersion of each gene.
        dropout_logits (`torch.Tensor` of shape `(batch_size, set_size, input_dim)`, *optional*):
            Log-odds of additional zeros, with `likelihood="zinb"`.
    """

    mean: torch.Tensor | None = None
    inverse_dispersion: torch.Tensor | None = None
    dropout_logits: torch.Tensor | None = None

    of_all_sentences: ClassVar[tuple[str, ...]] = ("inverse_dispersion",)


class CountsFields(TypedDict, total=False):
    """The fields of a [`CountsOutput`] that the decoder of counts gives."""

    predictions: torch.Tensor
    mean: torch.Tensor
    inverse_dispersion: torch.Tensor
    dropout_logits: torch.Tensor | None


class CountsPreTrainedModel(PerturbationPreTrainedModel):
    """Families whose decoder ends in a distribution of counts."""

    config: CountsConfig

    def _make_count_heads(self):
        config = self.config
        self.share_head = nn.Linear(config.hidden_size, config.input_dim)
        if config.likelihood == "zinb":
            self.dropout_head = nn.Linear(config.hidden_size, config.input_dim)
        self.log_inverse_dispersion = nn.Parameter(torch.empty(config.input_dim))

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        axes: dict[str, dict[int, str]] = {}
        if self.config.reads_counts:
            axes["log_inverse_dispersion"] = {0: GENES}
            for head in ("share_head", "dropout_head") if self.config.likelihood == "zinb" else ("share_head",):
                axes |= {f"{head}.weight": {0: GENES}, f"{head}.bias": {0: GENES}}
        if self.config.num_perturbations is not None:
            axes["perturbation_embedding.weight"] = {0: PERTURBATIONS}
        for name, module in self.named_children():
            if isinstance(module, UnseenMeanEmbedding):
                axes[f"{name}.weight"] = {0: {"context_embedding": CONTEXTS, "batch_embedding": BATCHES}[name]}
        return axes

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CountsPreTrainedModel) and module.config.reads_counts:
            init.normal_(module.log_inverse_dispersion)

    def _counts(self, hidden: torch.Tensor, control_cells: torch.Tensor) -> CountsFields:
        """
        The distribution of the counts, in float32, from a decoder's last hidden state (B, S, H) and the control cells'
        counts (B, S, G). In training the predictions are always log1p of the mean: the loss does not read them, and this
        costs next to nothing.
        """
        config = self.config
        shares = self.share_head(hidden).float().softmax(dim=-1)
        total = control_cells.float().sum(dim=-1, keepdim=True)
        mean, theta = total * shares, self.log_inverse_dispersion.float().exp()
        dropout = self.dropout_head(hidden).float() if config.likelihood == "zinb" else None
        scale = torch.ones_like(total)
        if config.library_size is not None:
            scale = torch.where(total > 0, config.library_size / total, 0.0)
        kept = 1.0 if dropout is None else torch.sigmoid(-dropout)
        if config.prediction == "mean_log1p" and not self.training:
            predictions = kept * negative_binomial_mean_log1p(mean, theta, scale)
        else:
            predictions = torch.log1p(kept * mean * scale)
        return {"predictions": predictions, "mean": mean, "inverse_dispersion": theta, "dropout_logits": dropout}

    def _check_drawing(self):
        if self.training:
            raise ValueError("sample_counts needs evaluation mode, found training mode; call model.eval() first")

    @staticmethod
    def _draw(
        mean: torch.Tensor,
        inverse_dispersion: torch.Tensor,
        dropout_logits: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Counts (B, S, G) drawn from the distribution that these fields of a [`CountsOutput`] describe."""
        if dropout_logits is None:
            return sample_negative_binomial(mean, inverse_dispersion, generator)
        return sample_zero_inflated_negative_binomial(mean, inverse_dispersion, dropout_logits, generator)

    @staticmethod
    def _given(name: str, ids: torch.Tensor | None) -> torch.Tensor:
        if ids is None:
            raise ValueError(f"this model was trained with {name} and needs them, found None; -1 is an unknown one")
        return ids


__all__ = ["CountsFields", "CountsOutput", "CountsPreTrainedModel"]
