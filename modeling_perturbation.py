"""The contract that every perturbation model keeps, and the layers that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging

from .configuration_state import PerturbationConfig, closest
from .modeling_finetuning import FEATURES, GENES, PERTURBATIONS, FineTuningMixin


logger = logging.get_logger(__name__)

# The keys of a batch: B sentences of S cells, K perturbations applied together.
CONTROL_CELLS = "control_cells"
PERTURBATION_IDS = "perturbation_ids"
PERTURBATION_DOSES = "perturbation_doses"
PERTURBATION_FEATURES = "perturbation_features"
CONTEXT_IDS = "context_ids"
BATCH_IDS = "batch_ids"
CELL_MASK = "cell_mask"
LABELS = "labels"
GENE_LABELS = "gene_labels"


@dataclass
class PerturbationOutput(ModelOutput):
    r"""
    What every perturbation model returns.

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
            Of a family fitted without gradients: True where a sentence's perturbation or context was not in training.
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


class UnseenWarning(UserWarning):
    """Sentences of a batch whose perturbation or context was not in training, counted."""


class UnseenPerturbationError(ValueError):
    """
    Perturbations that a model cannot predict, as they were not in training.

    Args:
        ids (`list[int]`): their ids.
        reason (`str`): what is missing, and what to do.
        names (`list[str]`, *optional*): of all perturbations by id, where they are known.
    """

    def __init__(self, ids: list[int], reason: str, names: list[str] | None = None):
        self.ids, self.reason = ids, reason
        who = f"perturbation ids {ids}" if names is None else f"perturbations {[names[i] for i in ids]}"
        super().__init__(f"{who}: {reason}")


class MLP(nn.Module):
    """`num_layers` linear layers, with activation and dropout between them. One layer is one `Linear`."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, hidden_act: str, dropout: float):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.activation = ACT2FN[hidden_act]
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = self.dropout(self.activation(layer(hidden_states)))
        return self.layers[-1](hidden_states)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation (Ioffe & Szegedy 2015) of cells `(B, S, H)`; padded ones enter neither its statistics nor the gradient."""

    def forward(self, cells: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            cells (`torch.Tensor` of shape `(B, S, H)`), mask (`torch.Tensor` of shape `(B, S)`, *optional*): False where
                padded.

        Raises:
            ValueError: in training, there are fewer than two cells, which have no variance.
        """
        if not self.training or mask is None:
            real = cells.flatten(0, -2)
        else:
            mask = mask.bool()
            real = cells[mask]
        if self.training and len(real) < 2:
            raise ValueError(
                f"batch normalisation: expected at least 2 cells in a training batch, found {len(real)}; raise "
                "per_device_train_batch_size or set_size"
            )
        normalised = super().forward(real)
        if not self.training or mask is None:
            return normalised.view(cells.shape)
        out = torch.zeros_like(cells, dtype=normalised.dtype)
        out[mask] = normalised
        return out


class BatchNormMLP(nn.Module):
    """`num_layers` x [Linear, [`MaskedBatchNorm`], activation, Dropout], all of width `hidden_dim`: `(B, S, D)` to `(B, S, H)`."""

    def __init__(self, in_dim: int, hidden_dim: int, num_layers: int, hidden_act: str, dropout: float):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * num_layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(MaskedBatchNorm(hidden_dim) for _ in range(num_layers))
        self.activation = ACT2FN[hidden_act]
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms):
            cells = self.dropout(self.activation(norm(layer(cells), mask)))
        return cells


class UnseenMeanEmbedding(nn.Embedding):
    """
    A row for each known context or batch; one that was not seen in training (id -1) has the mean of the known rows.

    Args:
        num_embeddings, embedding_dim (`int`): known ones, and the width of a row.
        what (`str`): what is embedded, for the warning that says how many of the ids of an evaluation are -1.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, what: str, **kwargs):
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.what, self._warned = what, False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape to rows `(*, embedding_dim)`."""
        unseen = ids < 0
        # Looking waits for the device, which training does not.
        if not self.training and not self._warned and unseen.any():
            logger.warning(
                f"{int(unseen.sum())} of {unseen.numel()} {self.what} ids are -1, not seen in training: they are given the "
                f"mean of the {self.num_embeddings} known rows (said once)"
            )
            self._warned = True
        return torch.where(unseen.unsqueeze(-1), self.weight.mean(dim=0), super().forward(ids.clamp(min=0)))


class PerturbationEmbedding(nn.Module):
    """
    A linear layer over perturbations that never builds a one-hot tensor.

    Row p of `weight` belongs to perturbation p. K perturbations at doses d_1..d_K give `sum_k d_k weight[p_k] + bias`,
    which is what a linear layer gives on the multi-hot vector; no perturbation (the control) gives the bias. Without
    `bias` it gives 0.
    """

    def __init__(self, num_features: int, hidden_size: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(hidden_size)) if bias else None)

    def forward(
        self,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, K) ids or (B, P) or (B, S, P) features to (B, 1, H) or (B, S, H), ready to add to the cells."""
        if perturbation_features is not None:
            hidden = perturbation_features.to(self.weight.dtype) @ self.weight
            hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
        else:
            weights = (perturbation_ids >= 0).to(self.weight.dtype)
            if perturbation_doses is not None:
                weights = weights * perturbation_doses.to(self.weight.dtype)
            rows = nn.functional.embedding(perturbation_ids.clamp(min=0), self.weight)
            hidden = (weights.unsqueeze(-1) * rows).sum(dim=1, keepdim=True)
        return hidden if self.bias is None else hidden + self.bias


