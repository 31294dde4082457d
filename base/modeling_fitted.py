"""Models whose weights are fitted in one pass over the training cells, without gradients."""

import warnings
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

from .configuration_fitted import FittedConfig, MeasuredConfig
from .messages import given
from .modeling_layers import UnseenWarning
from .modeling_perturbation import PerturbationOutput, PerturbationPreTrainedModel
from .printable import printable


@dataclass
class TrainingMeans:
    r"""
    What these models are fitted to: means over training cells, in float64, in the units of the cells.

    Args:
        changes (`np.ndarray` of shape `(num_entries, output_dim)`):
            Change of each measured perturbation or combination: (mean perturbed cell - mean control cell), as an
            unweighted mean over the (dataset, context) pairs that have it.
        perturbation_ids (`np.ndarray` of shape `(num_entries, num_together)`, *optional*):
            The perturbations of each entry, padded with -1.
        perturbation_features (`np.ndarray` of shape `(num_entries, perturbation_dim)`, *optional*):
            The vector of each entry. One of this and `perturbation_ids` is given.
        context_ids (`np.ndarray` of shape `(num_seen,)`):
            Contexts of the vocabulary with perturbed training cells.
        context_means (`np.ndarray` of shape `(num_seen, output_dim)`):
            Mean perturbed cell of each, over all perturbations: every cell weighs the same.
        control_means (`np.ndarray` of shape `(num_seen, output_dim)`):
            Mean control cell of each.
        log_folds (`np.ndarray` of shape `(num_entries, output_dim)`, *optional*):
            Natural log of the geometric mean fold change of each entry, over the same pairs; None where the cells are no
            log1p expression.
    """

    changes: np.ndarray
    perturbation_ids: np.ndarray | None
    perturbation_features: np.ndarray | None
    context_ids: np.ndarray
    context_means: np.ndarray
    control_means: np.ndarray
    log_folds: np.ndarray | None = None


