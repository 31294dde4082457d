"""The layers that the families share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_perturbation import PerturbationConfig, SetTransformerConfig
from .messages import given
from .printable import get_logger


logger = get_logger(__name__)

# Padded cells of a sentence times the square of the model's width, up to which a CPU computes them faster than it leaves them out.
_CHEAP_PADDING = 100_000


class UnseenWarning(UserWarning):
    """Sentences of a batch whose perturbation or context was not in training, counted."""


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
    """
    Batch normalisation (Ioffe & Szegedy 2015) of cells `(B, S, H)`. Padded cells enter neither the statistics nor the
    gradient. A frozen layer (its weight takes no gradient) normalises in training as in evaluation, by its running
    statistics, and leaves them unchanged: it is part of the model that an adapter is trained beside.
    """

    def forward(self, cells: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            cells (`torch.Tensor` of shape `(B, S, H)`), mask (`torch.Tensor` of shape `(B, S)`, *optional*): False where
                padded.

        Raises:
            ValueError: in training, there are fewer than two cells, which have no variance.
        """
        training = self.training and self.weight.requires_grad
        if not training or mask is None:
            real = cells.flatten(0, -2)
        else:
            mask = mask.bool()
            real = cells[mask]
        if training and len(real) < 2:
            raise ValueError(
                f"batch normalisation: expected at least 2 cells in a training batch, found {len(real)}; raise "
                "per_device_train_batch_size or set_size"
            )
        if training:
            normalised = super().forward(real)
        else:
            figures = (self.running_mean, self.running_var, self.weight, self.bias)
            normalised = nn.functional.batch_norm(real, *figures, eps=self.eps)
        if not training or mask is None:
            return normalised.view(cells.shape)
        out = torch.zeros_like(cells, dtype=normalised.dtype)
        out[mask] = normalised
        return out


