"""Training a checkpoint further: the rows and columns that follow a vocabulary, and the layers that take adapters."""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from .checkpoint_files import CheckedPreTrainedModel, find_file, hub_arguments, read_json
from .configuration_perturbation import PerturbationConfig
from .messages import closest
from .printable import joined_lines


# What the rows or columns of a tensor stand for: one of the lists of a vocabulary, or the features of a cell.
GENES, PERTURBATIONS, CONTEXTS, BATCHES = "genes", "perturbations", "contexts", "batches"
FEATURES, PERTURBATIONS_AND_CONTROL = "features", "perturbations and control"
_SIZES = {PERTURBATIONS: "num_perturbations", CONTEXTS: "num_contexts", BATCHES: "num_batches"}


@dataclass
class NamesChange:
    """Names of one kind: `kept`, `added` and `dropped`, each a `list[str]`."""

    kept: list[str]
    added: list[str]
    dropped: list[str]


@dataclass
class VocabularyChange:
    r"""
    What [`FineTunablePreTrainedModel.resize_vocabulary`] did; `print` shows it.

    Args:
        names (`dict[str, NamesChange]`): of `"genes"`, `"perturbations"`, `"contexts"` and `"batches"`.
        tensors (`dict[str, tuple[torch.Size, torch.Size]]`): the tensors whose rows or columns were laid out anew, with
            their shape before and after.
        grown (`list[str]`): those of them that have rows or columns of added names.
    """

    names: dict[str, NamesChange] = field(default_factory=dict)
    tensors: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    grown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for kind, change in self.names.items():
            parts = [f"{len(change.kept)} kept"]
            for what, names in (("added", change.added), ("dropped", change.dropped)):
                shown = ", ".join(names[:5]) + (", .." if len(names) > 5 else "")
                parts.append(f"{len(names)} {what}" + (f" ({shown})" if names else ""))
            lines.append(f"{kind}: {', '.join(parts)}")
        return joined_lines(lines)