class FittedPreTrainedModel(PerturbationPreTrainedModel):
    r"""
    A family without an optimiser: the Trainer calls `fit(means: TrainingMeans)` of the subclass, which computes the weights.
    They are frozen.

    Each family says what it predicts for a perturbation or context that was not in training. The output marks such
    sentences in `unseen`, and an [`UnseenWarning`] counts them.
    """

    config: FittedConfig
    fitted = True
    supports_gradient_checkpointing = False
    _forward_options = frozenset()
    # Which perturbations or contexts were in training, (N,) bool, in the families that predict by it.
    seen: torch.Tensor

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in [`PerturbationPreTrainedModel`], frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        # transformers makes every parameter that it loads a trainable one.
        (loaded[0] if kwargs.get("output_loading_info") else loaded).requires_grad_(False)
        return loaded

    def resize_vocabulary(self, old, new):
        raise ValueError(
            f"{self.config.model_type} is fitted in one pass: it holds means over training cells, and no weights that other "
            "names could start from; fit it anew on all the data, old and new"
        )

    def _add_table(self, name: str, *shape: int):
        """A table that is fitted: zeros until then."""
        self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def _add_seen(self, size: int):
        """Which perturbations or contexts were in training: none until the model is fitted."""
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            for tensor in chain(self.parameters(recurse=False), self.buffers(recurse=False)):
                init.zeros_(tensor)

    def _check_means(self, means: TrainingMeans):
        """ValueError unless the means have the sizes of the config and name perturbations as the model does."""
        config, ids, features = self.config, means.perturbation_ids, means.perturbation_features
        if means.changes.ndim != 2 or means.changes.shape[1] != config.output_dim or not len(means.changes):
            raise ValueError(
                f"changes: expected shape (num_entries, {config.output_dim}) with an entry at least, found "
                f"{means.changes.shape}; compute them from the training data of this model's processor"
            )
        by_ids = config.num_perturbations is not None
        wanted, other = (ids, features) if by_ids else (features, ids)
        if wanted is None or other is not None:
            raise ValueError(
                f"expected {'perturbation_ids' if by_ids else 'perturbation_features'} alone, as the model's config has "
                f"{'num_perturbations' if by_ids else 'perturbation_dim'}; found "
                + (
                    "both"
                    if other is not None and wanted is not None
                    else "the other"
                    if other is not None
                    else "neither"
                )
            )
        if ids is not None and not (ids.max(initial=-1) < config.perturbation_width and (ids >= 0).any(axis=1).all()):
            raise ValueError(
                f"perturbation_ids: expected at least one of 0 to {config.perturbation_width - 1} in each entry, and -1 to "
                f"pad, found {ids.min()} to {ids.max()}"
            )
        contexts = means.context_ids
        if config.num_contexts is not None and not ((contexts >= 0) & (contexts < config.num_contexts)).all():
            raise ValueError(
                f"context_ids: expected 0 to {config.num_contexts - 1}, found {contexts.min()} to {contexts.max()}"
            )
        if features is not None and features.shape[1] != config.perturbation_dim:
            raise ValueError(
                f"perturbation_features: expected shape (num_entries, {config.perturbation_dim}), found {features.shape}"
            )

    def _set(self, **tables: np.ndarray):
        """Replace tables of the model by fitted values, whatever their shape."""
        for name, values in tables.items():
            old = getattr(self, name)
            new = torch.as_tensor(np.ascontiguousarray(values)).to(old.device, old.dtype)
            setattr(self, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)

    def _set_rows(self, ids: np.ndarray, **tables: np.ndarray):
        """Replace tables by fitted rows for these perturbations or contexts, and mark them as seen. Other rows are 0."""
        for name, values in {**tables, "seen": np.ones(len(ids), dtype=bool)}.items():
            table = np.zeros(getattr(self, name).shape, dtype=values.dtype)
            table[ids] = values
            self._set(**{name: table})

    def _outputs(
        self, predictions: torch.Tensor, unseen: torch.Tensor | None, consequence: str = ""
    ) -> PerturbationOutput:
        """
        Predictions (B, S, D) in the config's units. `unseen` (B,) marks sentences that were not in training; `consequence`
        is the end of a warning that counts them.
        """
        if self.config.nonnegative_output:
            predictions = nn.functional.relu(predictions)
        if unseen is not None and (count := int(unseen.sum())):
            said = printable(f"{count} of {len(unseen)} sentences: {consequence}")
            warnings.warn(said, UnseenWarning, stacklevel=5)
        return PerturbationOutput(predictions=predictions, unseen=unseen)