class BatchNormMLP(nn.Module):
    """
    `num_layers` x [Linear, [`MaskedBatchNorm`], activation, Dropout], all of width `hidden_dim`: `(B, S, D)` to `(B, S, H)`.
    Normalisation removes any `bias` of the linear layers. A bias would get a gradient of rounding errors, which Adam follows.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, num_layers: int, hidden_act: str, dropout: float, bias: bool = True
    ):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * num_layers
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in zip(widths[:-1], widths[1:]))
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
        what (`str`): what is embedded, for the warning that counts the ids -1 in an evaluation.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, what: str, **kwargs):
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.what, self._warned = what, False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape to rows `(*, embedding_dim)`."""
        unseen = ids < 0
        # The check waits for the device, so training does without it.
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

    bias: nn.Parameter | None

    def __init__(self, num_features: int, hidden_size: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(hidden_size)) if bias else None)

    def rows(self) -> torch.Tensor:
        """The row of each perturbation, (P, H)."""
        return self.weight

    def forward(
        self,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_doses: torch.Tensor | None = None,
        perturbation_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, K) ids or (B, P) or (B, S, P) features to (B, 1, H) or (B, S, H), ready to add to the cells."""
        if perturbation_features is not None:
            hidden = perturbation_features.to(self.weight.dtype) @ self.rows()
            hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
        else:
            ids = given("perturbation_ids", perturbation_ids)
            weights = (ids >= 0).to(self.weight.dtype)
            if perturbation_doses is not None:
                weights = weights * perturbation_doses.to(self.weight.dtype)
            rows = nn.functional.embedding(ids.clamp(min=0), self.rows())
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


class Packing:
    """
    Sentences without their padding: the real cells of all of them in one row, one sentence after another.

    Args:
        places (`torch.Tensor` of shape `(N,)`): of the real cells among the B x L of the padded batch, in order.
        shape (`tuple[int, int]`): B and L.
        sizes (`list[int]`, *optional*): cells of each sentence. With these each sentence attends by itself; without, attention
            is computed on the padded batch.
    """

    def __init__(self, places: torch.Tensor, shape: tuple[int, int], sizes: list[int] | None = None):
        self.places, self.shape, self.sizes = places, shape, sizes

    @classmethod
    def of(cls, mask: torch.Tensor, places: torch.Tensor | None, wait: bool, hidden_size: int) -> "Packing | None":
        """
        That of a batch, or None where it would not pay: on a CPU, where a sentence has few padded cells or the model is small.

        Args:
            mask (`torch.Tensor` of shape `(B, L)`): False where padded.
            places (`torch.Tensor` of shape `(N,)`, *optional*): of the real cells, where they are known.
            wait (`bool`): find them out, where they are not, although a GPU is waited for.
            hidden_size (`int`): the width of the model.
        """
        shape = (mask.shape[0], mask.shape[1])
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            mask = mask.bool()
            sizes = mask.sum(dim=1).tolist()
            padded = shape[0] * shape[1] - sum(sizes)
            if padded * hidden_size**2 <= shape[0] * _CHEAP_PADDING:
                return None
            return cls(mask.flatten().nonzero().squeeze(1), shape, sizes)
        if places is None and wait and mask.device.type == "cuda":
            places = mask.flatten().nonzero().squeeze(1)
        return None if places is None else cls(places, shape)

    def with_tokens(self, before: int, after: int) -> "Packing":
        """That of sentences with so many tokens before and after their cells."""
        if before + after == 0:
            return self
        sentences, cells = self.shape
        length = before + cells + after
        moved = self.places // cells * length + self.places % cells + before
        tokens = [*range(before), *range(before + cells, length)]
        firsts = torch.arange(sentences, device=moved.device) * length
        places = torch.cat((moved, *(firsts + token for token in tokens))).sort().values
        sizes = None if self.sizes is None else [size + before + after for size in self.sizes]
        return Packing(places, (sentences, length), sizes)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`(B, L, *)` to `(1, N, *)`."""
        return padded.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """`(1, N, *)` to `(B, L, *)`, with zeros where padded."""
        sentences, length = self.shape
        rows = packed.new_zeros(sentences * length, *packed.shape[2:])
        return rows.index_copy(0, self.places, packed[0]).view(sentences, length, *packed.shape[2:])

    def apply(self, module: nn.Module, padded: torch.Tensor) -> torch.Tensor:
        """What a module that takes each cell by itself gives of `(B, L, *)`; zeros where padded."""
        return self.pad(module(self.pack(padded)))


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

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, rotary=None, packing=None, **kwargs):
        """`hidden_states` (B, L, H), or (1, N, H) of a `packing`. Returns as much, and the weights where they are known."""
        projected = self.qkv_proj(hidden_states)
        if self.config.attention == "none":
            # A cell that sees only itself gives its own value the whole weight.
            return self.o_proj(projected.chunk(3, dim=-1)[2]), None
        if packing is None:
            output, weights = self._attend(projected, attention_mask, rotary, **kwargs)
            return self.o_proj(output), weights
        if packing.sizes is None:
            output, _ = self._attend(packing.pad(projected), attention_mask, rotary, **kwargs)
            return self.o_proj(packing.pack(output)), None
        sentences = projected.split(packing.sizes, dim=1)
        output = torch.cat([self._attend(sentence, None, rotary, **kwargs)[0] for sentence in sentences], dim=1)
        return self.o_proj(output), None

    def _attend(self, projected: torch.Tensor, attention_mask, rotary, **kwargs):
        """Queries, keys and values (B, L, 3 x width) to what is attended to (B, L, width), and the weights."""
        query, key, value = projected.chunk(3, dim=-1)
        heads = (*projected.shape[:-1], -1, self.head_dim)
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
        return output.reshape(*projected.shape[:-1], -1), weights


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

    def __init__(self, config: SetTransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class FeedForward(nn.Module):
    """`down(gelu(up(x)))`, the tanh form of GELU, with biases."""

    def __init__(self, config: SetTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states), approximate="tanh"))


