"""The contract that every perturbation model keeps."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_perturbation import PerturbationConfig
from .constants import (
    BATCH_IDS,
    CELL_MASK,
    CONTEXT_IDS,
    CONTROL_CELLS,
    GENE_LABELS,
    LABELS,
    PERTURBATION_DOSES,
    PERTURBATION_FEATURES,
    PERTURBATION_IDS,
)
from .messages import closest
from .modeling_finetuning import (
    FEATURES,
    GENES,
    PERTURBATIONS,
    FineTunablePreTrainedModel,
)
from .modeling_layers import (
    MLP,
    GeneDecoder,
    PerturbationEmbedding,
    PerturbationEncoder,
    SetAttention,
    SetTransformerLayer,
    UnseenMeanEmbedding,
)


@dataclass
class PerturbationOutput(ModelOutput):
    r"""
    What every perturbation model returns. Where `cell_mask` is False there is no cell: what stands there in `predictions` and
    `gene_predictions` means nothing, and no real cell depends on it.

    Args:
        predictions (`torch.Tensor` of shape `(batch_size, set_size, output_dim)`):
            Predicted cells, in the units of the model's output (log1p expression or embedding).
        gene_predictions (`torch.Tensor` of shape `(batch_size, set_size, gene_dim)`, *optional*):
            Expression decoded from the predicted embeddings, where the model has a gene decoder.
        confidence (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Predicted loss of each sentence, times `confidence_target_scale`.
        batch_logits (`torch.Tensor` of shape `(batch_size, num_batches)`, *optional*):
            Scores of each experimental batch, read off the batch token.
        unseen (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            True for a sentence whose perturbation or context was not in training, if the family needs it to predict.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Input of the first block and output of each, learned tokens included.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights of each block, of shape `(batch_size, heads, length, length)`.
    """

    predictions: torch.Tensor | None = None
    gene_predictions: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    batch_logits: torch.Tensor | None = None
    unseen: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    # Fields that do not begin with the sentences of the batch.
    of_all_sentences: ClassVar[tuple[str, ...]] = ()

    def first(self, number: int) -> Self:
        """The outputs of the first sentences of the batch, without hidden states and attentions."""
        fields: dict[str, Any] = {}
        for name, value in self.items():
            if name in self.of_all_sentences:
                fields[name] = value
            elif isinstance(value, dict):
                fields[name] = {key: tensor[:number] for key, tensor in value.items()}
            elif isinstance(value, torch.Tensor):
                fields[name] = value[:number]
        return type(self)(**fields)


class UnseenPerturbationError(ValueError):
    """
    Perturbations that a model cannot predict because they were not in training.

    Args:
        ids (`list[int]`): their ids.
        reason (`str`): what is missing, and what to do.
        names (`list[str]`, *optional*): of all perturbations by id, where they are known.
    """

    def __init__(self, ids: list[int], reason: str, names: list[str] | None = None):
        self.ids, self.reason = ids, reason
        who = f"perturbation ids {ids}" if names is None else f"perturbations {[names[i] for i in ids]}"
        super().__init__(f"{who}: {reason}")


class PerturbationPreTrainedModel(FineTunablePreTrainedModel):
    r"""
    Loading, saving, initialisation and input checks of every perturbation model.

    Every family's `forward` takes the following, reads what it needs of them, and returns a [`PerturbationOutput`]. A
    wrong shape or combination is a ValueError, an unknown name a TypeError.

    Inputs:
        control_cells (`torch.Tensor` of shape `(batch_size, set_size, input_dim)`):
            Unperturbed cells: log1p expression (or counts, where a family says so) in the order of the processor's
            genes, or an embedding.
        perturbation_ids (`torch.LongTensor` of shape `(batch_size, num_together)`, *optional*):
            The perturbations applied together in each sentence, padded with -1; all -1 is the control.
            One of this and `perturbation_features` is required.
        perturbation_doses (`torch.Tensor` of shape `(batch_size, num_together)`, *optional*):
            Weight of each perturbation, 1 where not given.
        perturbation_features (`torch.Tensor` of shape `(batch_size, P)` or `(batch_size, set_size, P)`, *optional*):
            Features of the perturbation, `P` being `perturbation_dim`, or a multi-hot vector of `num_perturbations`.
        context_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Context (cell type or line) of each sentence; -1 is one that was not seen in training.
        batch_ids (`torch.LongTensor` of shape `(batch_size, set_size)`, *optional*):
            Experimental batch of each cell; -1 is one that was not seen in training.
        cell_mask (`torch.BoolTensor` of shape `(batch_size, set_size)`, *optional*):
            False where a short sentence is padded.
        labels (`torch.Tensor` of shape `(batch_size, set_size, output_dim)`, *optional*):
            Observed perturbed cells. The loss is the objective's business.
        gene_labels (`torch.Tensor` of shape `(batch_size, set_size, gene_dim)`, *optional*):
            Observed expression, the gene decoder's target; read by the objective alone.
    """

    config_class = PerturbationConfig
    base_model_prefix = "model"
    main_input_name = CONTROL_CELLS
    supports_gradient_checkpointing = True
    # The loss is a mean over sentences: the Trainer must scale it under gradient accumulation.
    accepts_loss_kwargs = False
    # The model is given the observed cells: its score is the best that any prediction could reach.
    is_ceiling = False
    # `fit` computes the weights in one pass over the training cells; an optimiser takes no steps.
    fitted = False
    # Its forward takes `cell_places`, with which it computes nothing of the padding of a batch.
    packs_cells = False
    # A training can start from a folder of weights that others published in a form of their own.
    reads_published = False
    _forward_options = frozenset({"output_attentions", "output_hidden_states"})

    @property
    def fitted_anchor(self) -> Any:
        """What a training fits to the training groups before its first step, as [`Anchor`] is; None where there is none."""
        return None

    def __init__(self, config: PerturbationConfig):
        super().__init__(config)
        # Raises where the config says neither how many perturbations there are nor how wide their features are.
        _ = config.perturbation_width
        # The tags by which a pushed model is found on the Hub.
        self.add_model_tags(["single-cell", "perturbation", "pertstate", "biology"])

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PerturbationEmbedding):
            # Unit variance, so that the perturbation is as large as the cell from the first step. If it starts small, a
            # model first learns what each context does on average, and only then what the perturbation does.
            std = self.config.perturbation_initializer_range
            if self.config.num_perturbations is None:
                std *= module.weight.shape[0] ** -0.5
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, UnseenMeanEmbedding):
            init.normal_(module.weight)

    def parameter_groups(self) -> list[dict] | None:
        """
        For a family with parts that are optimised differently: its parameters in groups, as an optimiser takes them,
        each with the options that are its own (`lr`, `weight_decay`). None: all alike.
        """
        return None

    def sample_counts(self, *args, **kwargs) -> torch.Tensor:
        """
        Counts `(batch_size, set_size, genes)` drawn from the distribution of counts, of a family that has one.

        Raises:
            ValueError: the family has no distribution of counts.
        """
        raise ValueError(
            f"{self.config.model_type} predicts no distribution of counts, so none can be drawn (sample_counts); use a "
            "family that models counts"
        )

    def check_perturbations(
        self,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
    ):
        """
        Check that these can be predicted. Most families can predict any.

        Raises:
            UnseenPerturbationError: some cannot.
        """

    def _check_batches(self, batch_ids: torch.Tensor | None) -> torch.Tensor:
        """The same ids, for a model that embeds batches. ValueError unless they are given and known."""
        if batch_ids is None:
            raise ValueError("batch_encoder=True needs batch_ids, found None; give the batch of each cell")
        # In training every batch is known, and a check would wait for the device at each step.
        if not self.training and (batch_ids < 0).any():
            raise ValueError(
                "batch_ids holds -1, a batch that was not seen in training; batch_encoder=True has no embedding for it: "
                "give the cells the name of a known batch, or use a model without batch_encoder"
            )
        return batch_ids

    def _check_inputs(
        self, control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, options
    ):
        """Check the shapes of a batch, and which inputs are combined. Each error says what was expected and what was found."""
        for name in options:
            if name not in self._forward_options:
                known = [CONTROL_CELLS, PERTURBATION_IDS, PERTURBATION_DOSES, PERTURBATION_FEATURES, CONTEXT_IDS]
                known += [BATCH_IDS, CELL_MASK, LABELS, GENE_LABELS, *self._forward_options]
                raise TypeError(f"{type(self).__name__} takes no input {name!r}; {closest(name, known)}")
        if control_cells.dim() != 3 or control_cells.shape[-1] != self.config.input_dim:
            raise ValueError(
                f"control_cells: expected shape (batch_size, set_size, {self.config.input_dim}), found "
                f"{tuple(control_cells.shape)}; make the batch with the checkpoint's own processor"
            )
        sentences, cells = control_cells.shape[:2]
        if (perturbation_ids is None) == (perturbation_features is None):
            raise ValueError(
                "expected one of perturbation_ids and perturbation_features, found "
                + ("neither" if perturbation_ids is None else "both")
            )
        if perturbation_ids is not None:
            if self.config.num_perturbations is None:
                raise ValueError(
                    "this model takes perturbation_features (perturbation_dim="
                    f"{self.config.perturbation_dim}), found perturbation_ids"
                )
            if perturbation_ids.dim() != 2 or perturbation_ids.shape[0] != sentences:
                raise ValueError(
                    f"perturbation_ids: expected shape ({sentences}, number of perturbations applied together), "
                    f"found {tuple(perturbation_ids.shape)}"
                )
            if perturbation_doses is not None and perturbation_doses.shape != perturbation_ids.shape:
                raise ValueError(
                    f"perturbation_doses: expected the shape of perturbation_ids {tuple(perturbation_ids.shape)}, "
                    f"found {tuple(perturbation_doses.shape)}"
                )
        else:
            width = self.config.num_perturbations or self.config.perturbation_dim
            shape = tuple(perturbation_features.shape)
            if shape not in ((sentences, width), (sentences, cells, width)):
                raise ValueError(
                    f"perturbation_features: expected shape ({sentences}, {width}) or ({sentences}, {cells}, "
                    f"{width}), found {shape}"
                )
            if perturbation_doses is not None:
                raise ValueError("perturbation_doses belong to perturbation_ids; scale the features themselves instead")
        for name, value in ((BATCH_IDS, batch_ids), (CELL_MASK, cell_mask)):
            if value is not None and tuple(value.shape) != (sentences, cells):
                raise ValueError(f"{name}: expected shape ({sentences}, {cells}), found {tuple(value.shape)}")


class EncoderPreTrainedModel(PerturbationPreTrainedModel):
    """Families that encode cell and perturbation and read predictions off an output head, or have a gene decoder."""

    # One step in this many trains a detached gene decoder on the true latents instead of the predicted ones.
    true_latents_every = 10
    _adapted_parts: tuple[str, ...] = ("perturbation_encoder", "cell_encoder", "output_head")

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        head = f"output_head.layers.{self.config.num_decoder_layers - 1}"
        axes = {
            "cell_encoder.layers.0.weight": {1: FEATURES},
            f"{head}.weight": {0: FEATURES},
            f"{head}.bias": {0: FEATURES},
        }
        if self.config.num_perturbations is not None:
            axes["perturbation_encoder.embedding.weight"] = {0: PERTURBATIONS}
        return axes | self._decoder_axes()

    def _decoder_axes(self) -> dict[str, dict[int, str]]:
        if self.config.gene_dim is None:
            return {}
        return {"gene_decoder.output.weight": {0: GENES}, "gene_decoder.output.bias": {0: GENES}}

    def _make_encoders(self, cell_layers: int):
        config = self.config
        hidden, act, dropout = config.hidden_size, config.hidden_act, config.hidden_dropout
        self.perturbation_encoder = PerturbationEncoder(
            config.perturbation_width, hidden, config.num_encoder_layers, act, dropout
        )
        self.cell_encoder = MLP(config.input_dim, hidden, hidden, cell_layers, act, dropout)

    def _make_output_head(self):
        config = self.config
        self.output_head = MLP(
            config.hidden_size,
            config.hidden_size,
            config.output_dim,
            config.num_decoder_layers,
            config.hidden_act,
            config.hidden_dropout,
        )

    def _make_gene_decoder(self):
        config = self.config
        if config.gene_dim is not None:
            self.gene_decoder = GeneDecoder(
                config.output_dim,
                config.decoder_hidden_sizes or [],
                config.gene_dim,
                config.decoder_dropout,
                config.residual_decoder,
            )

    def _outputs(self, predictions: torch.Tensor, labels: torch.Tensor | None, detach: bool, **others):
        """
        Predictions (B, S, D_out) in the config's units, with the genes decoded from them.

        With `detach`, the gene decoder's gradient stops at the latents, and in training one step in `true_latents_every`
        decodes the true ones.
        """
        if self.config.nonnegative_output:
            predictions = nn.functional.relu(predictions)
        genes = None
        if self.config.gene_dim is not None:
            latents = predictions.detach() if detach else predictions
            if detach and self.training and labels is not None and torch.rand(()) < 1 / self.true_latents_every:
                latents = labels.to(latents.dtype)
            genes = self.gene_decoder(latents)
        return PerturbationOutput(predictions=predictions, gene_predictions=genes, **others)


class SetTransformerPreTrainedModel(EncoderPreTrainedModel):
    """Families with a [`SetTransformer`]."""

    _adapted_parts = ("backbone",)
    _attention_layers = ("qkv_proj", "o_proj")
    _feed_forward_layers = ("gate_proj", "up_proj", "down_proj")
    _no_split_modules = ["SetTransformerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SetTransformerLayer, "attentions": SetAttention}


__all__ = [
    "EncoderPreTrainedModel",
    "PerturbationOutput",
    "PerturbationPreTrainedModel",
    "SetTransformerPreTrainedModel",
    "UnseenPerturbationError",
]
