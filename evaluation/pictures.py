"""The pictures of a report as files, PNG and PDF, for papers and slides."""

import os
from collections.abc import Callable

import numpy as np
import pandas as pd

from pertstate.base.outputs import Kind, whole_folder
from pertstate.base.printable import printable
from pertstate.evaluation.metrics import CELL_EVAL, METRICS, MODEL, NAMES, pearson_of_change
from pertstate.evaluation.plots import check_matplotlib, new_figure
from pertstate.evaluation.report_data import KINDS, by_step, cell_map, expectation, gene_tests, mean_changes
from pertstate.evaluation.scores import Scores


PICTURES = ("averages", "changes", "volcano", "heat_map", "cells", "curves", "confidence")
FORMATS = ("png", "pdf")
FOLDER = Kind(
    "pictures",
    tuple(f"{name}.png" for name in PICTURES),
    lambda name: name in {f"{of}.{suffix}" for of in PICTURES for suffix in FORMATS},
)
# Colours of Okabe and Ito, which people with any colour vision tell apart. Shapes repeat what the colours say.
_COLOURS = {"control": "#999999", "observed": "#0072b2", "predicted": "#d55e00"}
_MARKERS = {"control": ".", "observed": "o", "predicted": "D"}
_LABELS = {"control": "real control", "observed": "real perturbed", "predicted": "predicted"}
_PANELS, _COLUMNS = 12, 4
# More names than these cannot be read beside a heat map.
_TICKS = 60
_SMALLEST_P = 1e-300


def save_pictures(scores: Scores, log: list[dict[str, float]], folder: str | os.PathLike) -> list[str]:
    """
    Write each picture of a report that the scores have data for, as PNG and PDF, into a folder that appears whole or not at all:

    - `averages`: each figure of merit with its 95 % interval, for each method
    - `changes`: predicted against observed mean change of each gene, in the groups with the strongest observed change
    - `volcano`: observed change against the adjusted p-value, in the same groups
    - `heat_map`: the model's figures over contexts and perturbations
    - `cells`: UMAP of real, control and predicted cells
    - `curves`: what the training logged
    - `confidence`: the loss that the model expects against the energy distance that was found, or the MAE that the run expects against
      that which was found

    Args:
        scores ([`Scores`]): the scores.
        log (`list[dict]`): what the training logged, see [`read_log`]; empty if it is not known.
        folder: where to write; claimed by the caller, see [`~pertstate.base.outputs.claimed_folder`].

    Returns:
        `list[str]`: names of the pictures.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the scores have data for no picture.
    """
    check_matplotlib()
    draw: dict[str, Callable[[], object | None]] = {
        "averages": lambda: _averages(scores),
        "changes": lambda: _changes(scores),
        "volcano": lambda: _volcano(scores),
        "heat_map": lambda: _heat_map(scores),
        "cells": lambda: _cells(scores),
        "curves": lambda: _curves(by_step(log) if log else pd.DataFrame()),
        "confidence": lambda: _confidence(scores),
    }
    figures = {name: figure for name in PICTURES if (figure := draw[name]()) is not None}
    if not figures:
        raise ValueError("the scores hold nothing to draw: no averages, no mean changes, no cells")
    with whole_folder(folder, FOLDER) as place:
        for name, figure in figures.items():
            _plain_texts(figure)
            figure.savefig(place / f"{name}.png", dpi=150)  # type: ignore[attr-defined]
            figure.savefig(place / f"{name}.pdf", metadata={"CreationDate": None})  # type: ignore[attr-defined]
    return list(figures)


