"""The State transition model: S control cells and a perturbation in, S perturbed cells out."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from .configuration_state import StateConfig
from .modeling_perturbation import (
    MLP,
    ConfidenceHead,
    GeneDecoder,
    PerturbationEncoder,
    PerturbationOutput,
    PerturbationPreTrainedModel,
    SetAttention,
    SetTransformer,
    SetTransformerLayer,
)


class StatePreTrainedModel(PerturbationPreTrainedModel):
    config_class = StateConfig
    _no_split_modules = ["SetTransformerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SetTransformerLayer, "attentions": SetAttention}


class StateForPerturbation(StatePreTrainedModel):
    r"""
    The State transition model: a transformer over the cells of a sentence, without positions.

    Permuting the cells of a sentence permutes the predictions and changes nothing else; padded cells (False in
    `cell_mask`) change nothing for the real ones (with the default `attention` and `positions`).

    Args:
        config ([`StateConfig`]): sizes and options. One of `num_perturbations` and `perturbation_dim` must be set.

    Example:
    ```python
    >>> import torch
    >>> from cellstate import StateConfig, StateForPerturbation

    >>> config = StateConfig.from_preset("tiny", input_dim=100, num_perturbations=5)
    >>> model = StateForPerturbation(config)
    >>> outputs = model(control_cells=torch.rand(2, 32, 100), perturbation_ids=torch.tensor([[3], [4]]))
    >>> tuple(outputs.predictions.shape)
    (2, 32, 100)
    ```
    """

    # One step in this many trains a detached gene decoder on the true latents instead of the predicted ones.
    true_latents_every = 10

    def __init__(self, config: StateConfig):
        super().__init__(config)
        if config.num_perturbations is None and config.perturbation_dim is None:
            raise ValueError(
                "StateConfig needs num_perturbations (perturbations by id) or perturbation_dim (by features) "
                "to build a model, found neither"
            )
        hidden, act, dropout = config.hidden_size, config.hidden_act, config.hidden_dropout
        self.perturbation_encoder = PerturbationEncoder(
            config.num_perturbations or config.perturbation_dim, hidden, config.num_encoder_layers, act, dropout
        )
        cell_layers = config.num_encoder_layers if config.basal_encoder == "mlp" else 1
        self.cell_encoder = MLP(config.input_dim, hidden, hidden, cell_layers, act, dropout)
        if config.batch_encoder:
            self.batch_embedding = nn.Embedding(config.num_batches, hidden)
        if config.batch_token:
            self.batch_token = nn.Parameter(torch.empty(1, 1, hidden))
            self.batch_head = nn.Linear(hidden, config.num_batches)
        if config.confidence_token:
            self.confidence_token = nn.Parameter(torch.empty(1, 1, hidden))
            self.confidence_head = ConfidenceHead(hidden, dropout)
        self.backbone = SetTransformer(config)
        self.output_head = MLP(hidden, hidden, config.output_dim, config.num_decoder_layers, act, dropout)
        if config.output_adapter:
            bottleneck = config.output_dim // 8
            self.output_adapter = nn.Sequential(
                nn.Linear(config.output_dim, bottleneck), nn.GELU(), nn.Linear(bottleneck, config.output_dim)
            )
        if config.gene_dim is not None:
            self.gene_decoder = GeneDecoder(
                config.output_dim,
                config.decoder_hidden_sizes,
                config.gene_dim,
                config.decoder_dropout,
                config.residual_decoder,
            )
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, StateForPerturbation):
            if self.config.batch_token:
                init.normal_(module.batch_token, std=self.config.initializer_range)
            if self.config.confidence_token:
                init.normal_(module.confidence_token, std=self.config.initializer_range)
        # Not where the whole model is initialised: transformers passes over a custom module without parameters of its own.
        if module is self.output_head.layers[-1] and self.config.residual == "output":
            init.zeros_(module.weight)

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
    ) -> PerturbationOutput:
        r"""
        Args:
            control_cells (`torch.Tensor` of shape `(batch_size, set_size, input_dim)`):
                Unperturbed cells: log1p expression in the order of the processor's genes, or an embedding.
            perturbation_ids (`torch.LongTensor` of shape `(batch_size, num_together)`, *optional*):
                The perturbations applied together in each sentence, padded with -1; all -1 is the control.
                One of this and `perturbation_features` is required.
            perturbation_doses (`torch.Tensor` of shape `(batch_size, num_together)`, *optional*):
                Weight of each perturbation, 1 where not given.
            perturbation_features (`torch.Tensor` of shape `(batch_size, P)` or `(batch_size, set_size, P)`, *optional*):
                Features of the perturbation, `P` being `perturbation_dim`, or a multi-hot vector of
                `num_perturbations`.
            context_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Part of the shared interface. This model reads the context from the control cells.
            batch_ids (`torch.LongTensor` of shape `(batch_size, set_size)`, *optional*):
                Experimental batch of each cell; required with `batch_encoder`.
            cell_mask (`torch.BoolTensor` of shape `(batch_size, set_size)`, *optional*):
                False where a short sentence is padded.
            labels (`torch.Tensor` of shape `(batch_size, set_size, output_dim)`, *optional*):
                Observed perturbed cells. The loss is the objective's business; forward itself reads them only where
                `detach_decoder` trains the gene decoder on true latents.
            gene_labels (`torch.Tensor` of shape `(batch_size, set_size, gene_dim)`, *optional*):
                Observed expression; read by the objective alone.

        Returns:
            [`PerturbationOutput`]

        Raises:
            ValueError: a shape or combination of inputs does not fit the config.
            TypeError: an input has an unknown name.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        config = self.config
        encoded_cells = self.cell_encoder(control_cells)
        hidden = encoded_cells + self.perturbation_encoder(perturbation_ids, perturbation_doses, perturbation_features)
        if config.batch_encoder:
            if batch_ids is None:
                raise ValueError("batch_encoder=True needs batch_ids, found None")
            # In training, every batch is known; looking would wait for the device at each step.
            if not self.training and (batch_ids < 0).any():
                raise ValueError(
                    "batch_ids holds -1, a batch that was not seen in training; batch_encoder=True has no embedding for "
                    "it: give the cells the name of a known batch, or use a model without batch_encoder"
                )
            hidden = hidden + self.batch_embedding(batch_ids)

        tokens, mask = [hidden], cell_mask
        if config.batch_token:
            tokens.insert(0, self.batch_token.expand(len(hidden), -1, -1))
        if config.confidence_token:
            tokens.append(self.confidence_token.expand(len(hidden), -1, -1))
        if mask is not None:
            mask = nn.functional.pad(mask.bool(), (int(config.batch_token), int(config.confidence_token)), value=True)
        transformed = self.backbone(torch.cat(tokens, dim=1) if len(tokens) > 1 else hidden, mask, **kwargs)

        first = int(config.batch_token)
        cells = transformed[:, first : first + control_cells.shape[1]]
        if config.residual == "hidden":
            cells = cells + encoded_cells
        predictions = self.output_head(cells)
        if config.residual == "output":
            predictions = predictions + control_cells
        if config.output_adapter:
            predictions = self.output_adapter(predictions)
        if config.nonnegative_output:
            predictions = nn.functional.relu(predictions)

        return PerturbationOutput(
            predictions=predictions,
            gene_predictions=self._decode_genes(predictions, labels) if config.gene_dim is not None else None,
            confidence=self.confidence_head(transformed[:, -1]) if config.confidence_token else None,
            batch_logits=self.batch_head(transformed[:, 0]) if config.batch_token else None,
        )

    def _decode_genes(self, predictions: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if not self.config.detach_decoder:
            return self.gene_decoder(predictions)
        latents = predictions.detach()
        if self.training and labels is not None and torch.rand(()) < 1 / self.true_latents_every:
            latents = labels.to(latents.dtype)
        return self.gene_decoder(latents)


StateForPerturbation.register_for_auto_class("AutoModel")

__all__ = ["StateForPerturbation", "StatePreTrainedModel"]