class PerturbationEncoder(nn.Module):
    """`MLP(num_layers)` over the perturbation, its first layer a [`PerturbationEmbedding`]."""

    def __init__(self, num_features: int, hidden_size: int, num_layers: int, hidden_act: str, dropout: float):
        super().__init__()
        self.embedding = PerturbationEmbedding(num_features, hidden_size)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.activation = ACT2FN[hidden_act]
        self.dropout = nn.Dropout(dropout)

    def forward(self, perturbation_ids=None, perturbation_doses=None, perturbation_features=None) -> torch.Tensor:
        hidden = self.embedding(perturbation_ids, perturbation_doses, perturbation_features)
        for layer in self.layers:
            hidden = layer(self.dropout(self.activation(hidden)))
        return hidden


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, so that its weights can be returned. Shapes `(B, heads, length, head_dim)`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, eq. 34), halves convention, on `(B, heads, length, head_dim)`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class SetAttention(nn.Module):
    """Self-attention over the cells of a sentence. The heads' width is free of the hidden size."""

    def __init__(self, config: PerturbationConfig, bias: bool):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        # Without a mask, sdpa attends causally unless told otherwise.
        self.is_causal = config.attention == "causal"
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, rotary=None, **kwargs):
        query, key, value = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        if self.config.attention == "none":
            # A cell that sees itself alone gives its own value the whole weight.
            return self.o_proj(value), None
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (states.view(heads).transpose(1, 2) for states in (query, key, value))
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class _GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up`. Keeps its two inputs alone for the backward pass, where autograd would keep silu(gate) too."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, nn.functional.silu(gate).mul_(grad)


class GatedFeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, SwiGLU), without biases."""

    def __init__(self, config: PerturbationConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class FeedForward(nn.Module):
    """`down(gelu(up(x)))`, the tanh form of GELU, with biases."""

    def __init__(self, config: PerturbationConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states), approximate="tanh"))


def make_norm(config: PerturbationConfig) -> nn.Module:
    if config.backbone == "llama":
        return nn.RMSNorm(config.hidden_size, eps=1e-6)
    return nn.LayerNorm(config.hidden_size, eps=1e-5)


class SetTransformerLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention, then the feed-forward layer, each added to its input."""

    def __init__(self, config: PerturbationConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = SetAttention(config, bias=config.backbone == "gpt2")
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = GatedFeedForward(config) if config.backbone == "llama" else FeedForward(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, rotary=None, **kwargs) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, rotary, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class SetTransformer(nn.Module):
    """
    Pre-norm transformer over a set: no position information, all cells see all cells, padded cells are seen by none.

    Permuting the cells of a sentence permutes the output and changes nothing else. `attention="causal"` and
    `positions="rope"` give up that property; they run checkpoints that were trained so.
    """

    rope_theta = 10000.0

    def __init__(self, config: PerturbationConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(SetTransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """`hidden_states` (B, L, H), `mask` (B, L) bool, False where padded. Returns (B, L, H)."""
        rotary = self._rotary(hidden_states, mask) if self.config.positions == "rope" else None
        if self.config.attention == "bidirectional":
            attention_mask = create_bidirectional_mask(self.config, hidden_states, mask)
        elif self.config.attention == "causal":
            attention_mask = create_causal_mask(self.config, hidden_states, mask, past_key_values=None)
        else:
            attention_mask = None
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, rotary, **kwargs)
        return self.norm(hidden_states)

    def _rotary(self, hidden_states: torch.Tensor, mask: torch.Tensor | None):
        """Cosines and sines (B or 1, 1, L, head_dim); padded cells take no position."""
        device = hidden_states.device
        if mask is None:
            positions = torch.arange(hidden_states.shape[1], device=device)[None]
        else:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        dim = self.config.head_dim
        frequencies = self.rope_theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


class GeneDecoder(nn.Module):
    """
    Expression from an embedding: [Linear, LayerNorm, GELU, Dropout] per hidden width, then Linear, ReLU.

    With `residual`, the output of block i-1 is added to that of every odd block i where their widths agree.
    """

    def __init__(self, latent_dim: int, hidden_sizes: list[int], gene_dim: int, dropout: float, residual: bool):
        super().__init__()
        widths = [latent_dim, *hidden_sizes]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(dropout))
            for a, b in zip(widths[:-1], widths[1:])
        )
        self.output = nn.Linear(widths[-1], gene_dim)
        self.residual = residual

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            decoded = block(latents)
            if self.residual and i % 2 == 1 and decoded.shape == latents.shape:
                decoded = decoded + latents
            latents = decoded
        return nn.functional.relu(self.output(latents))


class ConfidenceHead(nn.Module):
    """A sentence's expected loss from its confidence token: (B, H) to (B,), at least 0."""

    def __init__(self, hidden_size: int, dropout: float):
        super().__init__()
        half, quarter = hidden_size // 2, hidden_size // 4
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, half),
            nn.LayerNorm(half),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(half, quarter),
            nn.LayerNorm(quarter),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(quarter, 1),
            nn.ReLU(),
        )

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.layers(token).squeeze(-1)


class PerturbationPreTrainedModel(FineTuningMixin, PreTrainedModel):
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
    # The model is given the observed cells, and shows what is the best that could be reached with them.
    is_ceiling = False
    # The weights are computed in one pass over the training cells, by `fit`, not stepped towards.
    fitted = False
    _forward_options = frozenset({"output_attentions", "output_hidden_states"})

    def __init__(self, config: PerturbationConfig):
        super().__init__(config)
        if config.num_perturbations is None and config.perturbation_dim is None:
            raise ValueError(
                f"{type(config).__name__} needs num_perturbations (perturbations by id) or perturbation_dim (by features) "
                "to build a model, found neither"
            )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in [`PreTrainedModel`]. A loaded model predicts what the saved one did, bit for bit on the same machine."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # Weights mapped from a file lie at its offsets, and on a CPU the rounding of a matrix product depends on how
        # its operands are aligned. A copy in memory of its own is aligned as in training.
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        return loaded

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PerturbationEmbedding):
            # Unit variance, so that the perturbation is as loud as the cell from the first step. Where it starts faint,
            # a model learns what each context does on average before it learns to listen to the perturbation.
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

    def check_perturbations(
        self,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
    ):
        """
        Whether these can be predicted, which most families say of all.

        Raises:
            UnseenPerturbationError: some cannot.
        """

    def _check_batches(self, batch_ids: torch.Tensor | None):
        """For a model that embeds batches: they are given and known."""
        if batch_ids is None:
            raise ValueError("batch_encoder=True needs batch_ids, found None")
        # In training, every batch is known; looking would wait for the device at each step.
        if not self.training and (batch_ids < 0).any():
            raise ValueError(
                "batch_ids holds -1, a batch that was not seen in training; batch_encoder=True has no embedding for it: "
                "give the cells the name of a known batch, or use a model without batch_encoder"
            )

    def _check_inputs(
        self, control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, options
    ):
        """Shapes and combinations of a batch; each error says what was expected and what was found."""
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
    _adapted_parts = ("perturbation_encoder", "cell_encoder", "output_head")

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
            config.num_perturbations or config.perturbation_dim, hidden, config.num_encoder_layers, act, dropout
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
                config.decoder_hidden_sizes,
                config.gene_dim,
                config.decoder_dropout,
                config.residual_decoder,
            )

    def _outputs(self, predictions: torch.Tensor, labels: torch.Tensor | None, detach: bool, **others):
        """
        Predictions (B, S, D_out) in the config's units, with the genes decoded from them.

        Where `detach`, the gene decoder's gradient stops at the latents, and it now and then sees the true ones.
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
    "UnseenWarning",
]