def _plain_texts(figure):
    """Take every text as it is: a name with dollar signs is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _grid(number: int, width: float, height: float):
    columns = min(_COLUMNS, number)
    lines = -(-number // columns)
    figure = new_figure(width * columns, height * lines)
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(number)]


def _averages(scores: Scores):
    averages = scores.averages
    metrics = [name for name in dict.fromkeys(averages["metric"]) if not name.startswith(CELL_EVAL)]
    if not metrics:
        return None
    figure, axes = _grid(len(metrics), 4.0, 3.2)
    for axis, metric in zip(axes, metrics):
        rows = averages[averages["metric"] == metric].iloc[::-1]
        for y, row in enumerate(rows.itertuples()):
            kind = "predicted" if row.method == MODEL else "observed"
            ends = [[row.value - row.low], [row.high - row.value]] if np.isfinite(row.low) else None
            axis.errorbar(
                row.value, y, xerr=ends, color=_COLOURS[kind], ecolor="0.4", marker=_MARKERS[kind], markersize=5
            )
        axis.set_yticks(range(len(rows)), [printable(name) for name in rows["method"]], fontsize=8)
        axis.set_title(NAMES.get(metric, metric.replace("_", " ")), fontsize=9)
        axis.grid(axis="x", color="0.9")
    return figure


def _strongest(scores: Scores, changes: dict[str, np.ndarray]) -> list[int]:
    return np.argsort(-np.abs(changes["observed"]).mean(axis=1), kind="stable")[:_PANELS].tolist()


def _title(scores: Scores, group: int) -> str:
    _, context, perturbation = scores.groups[group]
    return printable(f"{perturbation} in {context}")


def _changes(scores: Scores):
    changes = mean_changes(scores)
    if "predicted" not in changes or not scores.groups:
        return None
    groups = _strongest(scores, changes)
    figure, axes = _grid(len(groups), 3.0, 3.2)
    for axis, group in zip(axes, groups):
        x, y = changes["observed"][group], changes["predicted"][group]
        limit = 1.05 * max(np.abs(x).max(), np.abs(y).max(), 1e-6)
        axis.axline((0, 0), slope=1, color="0.8", linewidth=1, zorder=0)
        axis.scatter(x, y, s=6, alpha=0.6, linewidths=0, color=_COLOURS["observed"], rasterized=True)
        correlation = pearson_of_change(y.astype(np.float64), x.astype(np.float64), np.zeros(len(x)))
        axis.set_title(f"{_title(scores, group)}\nPearson {correlation:.2f}", fontsize=9)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    figure.supxlabel("observed mean change")
    figure.supylabel("predicted mean change")
    return figure


def _volcano(scores: Scores):
    changes, tests = mean_changes(scores), gene_tests(scores)
    if tests is None or "observed" not in changes or not scores.groups:
        return None
    groups = [group for group in _strongest(scores, changes) if np.isfinite(tests[group]).any()]
    if not groups:
        return None
    figure, axes = _grid(len(groups), 3.0, 3.0)
    for axis, group in zip(axes, groups):
        p = np.maximum(tests[group].astype(np.float64), _SMALLEST_P)
        axis.scatter(
            changes["observed"][group],
            -np.log10(p),
            s=6,
            alpha=0.6,
            linewidths=0,
            color=_COLOURS["observed"],
            rasterized=True,
        )
        axis.set_title(_title(scores, group), fontsize=9)
    figure.supxlabel("observed mean change")
    figure.supylabel("-log10 of the adjusted p-value")
    return figure


def _heat_map(scores: Scores):
    table = scores.table[scores.table["method"] == MODEL]
    if not len(table):
        return None
    if table["dataset"].nunique() > 1:
        table = table.assign(context=table["dataset"] + " / " + table["context"])
    contexts, perturbations = (list(dict.fromkeys(table[name])) for name in ("context", "perturbation"))
    height = 1.4 + 0.25 * min(len(contexts), _TICKS)
    figure = new_figure(2.5 + 0.2 * min(max(len(perturbations), 12), _TICKS), height * len(METRICS))
    for i, metric in enumerate(METRICS):
        values = table.pivot_table(index="context", columns="perturbation", values=metric, aggfunc="mean", dropna=False)
        values = values.reindex(index=contexts, columns=perturbations)
        axis = figure.add_subplot(len(METRICS), 1, i + 1)
        signed = {"cmap": "PuOr_r", "vmin": -1, "vmax": 1} if metric == "pearson" else {"cmap": "cividis"}
        shown = axis.imshow(values.to_numpy(np.float64), aspect="auto", interpolation="nearest", **signed)
        figure.colorbar(shown, ax=axis, shrink=0.9)
        axis.set_title(NAMES[metric], fontsize=9)
        for place, names in ((axis.xaxis, perturbations), (axis.yaxis, contexts)):
            every = -(-len(names) // _TICKS)
            place.set_ticks(range(0, len(names), every), [printable(name)[:24] for name in names[::every]], fontsize=7)
        axis.tick_params(axis="x", rotation=60)
    return figure


def _cells(scores: Scores):
    places = cell_map(scores)
    if places is None:
        return None
    figure = new_figure(5.5, 5.0)
    axis = figure.add_subplot()
    for kind in KINDS:
        rows = places[places["kind"] == kind]
        axis.scatter(
            rows["x"],
            rows["y"],
            s=8,
            alpha=0.6,
            linewidths=0,
            color=_COLOURS[kind],
            marker=_MARKERS[kind],
            label=_LABELS[kind],
            rasterized=True,
        )
    axis.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    axis.legend(fontsize=8)
    return figure


def _curves(history: pd.DataFrame):
    names = dict.fromkeys(str(name).removeprefix("eval_") for name in history if name not in ("step", "epoch"))
    shown = [
        name for name in names if any(history[of].notna().sum() > 1 for of in (name, f"eval_{name}") if of in history)
    ]
    if not shown:
        return None
    figure, axes = _grid(len(shown), 3.4, 2.8)
    for axis, name in zip(axes, shown):
        for column, label, line in ((name, "training", "-"), (f"eval_{name}", "validation", "--")):
            if column in history and history[column].notna().any():
                kept = history[["step", column]].dropna()
                axis.plot(kept["step"], kept[column], line, label=label)
        axis.set_title(printable(name.replace("_", " ")), fontsize=9)
        axis.legend(fontsize=7)
    figure.supxlabel("step")
    return figure


def _confidence(scores: Scores):
    found = expectation(scores.table)
    if found is None:
        return None
    figure = new_figure(4.5, 4.2)
    axis = figure.add_subplot()
    rows = found.rows
    axis.scatter(rows[found.expected], rows[found.found], s=14, alpha=0.7, linewidths=0, color=_COLOURS["observed"])
    said = "not defined" if np.isnan(found.rank_correlation) else f"{found.rank_correlation:.2f}"
    axis.set_title(f"rank correlation over {len(rows)} groups: {said}", fontsize=9)
    axis.set(xlabel=found.labels[0], ylabel=found.labels[1])
    return figure
