"""What an evaluation found: the table, its averages with intervals, the verdict, and the mean changes behind them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pertstate.base.bounded_text import DAMAGED, LARGEST_TABLES, load_json
from pertstate.base.files import whole_file
from pertstate.base.messages import counted
from pertstate.base.outputs import Kind
from pertstate.base.tables import check_table, table_text, write_csv
from pertstate.data.record import RunRecord
from pertstate.evaluation.confidence import confidence_worth
from pertstate.evaluation.expected_error import expected_error_worth
from pertstate.evaluation.metrics import CEILING_MODEL, CELL_EVAL, METRICS, MODEL
from pertstate.evaluation.scoring import GroupResult
from pertstate.evaluation.verdict import compare, side_by_side


TABLE, SUMMARY, ARRAYS, MODELS = "scores.csv", "scores.json", "scores.safetensors", "models.csv"
# The figures of each resampling, which many scores are pooled by. They are large, and kept only where they are asked for.
RESAMPLINGS = "resamplings.safetensors"
SCORES = Kind("scores", (SUMMARY,), lambda name: name in (TABLE, SUMMARY, ARRAYS, RESAMPLINGS, MODELS))
_TEXTS = ("dataset", "context", "perturbation", "method", "reason", "seen", "model", "beside")
_CHANGES = ("control", "observed", "predicted")
_CELLS = ("control", "observed", "predicted")


@dataclass
class Scores:
    """
    The scores of a model and of the baselines.

    Args:
        table (`pandas.DataFrame`): one row for each group (context and perturbation, of a dataset where there are several)
            and method: `dataset`, `context`, `perturbation`, `method`, the [`METRICS`] and those of the [`FURTHER`] figures
            that were found (NaN if one is not defined),
            `reason` (why a method has no figures), `seen` (how the group was trained on; empty if it was not),
            `predicted_cells`, `real_cells`, `control_cells`, and `confidence` of the
            model, with `expected_energy`, the energy distance to expect at this confidence, if that was calibrated on validation groups;
            `expected_mae` of the model, where training groups were held out in turn, see [`ChangeIntervals`].
        averages (`pandas.DataFrame`): one row for each method and metric: `method`, `metric`, `value` (the mean over the groups
            that were not trained on), `low` and `high` (95 % interval), `groups` (how many are averaged) and `share` (only
            for the model: how far it goes from the best baseline, 0, to the ceiling, 1).
        verdict (`str`): what follows from the averages, in words, and what the confidence and the expected error are worth if there are some.
        models (`pandas.DataFrame`): this model beside others, see [`compare_models`]; empty if there are none.
        notes (`list[str]`): sentences that say what was left out and what else must be known.
        genes (`list[str]`): names of the features.
        groups (`list[tuple[str, str, str]]`): dataset, context and perturbation of each group, in the order of `changes`.
        changes (`dict[str, np.ndarray]`): `control`, `observed` and `predicted`, the means of the cells of each group, `(groups,
            features)` float32; `predicted` is absent if only baselines were scored.
        cells (`dict[str, np.ndarray]`): `control`, `observed` and `predicted`, some cells of each group, `(cells, features)`
            float32, and `control_group`, `observed_group` and `predicted_group`, the number of the group of each.
        settings (`dict`): settings of the evaluation: number of cells, seed, ..
        record (`dict`): what the model was trained on, see [`~pertstate.data.record.RunRecord`]; empty if it is not known.
        results (`list[GroupResult]`): the averaged groups with their resamplings, which two models are compared by, see
            [`against`]. They are saved only where that is asked for.
    """

    table: pd.DataFrame
    averages: pd.DataFrame
    verdict: str
    notes: list[str] = field(default_factory=list)
    genes: list[str] = field(default_factory=list)
    groups: list[tuple[str, str, str]] = field(default_factory=list)
    changes: dict[str, np.ndarray] = field(default_factory=dict)
    cells: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    results: list[GroupResult] = field(default_factory=list, repr=False)
    models: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __repr__(self) -> str:
        return "\n".join([*(f"note: {note}" for note in self.notes), format_scores(self)])

    def value(self, method: str, metric: str) -> float:
        """The average of a method in a metric. NaN if there is none."""
        found = self.averages.query("method == @method and metric == @metric")["value"]
        return float(found.iloc[0]) if len(found) else float("nan")

    def save(self, folder: str | os.PathLike, resamplings: bool = False):
        """
        Write `scores.csv`, `scores.json` and `scores.safetensors`, and `models.csv` if models were compared, each whole or not at
        all.

        Args:
            folder: where to.
            resamplings (`bool`): write `results`, too: about 50 kB a group.

        Raises:
            FloatingPointError: see [`~pertstate.base.tables.check_table`].
            OSError: the disk is full, or the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(self.table, folder / TABLE)
        check_table(self.averages)
        arrays = {f"changes.{name}": np.ascontiguousarray(value) for name, value in self.changes.items()}
        arrays |= {f"cells.{name}": np.ascontiguousarray(value) for name, value in self.cells.items()}
        with whole_file(folder / ARRAYS) as partial:
            save_file(arrays, partial)
        worth, error = confidence_worth(self.table), expected_error_worth(self.table)
        if len(self.models):
            write_csv(self.models, folder / MODELS)
        summary = {
            "verdict": self.verdict,
            "notes": self.notes,
            "averages": _records(self.averages),
            "confidence": None if worth is None else worth.to_dict(),
            "expected_error": None if error is None else error.to_dict(),
            "models": _records(self.models),
            "table": _records(self.table),
            "genes": self.genes,
            "groups": [list(group) for group in self.groups],
            "settings": self.settings,
            "record": self.record,
        }
        if resamplings:
            places = {group: i for i, group in enumerate(self.groups)}
            figures = {
                f"{places[result.group]}.{method}": np.ascontiguousarray(values, dtype=np.float64)
                for result in self.results
                for method, values in result.figures.items()
            }
            with whole_file(folder / RESAMPLINGS) as partial:
                save_file(figures, partial)
        with whole_file(folder / SUMMARY) as partial:
            partial.write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Scores":
        """
        Read what `save` wrote.

        Raises:
            FileNotFoundError: there are no scores.
            ValueError: they are damaged.
        """
        path = Path(folder) / SUMMARY
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no scores: expected {SUMMARY}, which pertstate train and evaluate write"
            )
        try:
            summary = load_json(path, LARGEST_TABLES)
            arrays = load_file(Path(folder) / ARRAYS)
            table = _frame(
                summary["table"], ["dataset", "context", "perturbation", "method", "seen", "reason", *METRICS]
            )
            scores = cls(
                table=table,
                averages=_frame(summary["averages"], ["method", "metric", "value", "low", "high", "groups"]),
                verdict=str(summary["verdict"]),
                notes=[str(note) for note in summary["notes"]],
                genes=[str(gene) for gene in summary["genes"]],
                groups=[(str(a), str(b), str(c)) for a, b, c in summary["groups"]],
                changes={name: arrays[f"changes.{name}"] for name in _CHANGES if f"changes.{name}" in arrays},
                cells={
                    name: arrays[f"cells.{name}"]
                    for of in _CELLS
                    for name in (of, f"{of}_group")
                    if f"cells.{name}" in arrays
                },
                settings=dict(summary["settings"]),
                models=_frame(summary.get("models", []), []),
                record=RunRecord.from_dict(summary["record"]).to_dict() if summary["record"] else {},
            )
        except (*DAMAGED, OSError, SafetensorError) as error:
            raise ValueError(f"the scores in {folder} are damaged ({error!r}); evaluate again") from error
        if (Path(folder) / RESAMPLINGS).is_file():
            try:
                scores.results = _results(load_file(Path(folder) / RESAMPLINGS), scores)
            except (*DAMAGED, OSError, SafetensorError) as error:
                raise ValueError(f"{Path(folder) / RESAMPLINGS} is damaged ({error!r}); evaluate again") from error
        for name, values in scores.changes.items():
            if values.shape != (len(scores.groups), len(scores.genes)):
                raise ValueError(
                    f"the scores in {folder} are damaged: expected {name} of shape {(len(scores.groups), len(scores.genes))}, found "
                    f"{values.shape}; evaluate again"
                )
        return scores