class FineTunablePreTrainedModel(CheckedPreTrainedModel):
    """What every model has to be trained further: on other names than it knows, with low-rank adapters, or in part."""

    config: PerturbationConfig
    # Parts whose linear layers get adapters; where a part has attention, the names of its layers.
    _adapted_parts: tuple[str, ...] = ()
    _attention_layers: tuple[str, ...] = ()
    _feed_forward_layers: tuple[str, ...] = ()
    # The revision of its repository that it was loaded from; whether it was resized since.
    _revision: str | None = None
    _resized = False
    # Perturbations that were added to its vocabulary since.
    _added: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in [`CheckedPreTrainedModel`]."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if kwargs.get("output_loading_info") else loaded)._revision = kwargs.get("revision")
        return loaded

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        """
        The tensors with a row or column for each name. Maps a tensor's name in the state dict to its axes, and the number
        of an axis to what it stands for: `"genes"`, `"perturbations"`, `"contexts"` or `"batches"`; `"perturbations and
        control"`, the control last; or `"features"` of a cell, which are genes or the dimensions of an embedding.
        """
        return {}

    def parts_with_adapters(self) -> list[str]:
        """Parts that are trained whole wherever adapters are trained."""
        return []

    def resize_vocabulary(self, old, new) -> VocabularyChange:
        r"""
        Change the weights in place to fit another vocabulary, before training with it. A known name keeps its weights,
        wherever it stands in the new vocabulary. An added name starts from the mean of all known names.

        Predictions for known names stay as they were.

        - Perturbations by id, contexts and batches: equal to the bit.
        - Genes: the kept genes are predicted as before, to rounding, if the genes that were added or dropped are not
          expressed (0) in the control cells. In two kinds of family genes depend on one another, and less stays: in a
          model on counts, where all genes share a cell's total, the ratios of the kept genes; where tokens of genes
          attend to one another, their embeddings alone.
        - Perturbations by feature vectors have no row: nothing changes.
        - A context or batch in neither vocabulary (id -1) has the mean of the known rows, in the families that accept
          one. Added rows leave this mean as it was, to rounding.

        Args:
            old ([`Vocabulary`]): the names that the model was trained with, from its own processor.
            new ([`Vocabulary`]): the names that it is to have, in any order; see [`Vocabulary.merged`]. Give the
                processor the same one with [`StateProcessor.with_vocabulary`].

        Returns:
            [`VocabularyChange`]: what was kept, added and dropped.

        Raises:
            ValueError: `old` is not the vocabulary of this model, no name of a kind is left, the change needs more than
                rows and columns, or the family is fitted in one pass. The model is then unchanged.
        """
        lists = {kind: (list(getattr(old, kind)), list(getattr(new, kind))) for kind in (GENES, *_SIZES)}
        config = self.config
        sizes = self._resized_sizes(lists)
        axes = self.vocabulary_axes()
        # The features of a model on embeddings are dimensions, which have no names.
        of_features = None if config.gene_dim is not None or not lists[GENES][0] else GENES
        kinds_of_rows = {**lists, PERTURBATIONS_AND_CONTROL: tuple([*names, None] for names in lists[PERTURBATIONS])}
        state, grown = self.state_dict(), []
        resized: dict[str, torch.Tensor] = {}
        for name, kinds in axes.items():
            if name not in state:
                raise ValueError(
                    f"expected a plain {type(self).__name__} with a tensor {name!r}, found none; resize the vocabulary "
                    "before an adapter is put on the model, or merge the adapter first"
                )
            for axis, of_axis in kinds.items():
                kind = of_features if of_axis == FEATURES else of_axis
                if kind is None or kinds_of_rows[kind][0] == kinds_of_rows[kind][1]:
                    continue
                before, after = kinds_of_rows[kind]
                resized[name] = _laid_out(resized.get(name, state[name]), axis, before, after)
                if not set(after) <= set(before) and name not in grown:
                    grown.append(name)
        config = copy.deepcopy(config)
        sizes |= config.fields_of_vocabulary(new)
        for name, size in sizes.items():
            setattr(config, name, size)
        config.validate()
        self._check_resized({**state, **resized}, config)

        for name, size in sizes.items():
            setattr(self.config, name, size)
        shapes = {name: (state[name].shape, tensor.shape) for name, tensor in resized.items()}
        for name, tensor in resized.items():
            self._replace_tensor(name, tensor)
        self._resized = True
        names = {}
        for kind, (before, after) in lists.items():
            known, wanted = set(before), set(after)
            names[kind] = NamesChange(
                [n for n in before if n in wanted],
                [n for n in after if n not in known],
                [n for n in before if n not in wanted],
            )
        self._added = (*(name for name in self._added if name in lists[PERTURBATIONS][1]), *names[PERTURBATIONS].added)
        return VocabularyChange(names, shapes, grown)

    @property
    def added_perturbations(self) -> list[str]:
        """Perturbations that [`resize_vocabulary`] added since the model was loaded: their rows are means of the others."""
        return list(self._added)

    def _resized_sizes(self, lists: dict[str, tuple[list[str], list[str]]]) -> dict[str, int]:
        """The config's sizes for the new names."""
        config, sizes = self.config, {}
        current = {kind: getattr(config, name) for kind, name in _SIZES.items()}
        current[GENES] = config.input_dim if config.gene_dim is None else config.gene_dim
        for kind, (before, after) in lists.items():
            if current[kind] is None or (kind == GENES and config.gene_dim is None and not before and not after):
                continue
            if len(before) != current[kind]:
                raise ValueError(
                    f"expected the vocabulary that this model was trained with ({current[kind]} {kind}), found one of "
                    f"{len(before)} {kind}; give that of its own processor first and the new one second"
                )
            if not after:
                raise ValueError(f"expected {kind} in the new vocabulary, found none; keep some of {before[:5]}")
            if kind != GENES:
                sizes[_SIZES[kind]] = len(after)
            elif config.gene_dim is not None:
                sizes["gene_dim"] = len(after)
            elif config.output_dim == config.input_dim:
                sizes["input_dim"] = sizes["output_dim"] = len(after)
            elif before != after:
                raise ValueError(
                    f"this model reads {config.input_dim} genes and predicts {config.output_dim} features: its genes "
                    "cannot be changed; train one anew"
                )
        return sizes

    def _check_resized(self, state: dict[str, torch.Tensor], config):
        """
        Raises:
            ValueError: a model of the new config has other tensors than rows and columns account for.
        """
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in type(self)(config).state_dict().items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if wrong:
            shapes = [
                f"{name} {tuple(found.get(name) or ())} instead of {tuple(expected.get(name) or ())}" for name in wrong
            ]
            raise ValueError(
                f"{type(self).__name__} with this vocabulary differs in more than rows and columns of its names: "
                f"{'; '.join(shapes[:3])}; train a model anew, or keep to the names that it has"
            )

    def _replace_tensor(self, name: str, tensor: torch.Tensor):
        path, _, leaf = name.rpartition(".")
        module = self.get_submodule(path)
        old = getattr(module, leaf)
        setattr(
            module,
            leaf,
            nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor,
        )
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings = len(module.weight)

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """
        As in [`PreTrainedModel`]. A model that was not resized since it was loaded is first resized to the vocabulary
        beside the adapter, if there is one. So an adapter with rows of new names loads by its name alone.
        """
        if peft_model_id is not None and self.name_or_path and not self._resized and not self._hf_peft_config_loaded:
            load_config = kwargs.get("load_config")  # of a model that is being loaded
            revision = self._revision if load_config is None else load_config.download_kwargs.get("revision")
            of_adapter = _vocabulary_of(peft_model_id, kwargs.get("adapter_kwargs") or {})
            own = _vocabulary_of(self.name_or_path, {"revision": revision})
            if own is not None and of_adapter is not None and own != of_adapter:
                self.resize_vocabulary(own, of_adapter)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def lora_targets(self, feed_forward: bool = False) -> list[str]:
        """
        Names of the linear layers that get low-rank adapters (Hu et al. 2022, LoRA): those of the backbone's attention, or
        all linear layers of encoders and heads in a family without attention.

        Args:
            feed_forward (`bool`): those of the backbone's feed-forward layers, too.

        Raises:
            ValueError: the family has no feed-forward layers of a backbone, or no layer that takes an adapter.
        """
        if feed_forward and not self._feed_forward_layers:
            raise ValueError(
                f"{self.config.model_type} has no backbone with feed-forward layers: all its linear layers have adapters; "
                "leave lora_mlp out"
            )
        linear = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        names = [name for name in linear if name.split(".")[0] in self._adapted_parts]
        if self._attention_layers:
            wanted = self._attention_layers + (self._feed_forward_layers if feed_forward else ())
            names = [name for name in names if name.rpartition(".")[2] in wanted]
        if not names:
            raise ValueError(
                f"{self.config.model_type} has no layers that take low-rank adapters; leave lora_rank out and train all "
                "of it"
            )
        return names

    def freeze_backbone(self):
        """
        Freeze the backbone and leave encoders and heads trainable. Loading a checkpoint makes all parameters trainable again.

        Raises:
            ValueError: the family has no backbone.
        """
        if not self._attention_layers:
            raise ValueError(
                f"{self.config.model_type} has no backbone that could be frozen; its parts are "
                f"{[name for name, _ in self.named_children()]}; leave freeze_backbone out"
            )
        for part in self._adapted_parts:
            self.get_submodule(part).requires_grad_(False)

    def submodules(self, names: list[str]) -> list[str]:
        """
        The given names of parts of the model, once it is clear that all exist.

        Raises:
            ValueError: there is no such part; the error names the nearest one.
        """
        known = {name for name, module in self.named_modules() if name and any(True for _ in module.parameters())}
        for name in names:
            if name not in known:
                top = sorted(n for n in known if "." not in n)
                raise ValueError(f"this model has no part {name!r}; {closest(name, top)}")
        return list(names)


def _vocabulary_of(name: str, hub: dict) -> SimpleNamespace | None:
    """The lists in a checkpoint's or adapter's `vocabulary.json`; None where it has none."""
    path = find_file(name, "vocabulary.json", hub_arguments(hub))
    return None if path is None else SimpleNamespace(**read_json(path))


def _laid_out(tensor: torch.Tensor, axis: int, before: list, after: list) -> torch.Tensor:
    """The rows (`axis` 0) or columns (1) in the order of `after` instead of `before`; an added one is the mean of all."""
    place = {name: i for i, name in enumerate(before)}
    source = torch.tensor([place.get(name, -1) for name in after], device=tensor.device)
    laid_out = tensor.index_select(axis, source.clamp(min=0))
    shape = [1] * tensor.dim()
    shape[axis] = len(after)
    mean = tensor.mean(dim=axis, keepdim=True)
    return torch.where((source < 0).view(shape), mean, laid_out)


__all__ = ["FineTunablePreTrainedModel", "NamesChange", "VocabularyChange"]
