"""The gene decoder alone, on the observed embeddings of perturbed cells: the ceiling of decoding."""

import torch

from ...base.modeling_perturbation import EncoderPreTrainedModel, PerturbationOutput
from .configuration_decoder_only import DecoderOnlyConfig


class DecoderOnlyForPerturbation(EncoderPreTrainedModel):
    r"""
    Passes the true target embeddings (`labels`) to the gene decoder, the only part that is trained. Its score is what a
    perfect predictor of embeddings would reach with such a decoder: a ceiling, not a prediction.

    Args:
        config ([`DecoderOnlyConfig`]): of the decoder.
    """

    config: DecoderOnlyConfig
    config_class = DecoderOnlyConfig
    is_ceiling = True
    _adapted_parts = ("gene_decoder",)

    def __init__(self, config: DecoderOnlyConfig):
        super().__init__(config)
        if config.gene_dim is None:
            raise ValueError(
                "DecoderOnlyConfig needs gene_dim, found None: this family decodes genes from embeddings; give the data "
                "an embedding as input (obsm/NAME) and gene_input"
            )
        self._make_gene_decoder()
        self.post_init()

    def vocabulary_axes(self) -> dict[str, dict[int, str]]:
        return self._decoder_axes()

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
        Inputs, output and errors as in [`PerturbationPreTrainedModel`], of which `labels`, embeddings of real perturbed
        cells, are read and required; `predictions` are these same embeddings.
        """
        self._check_inputs(
            control_cells, perturbation_ids, perturbation_doses, perturbation_features, batch_ids, cell_mask, kwargs
        )
        if labels is None:
            raise ValueError(
                "expected labels, the embeddings of real perturbed cells, found None: this model decodes what was "
                "observed (the ceiling of decoding) and predicts nothing from control cells"
            )
        return PerturbationOutput(predictions=labels, gene_predictions=self.gene_decoder(labels))


__all__ = ["DecoderOnlyForPerturbation"]