def _results(figures: dict[str, np.ndarray], scores: Scores) -> list[GroupResult]:
    """The averaged groups with their resamplings, and the reasons that the table gives for absent figures."""
    found: dict[int, GroupResult] = {}
    for name, values in figures.items():
        place, _, method = name.partition(".")
        group = scores.groups[int(place)]
        if values.ndim != 2 or values.shape[1] != len(METRICS):
            raise ValueError(
                f"expected {len(METRICS)} figures of each resampling, found an array of shape {values.shape}"
            )
        found.setdefault(int(place), GroupResult(group, {}, {}, {}, {})).figures[method] = values
    by_group = scores.table.set_index(["dataset", "context", "perturbation"])
    for result in found.values():
        rows = by_group.loc[[result.group]]
        result.reasons.update({method: reason for method, reason in zip(rows["method"], rows["reason"]) if reason})
    return [found[place] for place in sorted(found)]


def against(first: Scores, second: Scores, names: tuple[str, str], seed: int = 0) -> str:
    """
    What the paired bootstrap says of two models, metric by metric. The resamplings of a group are the same for both, so both
    must have been scored on the same real cells, with the same number of cells and seed.

    Args:
        first, second ([`Scores`]): of the two models, as [`evaluate`] gives them. Groups that either was trained on are left out.
        names (`tuple[str, str]`): what the sentences call them.
        seed (`int`): of the resampling of groups.

    Raises:
        ValueError: they have no group in common, or were scored in different ways.
    """
    _check_alike(first, second, names)
    common = {result.group for result in first.results} & {result.group for result in second.results}
    if not common:
        raise ValueError(
            f"{names[0]} and {names[1]} have no scored group in common that neither was trained on; score both on the same groups"
        )
    left = len({result.group for result in (*first.results, *second.results)}) - len(common)
    said = compare(first.results, second.results, names, seed)
    return said if not left else f"{said} {left} groups that only one of them has are left out."


