"""The gene-token transformer: every gene of a cell is a token, and the genes of a cell see one another."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import capture_outputs

from ...base.messages import given
from ...base.modeling_finetuning import GENES, PERTURBATIONS
from ...base.modeling_layers import MaskedBatchNorm, PerturbationEmbedding, SetAttention
from ...base.modeling_perturbation import PerturbationOutput, PerturbationPreTrainedModel
from .configuration_scgpt import ScGPTConfig


@dataclass
class ScGPTOutput(PerturbationOutput):
    r"""
    As [`PerturbationOutput`], and:

    Args:
        predictions (`torch.Tensor` of shape `(batch_size, set_size, genes)`):
            Predicted expression: of all genes in evaluation, of the genes of this step in training. It is clamped at 0 in
            evaluation alone, as a clamped gene would not learn. Padded cells are 0.
        gene_indices (`torch.LongTensor` of shape `(genes,)`, *optional*):
            In training, the positions of the genes that were drawn for this step, in order. None where `predictions`
            hold all genes.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Input of the first block and output of each, `(real cells, genes, hidden_size)`.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights of each block, `(real cells, heads, genes, genes)`.
    """

    gene_indices: torch.Tensor | None = None

    of_all_sentences: ClassVar[tuple[str, ...]] = ("gene_indices",)


class ValueEncoder(nn.Module):
    """An expression value to a vector: Linear, activation, Linear, LayerNorm, Dropout, of values up to `max_value`."""

    max_value = 512.0

    def __init__(self, config: ScGPTConfig):
        super().__init__()
        self.linear1 = nn.Linear(1, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.linear2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(cells, genes) to (cells, genes, hidden_size)."""
        values = values.clamp(max=self.max_value).unsqueeze(-1).to(self.linear1.weight.dtype)
        return self.dropout(self.norm(self.linear2(self.activation(self.linear1(values)))))


class DrugEncoder(PerturbationEmbedding):
    """
    What a perturbation that is no gene adds to every token of a cell.

    By id: the sum over the perturbations applied together of dose x LayerNorm(row); the norm is taken of each row and not
    of the sum, which would lose the dose. By features of `perturbation_dim` numbers: a linear map of them. Either way the
    control adds nothing.
    """

    def __init__(self, config: ScGPTConfig):
        super().__init__(config.perturbation_width, config.hidden_size, bias=False)
        self.norm = nn.LayerNorm(config.hidden_size) if config.perturbation_dim is None else nn.Identity()

    def rows(self) -> torch.Tensor:
        return self.norm(self.weight)


class GeneTransformerLayer(GradientCheckpointingLayer):
    """One post-norm block over the genes of a cell: attention, then the feed-forward layer, a norm after each sum."""

    def __init__(self, config: ScGPTConfig):
        super().__init__()
        self.attention = SetAttention(config, bias=True)
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.attention(hidden_states, **kwargs)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        fed = self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states))))
        return self.feed_forward_norm(hidden_states + self.dropout(fed))


