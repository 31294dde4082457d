"""Predicted cells of one file against the real cells of another, beside the baselines."""

import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from pertstate.base.constants import Values
from pertstate.base.files import whole_file
from pertstate.base.labels import control_settings
from pertstate.base.outputs import claimed_file
from pertstate.base.tables import check_table, table_text, write_csv
from pertstate.data.cells import sort_into_groups
from pertstate.data.reading import AnnDataFile
from pertstate.evaluation.metrics import (
    ADDITIVE,
    CEILING_MODEL,
    METRICS,
    MODEL,
    PERTURBATION_MEAN,
    AsPredicted,
    Controls,
    MeanChanges,
    average,
    score_group,
)
from pertstate.processing import StateProcessor, Vocabulary


def evaluate(
    predicted: str | os.PathLike,
    real: str | os.PathLike,
    train: str | os.PathLike,
    quiet: bool = False,
    convert_scale: bool = False,
    max_controls: int | None = None,
    seed: int = 0,
    **keys,
) -> tuple[pd.DataFrame, list[str]]:
    """
    Score predicted cells of each (context, perturbation) against the real ones.

    All methods are judged on the same real cells, and every change is measured from the mean of the same real control
    cells. The baselines learn from `train`. It may be the whole screen: those of its cells that are among the evaluated
    real cells, by barcode and labels, are left out.

    Args:
        predicted: `.h5ad` that `pertstate predict` wrote, or one with the same layout.
        real: `.h5ad` with the real perturbed and control cells.
        train: `.h5ad` with the cells that the model was trained on.
        quiet (`bool`): no progress bar.
        max_controls (`int`, *optional*): at most so many control cells of each context, drawn with `seed`; by default all.
            The time grows with the square of their number.
        seed (`int`): of this draw.
        convert_scale (`bool`): convert log1p values of `real` and `train` whose cells sum to another total than the model's.
        keys: `perturbation_key`, `context_key`, `context`, `control`, `input`, `normalize`: how to read the real files, where
            they are not as `predicted` says.

    Returns:
        `(DataFrame, list[str])`: one row for each context, perturbation and method, with the columns of `METRICS` and
        the numbers of cells, and at the end the averages (context and perturbation `"mean"`); and notes on what was left
        out.

    Raises:
        ValueError, KeyError, FileNotFoundError: see [`AnnDataFile`] and [`StateProcessor`]; or there is nothing to
            compare.
    """
    notes: list[str] = []
    with AnnDataFile(predicted) as guess, AnnDataFile(real) as truth, AnnDataFile(train) as training:
        reader, processor = readers_of(guess, keys)
        of_training = readers_of(guess, keys)[1]
        processor.check_scale(truth, convert=convert_scale)
        of_training.check_scale(training, convert=convert_scale)
        ceiling = guess.uns.get("pertstate", {}).get("ceiling")
        if ceiling is not None:
            notes.append(f"the figures of {CEILING_MODEL!r} are no prediction's: {predicted} was {ceiling}")
        scored = reader.labels(guess), processor.labels(truth)
        pairs = [tuple(pair) for pair in scored[0][["context", "perturbation"]].dropna().drop_duplicates().to_numpy()]
        there = set(map(tuple, scored[1][["context", "perturbation"]].dropna().drop_duplicates().to_numpy()))
        common = [pair for pair in pairs if pair in there and pair[1] != processor.control]
        missing = [" / ".join(pair) for pair in pairs if pair not in there]
        if not common:
            raise ValueError(
                f"no (context, perturbation) of {predicted} is in {real}: predicted {missing[:5]}, real "
                f"{[' / '.join(pair) for pair in sorted(there)[:5]]}"
            )
        if missing:
            notes.append(f"{len(missing)} predicted groups have no real cells and are not scored: {missing[:10]}")

        labels = of_training.labels(training)
        # The barcode alone does not tell which cell it is: files often number their cells from 0.
        real_cells, train_cells = (
            pd.MultiIndex.from_arrays([frame["context"], frame["perturbation"], frame.index])
            for frame in (scored[1], labels)
        )
        evaluated = real_cells.droplevel(2).isin(common)
        seen = train_cells.isin(real_cells[evaluated])
        if seen.any():
            notes.append(f"{int(seen.sum())} cells of {train} are among the real cells that are scored: left out of it")
        rows = np.flatnonzero(~seen & labels["perturbation"].notna().to_numpy())
        order, groups = sort_into_groups(labels.iloc[rows].assign(dataset=""))
        changes = MeanChanges.fit(
            AsPredicted(_Rows(of_training, training, rows[order]), processor),
            groups,
            processor.control,
            clip=processor.values != Values.EMBEDDING,
        )
        unseen = sorted({p for _, p in common if p not in changes.changes})
        if unseen:
            notes.append(
                f"{len(unseen)} perturbations are not in the training cells, so they have no row {PERTURBATION_MEAN!r}: {unseen[:10]}"
            )

        controls = processor.control_groups(scored[1], sorted({context for context, _ in common}))
        table, scores = [], []
        of_context: dict[str, Controls] = {}
        for context, perturbation in tqdm(common, unit="groups", desc="evaluate", disable=quiet):
            cells = {
                name: source.as_predicted(source.features(file, np.flatnonzero(_is(frame, context, perturbation))))
                for name, source, file, frame in (
                    ("predicted", reader, guess, scored[0]),
                    ("real", processor, truth, scored[1]),
                )
            }
            if context not in of_context:  # one context at a time: its groups need not follow one another
                drawn = np.random.default_rng(seed).permutation(controls[context])[:max_controls]
                rows_of_context = np.sort(drawn)
                of_context = {context: Controls(processor.as_predicted(processor.features(truth, rows_of_context)))}
            base = of_context[context]
            scores.append(
                score_group(
                    cells["predicted"],
                    cells["real"],
                    base,
                    perturbation,
                    processor.split_combination(perturbation),
                    changes,
                )
            )
            counts = {
                "predicted_cells": len(cells["predicted"]),
                "real_cells": len(cells["real"]),
                "control_cells": len(base.cells),
            }
            table += [
                {"context": context, "perturbation": perturbation, "method": method, **figures, **counts}
                for method, figures in scores[-1].items()
            ]
    for method in (PERTURBATION_MEAN, ADDITIVE):
        number = sum(method in of_group for of_group in scores)
        if 0 < number < len(scores):
            notes.append(
                f"the average of {method!r} is that of {number} of {len(scores)} groups: it knows nothing of the others"
            )
    table += [
        {"context": "mean", "perturbation": "mean", "method": method, **figures}
        for method, figures in average(scores).items()
    ]
    table = pd.DataFrame(table)
    if ceiling is not None:
        table["method"] = table["method"].replace(MODEL, CEILING_MODEL)
    return table, notes