class _RootMeanSquareNorm(torch.autograd.Function):
    """
    `weight * x / r` with `r = sqrt(mean(x^2) + eps)`, in few passes over memory. With y = x / r, g the gradient and n the width,

        d x = (g * weight - y * sum(g * weight * y) / n) / r,          d weight = sum over rows of g * y.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weight, inverse = ctx.saved_tensors
        y = x * inverse
        product = grad * y
        of_weight = product.reshape(-1, x.shape[-1]).sum(dim=0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        of_x = torch.mul(grad, weight, out=product).addcmul_(y, mean, value=-1).mul_(inverse)
        return of_x, of_weight, None


class RMSNorm(nn.RMSNorm):
    """
    Root mean square normalisation (Zhang & Sennrich 2019) in the precision of its input, which is what one kernel computes on a GPU. A
    CPU has no such kernel.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.compiler.is_compiling()
        ):
            return _RootMeanSquareNorm.apply(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: SetTransformerConfig) -> nn.Module:
    if config.backbone == "llama":
        return RMSNorm(config.hidden_size, eps=1e-6)
    return nn.LayerNorm(config.hidden_size, eps=1e-5)


class SetTransformerLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention, then the feed-forward layer, each added to its input."""

    def __init__(self, config: SetTransformerConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = SetAttention(config, bias=config.backbone == "gpt2")
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = GatedFeedForward(config) if config.backbone == "llama" else FeedForward(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask=None, rotary=None, packing=None, **kwargs
    ) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, rotary, packing, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class SetTransformer(nn.Module):
    """
    Pre-norm transformer over a set: no position information, all cells see all cells, padded cells are seen by none.

    Permuting the cells of a sentence permutes the output and changes nothing else. `attention="causal"` and
    `positions="rope"` give up that property; they run checkpoints that were trained so.
    """

    rope_theta = 10000.0

    def __init__(self, config: SetTransformerConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(SetTransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, packing: Packing | None = None, **kwargs
    ) -> torch.Tensor:
        """
        `hidden_states` (B, L, H), `mask` (B, L) bool, False where padded. Returns (B, L, H). With a `packing` of the mask, nothing
        is computed of the padding, and it is 0.
        """
        rotary = self._rotary(hidden_states, mask) if self.config.positions == "rope" else None
        length = hidden_states.shape[1]
        attention_mask: Any  # of the form that the kernel takes
        by_sentence = packing is not None and packing.sizes is not None
        if self.config.attention == "bidirectional" and (mask is None or by_sentence):
            attention_mask = None  # under torch.compile, even a mask that hides nothing would rule out the fast kernel
        elif mask is not None and self._attends_on_gpu(hidden_states):
            # The library's own mask waits for the device, to see whether it hides anything.
            attention_mask = mask[:, None, None, :].expand(-1, 1, length, -1)
        elif self.config.attention == "bidirectional":
            attention_mask = create_bidirectional_mask(self.config, hidden_states, mask)
        elif self.config.attention == "causal":
            attention_mask = create_causal_mask(self.config, hidden_states, mask, past_key_values=None)
        else:
            attention_mask = None
        if packing is not None:
            hidden_states = packing.pack(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, rotary, packing, **kwargs)
        hidden_states = self.norm(hidden_states)
        return hidden_states if packing is None else packing.pad(hidden_states)

    def _attends_on_gpu(self, hidden_states: torch.Tensor) -> bool:
        fused = self.config._attn_implementation == "sdpa" and self.config.attention == "bidirectional"
        return fused and hidden_states.device.type == "cuda"

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


__all__ = [
    "BatchNormMLP",
    "ConfidenceHead",
    "FeedForward",
    "GatedFeedForward",
    "GeneDecoder",
    "MLP",
    "MaskedBatchNorm",
    "Packing",
    "PerturbationEmbedding",
    "PerturbationEncoder",
    "SetAttention",
    "SetTransformer",
    "SetTransformerLayer",
    "UnseenMeanEmbedding",
    "UnseenWarning",
    "eager_attention_forward",
    "make_norm",
    "rotate",
]