class ScGPTForPerturbation(PerturbationPreTrainedModel):
    r"""
    The gene-token transformer (scGPT, Cui et al. 2024, Nature Methods), predicting perturbed from control cells.

    A token is a gene: LayerNorm(gene embedding) + value MLP(expression) + flag embedding, and for chemical perturbations
    the drug's embedding; BatchNorm over the sum, post-norm transformer blocks over the genes of a cell, and a head that
    reads one value off each token. Cells do not see one another. There are no positions: permuting the genes permutes the
    predictions.

    Flags: 0 none, 1 perturbed, 2 padding. Here no gene is padded, and padded cells are not computed at all; row 2 exists
    because published weights have it.

    **All genes, or some.** In evaluation all genes see one another, a few cells at a time (`tokens_per_pass`): the same
    predictions whatever that number is. Attention ties every gene's prediction to the genes beside it, so with fewer
    genes the predictions are others: in training, where each step draws `genes_per_step`, and with `genes_per_chunk`,
    where genes are predicted in groups that do not see one another.

    Args:
        config ([`ScGPTConfig`]): sizes and options.

    Example:
    ```python
    >>> import torch
    >>> from pertstate import ScGPTConfig, ScGPTForPerturbation

    >>> config = ScGPTConfig.from_preset("tiny", input_dim=100, num_perturbations=2, perturbed_genes=[7, 12])
    >>> model = ScGPTForPerturbation(config).eval()
    >>> outputs = model(control_cells=torch.rand(2, 8, 100), perturbation_ids=torch.tensor([[0, -1], [0, 1]]))
    >>> tuple(outputs.predictions.shape)
    (2, 8, 100)
    ```
    """

    config: ScGPTConfig
    config_class = ScGPTConfig
    reads_published = True
    _no_split_modules = ["GeneTransformerLayer"]
    _supports_sdpa = True
    _adapted_parts = ("layers",)
    _attention_layers = ("qkv_proj", "o_proj")
    _feed_forward_layers = ("up_proj", "down_proj")
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GeneTransformerLayer, "attentions": SetAttention}

    def __init__(self, config: ScGPTConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.gene_embedding = nn.Embedding(config.input_dim, hidden)
        self.gene_norm = nn.LayerNorm(hidden)
        self.value_encoder = ValueEncoder(config)
        self.flag_embedding = nn.Embedding(3, hidden)
        if config.perturbation_type == "chemical":
            self.drug_encoder = DrugEncoder(config)
        self.norm = MaskedBatchNorm(hidden, eps=6.1e-5)
        self.layers = nn.ModuleList(GeneTransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Sequential(
            nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, 1)
        )
        self.post_init()

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        axes = {"gene_embedding.weight": {0: GENES}}
        if self.config.perturbation_type == "chemical" and self.config.num_perturbations is not None:
            axes["drug_encoder.weight"] = {0: PERTURBATIONS}
        return axes

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        config = self.config
        if module is self.gene_embedding:
            init.uniform_(module.weight, -0.1, 0.1)
        elif module is self.flag_embedding:
            # Gene and value have unit variance; a much smaller flag would have no effect for long.
            init.normal_(module.weight, std=config.perturbation_initializer_range)
        elif module is self.value_encoder.linear1:
            # Without biases every hidden unit bends at 0, and the LayerNorm then removes the size of a value.
            init.uniform_(module.weight, -1.0, 1.0)
            init.uniform_(module.bias, -1.0, 1.0)

    @capture_outputs
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
    ) -> ScGPTOutput:
        r"""
        Inputs and errors as in [`PerturbationPreTrainedModel`], and of genetic perturbations doses other than 1 are an
        error, as are features other than 0 and 1: a gene is flagged or not. Context and batch are read from the control
        cells.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        sentences, size, _ = control_cells.shape
        # Padded cells are left out from the start: they cost nothing, and BatchNorm never sees them.
        real = None if cell_mask is None else cell_mask.flatten().nonzero().squeeze(1)

        def of_cells(values: torch.Tensor) -> torch.Tensor:
            """(B, 1, n) or (B, S, n), of sentences or cells, to (real cells, n)."""
            values = values.expand(-1, size, -1).flatten(0, 1)
            return values if real is None else values[real]

        perturbation = (perturbation_ids, perturbation_doses, perturbation_features)
        cells, flags = of_cells(control_cells), of_cells(self._flags(*perturbation))
        drugs = None
        if self.config.perturbation_type == "chemical":
            drugs = of_cells(self.drug_encoder(*perturbation))
        if self.training:
            genes = self._draw_genes(flags)
            predicted = self._predict(cells[:, genes], genes, flags[:, genes], drugs, **kwargs)
        else:
            genes = None
            predicted = self._predict_all(cells, flags, drugs, **kwargs)
            if self.config.nonnegative_output:
                predicted = nn.functional.relu(predicted)
        if real is not None:
            predicted = predicted.new_zeros(sentences * size, predicted.shape[-1]).index_copy(0, real, predicted)
        return ScGPTOutput(predictions=predicted.view(sentences, size, -1), gene_indices=genes)

    def _flags(self, ids, doses, features) -> torch.Tensor:
        """Which genes are perturbed: (B, 1, G) or (B, S, G) bool. None of them where perturbations are chemical."""
        given = ids if features is None else features
        if self.config.perturbation_type == "chemical":
            return torch.zeros(len(given), 1, self.config.input_dim, dtype=torch.bool, device=given.device)
        genes = torch.tensor(self.config.perturbed_genes, device=given.device)
        if features is None:
            known = ids >= 0
            if doses is not None and (doses[known] != 1).any():
                raise ValueError(
                    "a perturbed gene is flagged or not: expected perturbation_doses of 1, found "
                    f"{doses[known & (doses != 1)][:5].tolist()}; use doses with perturbation_type='chemical'"
                )
            # What pads goes to a column of its own, which is dropped.
            columns = torch.where(known, genes[ids.clamp(min=0)], self.config.input_dim)
            flags = torch.zeros(len(ids), self.config.input_dim + 1, dtype=torch.bool, device=ids.device)
            return flags.scatter(1, columns, True)[:, None, :-1]
        if ((features != 0) & (features != 1)).any():
            raise ValueError(
                "a perturbed gene is flagged or not: expected perturbation_features of 0 and 1, found others; use them with "
                "perturbation_type='chemical'"
            )
        features = features if features.dim() == 3 else features.unsqueeze(1)
        flags = features.new_zeros(*features.shape[:2], self.config.input_dim)
        return flags.index_add(2, genes, features) > 0

    def _draw_genes(self, flags: torch.Tensor) -> torch.Tensor:
        """Positions of the genes of a training step, in order: those that are perturbed in the batch, and random ones."""
        number = min(self.config.genes_per_step, self.config.input_dim)
        scores = torch.rand(self.config.input_dim, device=flags.device) + flags.any(dim=0)
        return scores.topk(number).indices.sort().values

    def _predict(self, values, genes, flags, drugs, **kwargs) -> torch.Tensor:
        """
        Expression (n, g) of g genes of n cells that see one another, from

        values (n, g), genes (g,) their positions, flags (n, g) bool, drugs (n, hidden_size) or None.
        """
        tokens = self.gene_norm(self.gene_embedding(genes)) + self.value_encoder(values)
        tokens = tokens + self.flag_embedding(flags.long())
        if drugs is not None:
            tokens = tokens + drugs.unsqueeze(1)
        tokens = self.norm(tokens)
        for layer in self.layers:
            tokens = layer(tokens, **kwargs)
        return self.head(tokens).squeeze(-1)

    def _predict_all(self, cells, flags, drugs, **kwargs) -> torch.Tensor:
        """Expression (n, G) of all genes, as `genes_per_chunk` and `tokens_per_pass` say."""
        config = self.config
        together = min(config.genes_per_chunk or config.input_dim, config.input_dim)
        in_groups = together < config.input_dim
        rows_per_pass = max(1, config.tokens_per_pass // together)
        recorded = kwargs.get("output_hidden_states", config.output_hidden_states)
        if recorded or kwargs.get("output_attentions", config.output_attentions):
            if in_groups:
                raise ValueError(
                    "output_hidden_states and output_attentions are of all genes at once: expected genes_per_chunk=None, "
                    f"found {config.genes_per_chunk}; set it to None, or leave these options out"
                )
            rows_per_pass = len(cells)
        predict = self._predict_in_groups if in_groups else self._predict
        genes = torch.arange(config.input_dim, device=cells.device)
        passes = [
            predict(cells[rows], genes, flags[rows], None if drugs is None else drugs[rows], **kwargs)
            for rows in (slice(start, start + rows_per_pass) for start in range(0, len(cells), rows_per_pass))
        ]
        return torch.cat(passes)

    def _predict_in_groups(self, values, genes, flags, drugs, **kwargs) -> torch.Tensor:
        """
        As `_predict`, where genes see those of their own group alone.

        Each group also holds the perturbed genes; a group without them could not tell that there is a perturbation. Cells
        that differ in these are computed apart, so that no cell's prediction depends on the other cells. A perturbed gene's
        own prediction is that of the last group.
        """
        predicted = values.new_empty(values.shape, dtype=self.gene_embedding.weight.dtype)
        patterns, pattern_of = flags.unique(dim=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            rows = (pattern_of == number).nonzero().squeeze(1)
            perturbed, others = genes[pattern], genes[~pattern]
            of_rows = None if drugs is None else drugs[rows]
            size = given("genes_per_chunk", self.config.genes_per_chunk) - len(perturbed)
            for group in others.split(max(1, size)):
                together = torch.cat([perturbed, group])
                part = self._predict(values[rows][:, together], together, flags[rows][:, together], of_rows, **kwargs)
                predicted[rows[:, None], together] = part.to(predicted.dtype)
        return predicted


__all__ = ["ScGPTForPerturbation", "ScGPTOutput"]