def format_table(table: pd.DataFrame) -> str:
    """The table as aligned text, with a dash for an undefined correlation."""
    shown = table[["context", "perturbation", "method", *METRICS]].copy()
    for metric in METRICS:
        shown[metric] = [f"{value:.4f}" if value == value else "-" for value in shown[metric]]
    return table_text(shown)


def write_table(table: pd.DataFrame, output: str | os.PathLike, overwrite: bool = False):
    """
    Write `.csv` (see [`~pertstate.base.tables.write_csv`]) or `.json`, whole or not at all.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, InUseError: see [`claimed_table`].
        FloatingPointError: see [`~pertstate.base.tables.check_table`].
        OSError: the disk is full; the file is as it was.
    """
    with claimed_table(output, overwrite) as place:
        if Path(output).suffix == ".csv":
            return write_csv(table, place)
        check_table(table)
        records = json.loads(table.to_json(orient="records"))
        with whole_file(place) as partial:
            partial.write_text(json.dumps(records, indent=1), encoding="utf-8")


def claimed_table(output: str | os.PathLike, overwrite: bool) -> AbstractContextManager[Path]:
    """
    See [`claimed_file`]. One that [`write_table`] could not write is refused, before there is any work to lose.

    Raises:
        ValueError: the name does not end in `.csv` or `.json`.
    """
    if Path(output).suffix not in (".csv", ".json"):
        raise ValueError(f"--output {output}: expected a name that ends in .csv or .json")
    return claimed_file(output, overwrite)


@dataclass
class _Rows:
    """Features of some cells of a file, read when they are asked for."""

    processor: StateProcessor
    data: AnnDataFile
    rows: np.ndarray

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.processor.features(self.data, self.rows[part])


def readers_of(guess: AnnDataFile, keys: dict | None = None) -> tuple[StateProcessor, StateProcessor]:
    """Two processors: one reads predicted cells as they are, the other reads real cells in the same units and genes."""
    settings = {name: value for name, value in (keys or {}).items() if value is not None}
    if "control" in settings:
        settings |= control_settings(settings["control"])
    recorded = guess.uns.get("pertstate", {}).get("processor")
    if recorded is not None:
        settings = {**json.loads(str(recorded)), **settings}
    if settings.get("gene_input") is not None:
        # The expression that a gene decoder predicts is in X. The real expression is where the decoder's target was.
        settings |= {"input": settings["gene_input"], "gene_input": None, "values": Values.LOG1P}
    if settings.get("context") is not None:
        settings["context_key"] = None
    settings |= control_settings(settings.get("control", "control")) if "control_labels" not in settings else {}
    settings["batch_key"] = None
    if settings.get("values") == Values.EMBEDDING:
        settings |= {"vocabulary": Vocabulary(), "feature_dim": len(guess.var_names)}
    else:
        settings["vocabulary"] = Vocabulary(genes=[str(g) for g in guess.var_names])
    truth = StateProcessor(**settings)
    # The columns of predictions are those that were recorded, whatever those of the real cells are. Their values are not
    # checked: a model's counts are not whole numbers, and its expression may be negative.
    recorded_by = truth if recorded is None else StateProcessor(**json.loads(str(recorded)))
    as_they_are = StateProcessor(values=Values.EMBEDDING, feature_dim=len(guess.var_names), **recorded_by.of_output())
    return as_they_are, truth


def _is(frame: pd.DataFrame, context: str, perturbation: str) -> np.ndarray:
    return ((frame["context"] == context) & (frame["perturbation"] == perturbation)).to_numpy()
