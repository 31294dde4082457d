"""A question to a model, and its answer: the predicted cells, what changed, and what is known of how right that is."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pertstate.app.cells import Reading
from pertstate.base.doses import dose_text
from pertstate.base.messages import closest, counted
from pertstate.data.reading import naming, read_h5ad
from pertstate.evaluation.bootstrap import bootstrap_weights, generator_of
from pertstate.evaluation.confidence import calibration
from pertstate.evaluation.expected_error import expected_error_worth
from pertstate.evaluation.group_scores import is_log1p
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.predicted_file import ROWS, OutputLayout
from pertstate.evaluation.prediction import predict
from pertstate.evaluation.report_data import places_of
from pertstate.evaluation.summary import Resampled, changes
from pertstate.hub.trained import TrainedModel


# Control cells of one answer: with so many, the page answers in seconds, and intervals are narrow.
MOST_CELLS = 2000
SEED = 0


@dataclass(frozen=True)
class Question:
    """
    What somebody asks for on the page.

    Args:
        cells: the file of control cells.
        perturbation (`str`): a name, or several with the separator of the model between them.
        second (`str`): a perturbation that is applied together with it; may be empty.
        context (`str`): the context whose control cells are used.
        dose (`float`, *optional*): for a model that knows doses, the dose of every perturbation.
        at_most (`int`): this many control cells, drawn at random.
        reading ([`Reading`]): how the file is read.
    """

    cells: str | os.PathLike
    perturbation: str
    context: str
    second: str = ""
    dose: float | None = None
    at_most: int = 500
    reading: Reading = Reading()


@dataclass(frozen=True)
class Answer:
    """
    What the model predicts.

    Args:
        file (`Path`): the predicted cells, and before them the control cells; an AnnData.
        context, perturbation (`str`): what was predicted, with its canonical name.
        cells (`int`): how many cells were predicted.
        changes (`pandas.DataFrame`): of each gene `gene` and the columns of [`changes`], the largest changes first.
        status (`str`): what the record says of the group: its split, `not in its data`; empty where there is no record.
        unseen (`bool`): the model has no training cells of the perturbation or of the context.
        confidence (`float`, *optional*): what the model says of its own loss; lower is better.
    """

    file: Path
    context: str
    perturbation: str
    cells: int
    changes: pd.DataFrame
    status: str
    unseen: bool
    confidence: float | None


def perturbations_of(trained: TrainedModel) -> list[str]:
    """The perturbations that a model can be asked for by name."""
    vectors = trained.processor.perturbation_features
    return list(trained.processor.vocabulary.perturbations if vectors is None else vectors.names)


def doses_of(trained: TrainedModel, perturbation: str) -> list[str]:
    """The doses of a perturbation in training, as text."""
    known = trained.processor.doses or {}
    return [dose_text(dose) for dose in sorted(known.get(perturbation, ()))]


def check_model(trained: TrainedModel):
    """ValueError for a model that does not predict from control cells."""
    if trained.model.is_ceiling:
        raise ValueError(
            f"{trained.name} decodes observed cells (the ceiling of decoding) and predicts nothing from control cells; name a model "
            "that predicts"
        )


def name_asked(trained: TrainedModel, question: Question) -> str:
    """
    The canonical name of the perturbation that is asked for, with its dose.

    Raises:
        KeyError: the model does not know a perturbation.
        ValueError: none is named, or it is the control; two are named and the model knows no combinations; a dose is missing,
            or the model knows none.
    """
    processor, separator = trained.processor, trained.processor.combination_separator
    parts = [part.strip() for part in (question.perturbation, question.second) if part and part.strip()]
    if not parts:
        raise ValueError("no perturbation is chosen; choose one, or write its name")
    if len(parts) > 1 and separator is None:
        raise ValueError(f"this model knows no combinations, found {parts[0]!r} and {parts[1]!r}; choose one of them")
    known = perturbations_of(trained)
    for part in (of for text in parts for of in processor.split_combination(text)):
        if part not in known:
            raise KeyError(f"perturbation {part!r} is not known to the model; {closest(part, known)}")
    [name] = processor.named((separator or "").join(parts), None if question.dose is None else [question.dose])
    if name == processor.control:
        raise ValueError(f"{parts[0]!r} is the control; choose a perturbation")
    processor.encode([name])
    return name


def answer(trained: TrainedModel, question: Question, folder: str | os.PathLike) -> Answer:
    """
    Answer a question.

    Args:
        trained ([`TrainedModel`]): the model.
        question ([`Question`]): what is asked.
        folder: where to write the predicted cells; nobody else writes there.

    Raises:
        KeyError, ValueError, FloatingPointError, OSError: see [`name_asked`] and [`predict`]. The file of the question is named by
            the last part of its path.
    """
    if not 1 <= question.at_most <= MOST_CELLS:
        raise ValueError(f"expected 1 to {MOST_CELLS:,} control cells, found {question.at_most}")
    if not question.context:
        raise ValueError("no context is chosen; choose the context of the control cells, or write its name")
    check_model(trained)
    name, output = name_asked(trained, question), Path(folder) / "predicted.h5ad"
    confidences: dict[tuple[str, str], float] = {}
    with naming(os.path.basename(question.cells)):
        done = predict(
            trained.model,
            trained.processor,
            question.cells,
            output,
            perturbations=[name],
            contexts=[question.context],
            cells_per_perturbation=question.at_most,
            seed=SEED,
            checkpoint=trained.name,
            quiet=True,
            reading=question.reading.given_keys,
            all_are_controls=question.reading.all_are_controls,
            missing_genes="zero" if question.reading.missing_genes else "error",
            convert_scale=question.reading.convert_scale,
            overwrite=True,
            layout=OutputLayout(controls=ROWS),
            confidences=confidences,
        )
    controls, predicted, genes = cells_of(output, done["cells"])
    log1p = is_log1p(trained.processor, trained.model.config.gene_dim is not None)
    weights = bootstrap_weights(generator_of(SEED, question.context), done["cells"])
    found, of_controls = Resampled(weights, log1p), Resampled(weights, log1p)
    found.add(predicted)
    of_controls.add(controls)
    table = pd.DataFrame({"gene": genes, **changes(found, of_controls)})
    order = np.argsort(-table["change"].abs().to_numpy(), kind="stable")
    origin = trained.processor.origin
    said = {} if origin is None else origin.describe([(question.context, name)]).get("groups", {})
    return Answer(
        output,
        question.context,
        name,
        done["cells"],
        table.iloc[order].reset_index(drop=True),
        said.get(question.context, {}).get(name, ""),
        done["unseen"] > 0,
        confidences.get((question.context, name)),
    )


def cells_of(file: Path, number: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The control cells and the predicted cells of an answer, `(cells, genes)` each and in the same order, and the genes."""
    adata = read_h5ad(file)
    return adata.X[:-number], adata.X[-number:], adata.var_names.tolist()