def _check_alike(first: Scores, second: Scores, names: tuple[str, str]):
    """ValueError if two models were not scored in the same way, on the same genes."""
    for name in ("real", "cells", "seed"):
        one, other = first.settings.get(name), second.settings.get(name)
        if one != other:
            raise ValueError(
                f"{names[0]} and {names[1]} were scored in different ways ({name}: {one} and {other}); score both alike"
            )
    if set(first.genes) != set(second.genes):
        raise ValueError(
            f"{names[0]} and {names[1]} were scored on different genes ({len(first.genes)} and {len(second.genes)}, "
            f"{len(set(first.genes) & set(second.genes))} in common), so their figures cannot be compared; predict cells with both, "
            "keep the common genes of both files, and compare the files"
        )


def compare_models(models: dict[str, Scores], seed: int = 0) -> pd.DataFrame:
    """
    Several models in one table, each beside the first by the paired bootstrap, on the groups that all of them predict.

    Args:
        models (`dict[str, Scores]`): the [`Scores`] of each model under its name, as [`evaluate`] gives them. Groups that any of
            them was trained on are left out.
        seed (`int`): of the resampling of groups.

    Returns:
        `pandas.DataFrame`: one row for each metric and model: `metric`, `model`, `value` with its 95 % interval `low` and `high`,
        `groups` (how many are averaged), `difference` (its value minus that of the first model) with `difference_low` and
        `difference_high`, NaN for the first, and `beside`: empty for the first, `better`, `worse` or `not distinguishable`.

    Raises:
        ValueError: there are fewer than two models, they have no group in common, or they were scored in different ways.
    """
    if len(models) < 2:
        raise ValueError(f"compare_models: expected at least two models, found {list(models)}")
    first, *others = models
    for other in others:
        _check_alike(models[first], models[other], (first, other))
    found = {name: {of.group: of for of in scores.results if MODEL in of.figures} for name, scores in models.items()}
    common = [group for group in found[first] if all(group in of for of in found.values())]
    if not common:
        raise ValueError(
            f"{', '.join(models)} have no scored group in common that none was trained on; score them on the same groups"
        )
    return side_by_side({name: [of[group] for group in common] for name, of in found.items()}, seed)


def averages_as_figures(scores: Scores, prefix: str) -> dict[str, float]:
    """
    The averages as a Trainer logs them: `PREFIX_pearson`, .. of the model, also its further figures, and
    `PREFIX_no_change_pearson`, .. of a baseline.
    """
    figures = {}
    for row in scores.averages.itertuples(index=False):
        if row.metric not in METRICS and row.method not in (MODEL, CEILING_MODEL):
            continue
        method = "" if row.method in (MODEL, CEILING_MODEL) else row.method.replace(" ", "_") + "_"
        figures[f"{prefix}_{method}{row.metric}"] = float(row.value)
    return figures


