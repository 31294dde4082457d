"""Predictions of a model for groups of real cells, in memory. `pertstate predict` makes the same ones from a file."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from pertstate.base.cell_sentences import SentenceLayout
from pertstate.base.constants import BATCH_IDS, CONTEXT_IDS, CONTROL_CELLS, LABELS
from pertstate.base.finite import check_predicted
from pertstate.base.messages import given
from pertstate.evaluation.prediction import check_batches, check_perturbations, counted_elsewhere
from pertstate.evaluation.scoring import MAX_CELLS, Group, Predicted, RealCells
from pertstate.processing import StateProcessor


def predicted_groups(
    model,
    processor: StateProcessor,
    real: RealCells,
    groups: list[Group],
    seed: int = 0,
    max_cells: int | None = MAX_CELLS,
    batch_size: int = 8,
) -> Iterator[tuple[Group, Predicted]]:
    """
    Predict each group from the control cells of its context, in the order in which they are drawn. A model that is a ceiling
    is given the real cells of the group instead. Runs and `evaluate` both call this to score a model.

    Args:
        model ([`PerturbationPreTrainedModel`]): on any device; it is put into evaluation mode.
        processor ([`StateProcessor`]): the processor of the model.
        real ([`RealCells`]): the real cells, with `inputs`.
        groups (`list[Group]`): dataset, context and perturbation of each.
        seed (`int`), max_cells (`int`, *optional*): the seed with which cells are drawn, and the largest number of cells of a
            group; None takes all.
        batch_size (`int`): full sentences in one forward pass.

    Returns:
        Iterator of each group with its predicted cells, in the units of predictions.

    Raises:
        ValueError: the model uses batches, and was not trained on those of some control cells.
        UnseenPerturbationError: the model cannot predict a perturbation; the error names it.
        FloatingPointError: a prediction is NaN or infinite.
    """
    model.eval()
    names = list(dict.fromkeys(perturbation for _, _, perturbation in groups))
    if not names:
        return
    encoded = processor.encode(names)
    check_perturbations(model, encoded, processor)
    of_name = {name: {key: values[i : i + 1] for key, values in encoded.items()} for i, name in enumerate(names)}
    place, cells, batches, of_context = None, np.zeros((0, 0)), None, {}
    for group in groups:
        dataset, context, perturbation = group
        source = group if model.is_ceiling else (dataset, context, processor.control)
        if source != place:
            rows = real.rows(source, seed, max_cells)
            inputs = given("inputs", real.inputs)
            cells, place = inputs(rows), source
            of_context = processor.control_values([source], inputs, lambda of: real.rows(of, seed, None), {})
            batches = None
            if real.batches is not None and processor.batch_key is not None:
                known = real.batches(rows)
                if model.config.embeds_batches:
                    check_batches(processor, known)
                batches = processor.encode_batches(known)
        encoded_group = {**of_name[perturbation], **of_context}
        found, confidence = _predict(model, processor, cells, batches, context, encoded_group, batch_size)
        names_of_features = processor.vocabulary.genes or processor.output_names(found.shape[1])
        check_predicted(found, names_of_features, partial(_named, context, perturbation))
        yield group, Predicted(found, not model.is_ceiling, confidence)


def _named(context: str, perturbation: str, row: int) -> str:
    return f"{context} / {perturbation} (cell {row})"


def _predict(model, processor, cells, batches, context, encoded, batch_size) -> tuple[np.ndarray, float | None]:
    """The predicted cells of one group, and the mean confidence of its sentences."""
    sentences = processor.cut(np.arange(len(cells)))
    found, confidences = [], []
    for start in range(0, len(sentences), batch_size):
        taken = sentences[start : start + batch_size]
        layout, rows = SentenceLayout([len(of) for of in taken]), np.concatenate(taken)
        batch = {
            CONTROL_CELLS: layout.spread(cells[rows]),
            CONTEXT_IDS: np.repeat(processor.encode_contexts([context]), len(taken)),
            **{key: np.repeat(value, len(taken), axis=0) for key, value in encoded.items()},
        }
        if batches is not None:
            batch[BATCH_IDS] = layout.spread(batches[rows])
        tensors = {key: value.to(model.device) for key, value in layout.batch(batch, masked=True).items()}
        if model.is_ceiling:
            tensors[LABELS] = tensors[CONTROL_CELLS]
        with torch.inference_mode(), counted_elsewhere():
            outputs = model(**tensors)
        values = outputs.predictions if outputs.gene_predictions is None else outputs.gene_predictions
        found.append(values.float().cpu().numpy()[layout.mask])
        if outputs.confidence is not None:
            confidences += outputs.confidence.float().cpu().tolist()
    return np.concatenate(found), float(np.mean(confidences)) if confidences else None