def cell_places(found: Answer, umap: bool) -> pd.DataFrame | None:
    """The control cells and the predicted cells of an answer in two dimensions, see [`places_of`]."""
    controls, predicted, _ = cells_of(found.file, found.cells)
    return places_of({"control": controls, "predicted": predicted}, umap=umap)


def how_sure(trained: TrainedModel, found: Answer) -> list[str]:
    """
    What is known of how right an answer is, in sentences: whether the group was trained on, the scores of the run for it, and the
    confidence of the model with what it was measured to be worth.
    """
    said = [_of_record(found)]
    if found.unseen:
        said.append(
            "The model has no training cells of the perturbation or of the context; its card says how it predicts these."
        )
    new = trained.processor.unseen_doses([found.perturbation])
    if new:
        said.append("No training cell had this dose.")
    scores = trained.scores
    if scores is not None and len(scores.table):
        here = scores.table[
            (scores.table["context"] == found.context)
            & (scores.table["perturbation"] == found.perturbation)
            & (scores.table["method"] == MODEL)
        ]
        for row in here.itertuples():
            said.append(
                f"The run scored this group on {counted(int(row.real_cells), 'real cell')}: Pearson correlation of the mean change "
                f"{row.pearson:.3f}, energy distance {row.energy:.4f}."
            )
    return [*said, *_of_expected_error(trained, found), *_of_confidence(trained, found)]


def _of_record(found: Answer) -> str:
    group = f"{found.perturbation} in {found.context}"
    if not found.status:
        return f"Whether the model was trained on {group} is not recorded."
    if found.status == "train":
        return f"The model was trained on real cells of {group}: this answer recalls more than it predicts."
    told = {"val": "held out, and used to choose when to stop", "test": "held out for the test"}
    return f"{group}: {told.get(found.status, found.status)}."


def _of_expected_error(trained: TrainedModel, found: Answer) -> list[str]:
    intervals = None if trained.record is None else trained.record.intervals
    if intervals is None:
        return []
    genes = pd.Index(trained.processor.output_names(len(intervals.spread)))
    own = intervals.of_features(genes.get_indexer(found.changes["gene"]))
    expected = float(own.expected_mae(found.changes["change"].to_numpy(), found.cells, found.cells))
    said = (
        f"From {counted(intervals.groups, 'training group')} that the run held out, a mean absolute error of {expected:.4f} is to be expected of these "
        f"changes, where as many cells are measured."
    )
    worth = None if trained.scores is None else expected_error_worth(trained.scores.table)
    return [said] if worth is None else [said, f"What that is worth: {str(worth).partition(': ')[2]}"]


def _of_confidence(trained: TrainedModel, found: Answer) -> list[str]:
    if found.confidence is None:
        return ["The model gives no confidence."]
    said = f"The model expects a loss of {found.confidence:.4g} (in its own units; less is better)."
    line = None if trained.record is None else trained.record.calibration
    if line is not None:
        said += f" From {line.groups:,} validation groups, an energy distance of {line.expected(found.confidence):.4f} is to be expected."
    measured = None if trained.scores is None else calibration(trained.scores.table)
    if measured is None or np.isnan(measured[1]):
        return [said, "What this figure is worth was not measured: the checkpoint has no scores that say."]
    rows, correlation = measured
    higher = float((rows["confidence"] > found.confidence).mean())
    kind = "groups that were trained on" if (rows["seen"] != "").all() else "held-out groups"
    return [
        f"{said} That is less than for {100 * higher:.0f} % of the {len(rows):,} scored {kind}.",
        f"What this figure is worth: on these {len(rows):,} groups its rank correlation with the energy distance that was found is "
        f"{correlation:.2f} (1: it orders the groups as their errors do; 0: it says nothing; below 0: the other way round).",
    ]