def format_scores(scores: Scores, further: tuple[str, ...] = ()) -> str:
    """
    Table, averages and verdict as text; a dash stands for a figure that is not defined.

    Args:
        scores ([`Scores`]): the scores.
        further (`tuple[str, ...]`): which of the [`FURTHER`] figures are shown after the [`METRICS`].
    """
    table, metrics = scores.table, [*METRICS, *further]
    several = table["dataset"].nunique() > 1
    shown = table[[*(["dataset"] if several else []), "context", "perturbation", "method"]].copy()
    for metric in metrics:
        shown[metric] = [_figure(value) for value in table[metric]]
    if (table["seen"] != "").any():
        shown["seen in training"] = table["seen"]
    lines = [table_text(shown), "", format_averages(scores.averages, metrics), ""]
    of_cell_eval = cell_eval_averages(scores.averages)
    if len(of_cell_eval):
        of_cell_eval["average"] = [with_interval(row) for _, row in of_cell_eval.iterrows()]
        shown = of_cell_eval.rename(columns={"metric": "cell-eval, of the model"})
        lines += [table_text(shown[["cell-eval, of the model", "average", "groups"]]), ""]
    if len(scores.models):
        lines += [format_models(scores.models), ""]
    return "\n".join([*lines, scores.verdict])


def cell_eval_averages(averages: pd.DataFrame) -> pd.DataFrame:
    """The averages of the metrics of cell-eval, under its own names."""
    found = averages[averages["metric"].str.startswith(CELL_EVAL)].copy()
    found["metric"] = found["metric"].str.removeprefix(CELL_EVAL)
    return found.reset_index(drop=True)


def format_averages(averages: pd.DataFrame, metrics: list[str]) -> str:
    """One line for each method, with its 95 % intervals."""
    methods = list(dict.fromkeys(averages["method"]))
    rows = []
    for method in methods:
        row = {"average of": method}
        for metric in metrics:
            found = averages[(averages["method"] == method) & (averages["metric"] == metric)]
            row[metric] = with_interval(found.iloc[0]) if len(found) else "-"
        rows.append(row)
    return table_text(pd.DataFrame(rows)) if rows else "no group to average"


def format_models(models: pd.DataFrame) -> str:
    """The table of [`compare_models`] as text."""
    return table_text(models_as_text(models))


def models_as_text(models: pd.DataFrame) -> pd.DataFrame:
    """The table of [`compare_models`] as people read it: figures with their intervals."""
    if not len(models):
        return pd.DataFrame()
    first, number = models["model"].iloc[0], counted(int(models["groups"].iloc[0]), "group")
    differences = models[["difference", "difference_low", "difference_high"]].set_axis(["value", "low", "high"], axis=1)
    return models[["metric", "model"]].assign(
        **{
            f"average of {number}": [with_interval(row) for _, row in models.iterrows()],
            f"difference from {first}": [with_interval(row) for _, row in differences.iterrows()],
            f"beside {first}": models["beside"],
        }
    )


def with_interval(row: pd.Series) -> str:
    """A figure and its interval, `value`, `low` and `high`, as people read them."""
    value = _figure(row["value"])
    return value if row["low"] != row["low"] else f"{value} [{_figure(row['low'])}, {_figure(row['high'])}]"


def _figure(value: float) -> str:
    return f"{value:.4f}" if value == value else "-"


def _records(frame: pd.DataFrame) -> list[dict]:
    return json.loads(frame.to_json(orient="records", double_precision=15))


def _frame(records: list[dict], expected: list[str]) -> pd.DataFrame:
    """A table of records; KeyError or TypeError where a column that is expected is not there, or a record is none."""
    if not all(isinstance(record, dict) for record in records):
        raise TypeError("expected a list of records")
    frame = pd.DataFrame(records, columns=None if records else expected)
    frame[expected]  # all of them are there
    for name in frame.columns:
        frame[name] = frame[name].astype(str) if name in (*_TEXTS, "metric") else pd.to_numeric(frame[name])
    return frame