class MeasuredPreTrainedModel(FittedPreTrainedModel):
    r"""
    A fitted family with a row for each perturbation and each combination that was measured. Perturbations given by features are
    recognised by their vector: those with equal vectors share the mean of their rows.

    Attributes:
        entries (`torch.Tensor` of shape `(num_entries, entry_width)` or `(num_entries, perturbation_width)`): the key of each
            entry: ids that descend and are padded with -1, or features. Entry 0 is the control: no ids, or features of 0.
    """

    config: MeasuredConfig
    entries: torch.Tensor

    def _add_entries(self, table: str):
        """The keys of the entries and the table with a row for each."""
        config = self.config
        if config.num_perturbations is not None:
            self.register_buffer("entries", torch.full((config.num_entries, config.entry_width), -1))
        else:
            self.register_buffer("entries", torch.zeros(config.num_entries, config.perturbation_width))
        self._add_table(table, config.num_entries, config.output_dim)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self and self.config.num_perturbations is not None:
            init.constant_(self.entries, -1)

    def _fit_entries(self, means: TrainingMeans, table: str, values: np.ndarray):
        """Take the keys of all entries and their rows, 0 for the control, and the config their number."""
        if means.perturbation_ids is None:
            keys, nothing = given("perturbation_features", means.perturbation_features), 0
        else:
            keys, nothing = -np.sort(-means.perturbation_ids, axis=1), -1
        keys, entry_of = np.unique(keys, axis=0, return_inverse=True)
        rows = np.zeros((len(keys), values.shape[1]))
        np.add.at(rows, entry_of, values)
        rows /= np.bincount(entry_of)[:, None]
        control = np.full((1, keys.shape[1]), nothing, dtype=keys.dtype)
        self._set(entries=np.concatenate([control, keys]), **{table: np.pad(rows, ((1, 0), (0, 0)))})
        self.config.num_entries = len(self.entries)
        if means.perturbation_ids is not None:
            self.config.entry_width = self.entries.shape[1]

    def _entries_of_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(.., K) ids that descend, padded with -1, to (..) numbers of entries, 0 where there is none, and whether there is one."""
        width = self.entries.shape[1]
        wider = (ids[..., width:] >= 0).any(dim=-1)
        padded = nn.functional.pad(ids[..., :width], (0, max(0, width - ids.shape[-1])), value=-1)
        equal = (padded.unsqueeze(-2) == self.entries).all(dim=-1) & ~wider.unsqueeze(-1)
        return equal.to(torch.uint8).argmax(dim=-1), equal.any(dim=-1)

    def _entries_of_features(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, P) or (B, S, P) features to (B, 1) or (B, S) numbers of entries, 0 where there is none, and whether there is one."""
        features = per_cell(features).to(self.entries.dtype)
        rows, row_of = torch.unique(features.flatten(0, 1), dim=0, return_inverse=True)
        equal = torch.stack([(self.entries == row).all(dim=-1) for row in rows])
        entry, known = equal.to(torch.uint8).argmax(dim=-1), equal.any(dim=-1)
        return entry[row_of].view(features.shape[:2]), known[row_of].view(features.shape[:2])


def is_control(perturbation_ids: torch.Tensor | None, perturbation_features: torch.Tensor | None) -> torch.Tensor:
    """(B, K) ids, or (B, P) or (B, S, P) features, to (B, 1) or (B, S) bool: where nothing is perturbed."""
    if perturbation_ids is not None:
        return (perturbation_ids < 0).all(dim=-1, keepdim=True)
    return (per_cell(given("perturbation_features", perturbation_features)) == 0).all(dim=-1)


def per_cell(features: torch.Tensor) -> torch.Tensor:
    """(B, P) or (B, S, P) features to (B, 1, P) or (B, S, P)."""
    return features if features.dim() == 3 else features.unsqueeze(1)


def ids_and_doses(
    perturbation_ids: torch.Tensor | None,
    perturbation_doses: torch.Tensor | None,
    perturbation_features: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (B, K) ids and doses, or (B, P) or (B, S, P) multi-hot features, to ids and doses of shape (B, 1, K) or (B, S, K).
    Ids descend, so that those that are padded with -1 stand last; their dose is 0.
    """
    if perturbation_ids is None:
        doses = per_cell(given("perturbation_features", perturbation_features))
        width = max(1, int((doses != 0).sum(dim=-1).max()))
        ids = doses.abs().topk(width, dim=-1).indices
        doses = doses.gather(-1, ids)
        ids = torch.where(doses != 0, ids, -1)
    else:
        ids = perturbation_ids.unsqueeze(1)
        doses = torch.ones_like(ids, dtype=torch.float32) if perturbation_doses is None else perturbation_doses
        doses = torch.where(ids >= 0, doses.view_as(ids), 0)
    ids, order = ids.sort(dim=-1, descending=True)
    return ids, doses.gather(-1, order)


def ridge_weights(features: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """(M, P) features and (M, D) targets to the (P, D) weights of least `|targets - features W|^2 + ridge |W|^2`."""
    rows, columns = features.shape
    if rows < columns:
        return features.T @ np.linalg.solve(features @ features.T + ridge * np.eye(rows), targets)
    return np.linalg.solve(features.T @ features + ridge * np.eye(columns), features.T @ targets)


__all__ = ["FittedPreTrainedModel", "MeasuredPreTrainedModel", "TrainingMeans"]
