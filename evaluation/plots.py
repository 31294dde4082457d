"""Pictures of how predicted cells match observed ones."""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from pertstate.base.files import whole_file
from pertstate.base.outputs import claimed_file
from pertstate.base.printable import printable
from pertstate.data.reading import AnnDataFile
from pertstate.evaluation.metrics import pearson_of_change
from pertstate.evaluation.scored_files import readers_of


def plot_mean_changes(
    predicted: str | os.PathLike,
    real: str | os.PathLike,
    output: str | os.PathLike,
    most: int = 12,
    overwrite: bool = False,
):
    """
    One panel per (context, perturbation): each gene's predicted against its observed mean change from control.

    Args:
        predicted, real: files, see [`evaluate`].
        output: the picture to write, whole or not at all. The ending of its name says the format.
        most (`int`): the largest number of panels; those with the strongest observed change are shown.
        overwrite (`bool`): replace a file that is there.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the files have no group in common, or the format is unknown.
        FileExistsError, InUseError: see [`claimed_file`].
    """
    check_matplotlib()
    panels = []
    with AnnDataFile(predicted) as guess, AnnDataFile(real) as truth:
        reader, processor = readers_of(guess)
        guessed, observed = reader.labels(guess), processor.labels(truth)
        for (context, perturbation), rows in guessed.groupby(["context", "perturbation"]).indices.items():
            here = (observed["context"] == context).to_numpy()
            treated = np.flatnonzero(here & (observed["perturbation"] == perturbation).to_numpy())
            controls = np.flatnonzero(here & (observed["perturbation"] == processor.control).to_numpy())
            if perturbation == processor.control or not len(treated) or not len(controls):
                continue
            base = processor.as_predicted(processor.features(truth, controls)).mean(axis=0)
            change = processor.as_predicted(processor.features(truth, treated)).mean(axis=0) - base
            panels.append(
                (printable(f"{context}, {perturbation}"), reader.features(guess, rows).mean(axis=0) - base, change)
            )
    if not panels:
        raise ValueError(
            f"{predicted} and {real} have no (context, perturbation) with real cells and controls in common"
        )
    panels = sorted(panels, key=lambda panel: -np.abs(panel[2]).mean())[:most]

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(3.2 * columns, 3.2 * lines)
    for i, (title, x, y) in enumerate(panels):
        axis = figure.add_subplot(lines, columns, i + 1)
        limit = 1.05 * max(np.abs(x).max(), np.abs(y).max(), 1e-6)
        axis.axline((0, 0), slope=1, color="0.8", linewidth=1, zorder=0)
        axis.scatter(y, x, s=6, alpha=0.6, linewidths=0)
        correlation = pearson_of_change(x, y, np.zeros_like(x))
        axis.set(
            title=f"{title}\nPearson {correlation:.2f}", xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal"
        )
        axis.title.set_fontsize(9)
        axis.title.set_parse_math(False)  # a name with dollar signs is no formula
    figure.supxlabel("observed mean change")
    figure.supylabel("predicted mean change")
    with claimed_file(output, overwrite) as place, whole_file(place) as partial:
        figure.savefig(partial, dpi=130, format=Path(output).suffix[1:])


# The figures of an evaluation that have a panel of their own, and what they are called.
_CURVES = {
    "eval_pearson": "Pearson of the mean change",
    "eval_mae": "MAE of the mean",
    "eval_energy": "energy distance",
}
_BASELINE = "eval_perturbation_mean_"


def plot_history(history: pd.DataFrame, output: str | os.PathLike):
    """
    The course of a training: its loss and the validation loss by step, and each figure of the evaluations beside that of
    the perturbation mean.

    Args:
        history (`pandas.DataFrame`): `step` and what was logged there, see `training/history.py`.
        output: the `.png` to write, whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    panels = [name for name in _CURVES if name in history and history[name].notna().any()]
    width = 4.2 * (1 + len(panels))
    # Every run draws it, and a layout that is computed takes as long as the rest.
    figure = new_figure(width, 3.2, compute_layout=False)
    figure.subplots_adjust(left=0.65 / width, right=1 - 0.15 / width, bottom=0.16, top=0.9, wspace=0.28)
    axis = figure.add_subplot(1, 1 + len(panels), 1)
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        if name in history:
            seen = history[["step", name]].dropna()
            axis.plot(seen["step"], seen[name], marker="." if len(seen) < 40 else None, label=label)
    axis.set(title="loss", xlabel="step")
    axis.legend()
    for i, name in enumerate(panels):
        axis = figure.add_subplot(1, 1 + len(panels), i + 2)
        for column, label in ((name, "model"), (name.replace("eval_", _BASELINE), "perturbation mean")):
            if column in history:
                seen = history[["step", column]].dropna()
                axis.plot(seen["step"], seen[column], label=label, linestyle="-" if column == name else "--")
        axis.set(title=f"{_CURVES[name]}, validation", xlabel="step")
        axis.legend()
    with whole_file(output) as partial:
        figure.savefig(partial, dpi=110, format="png")


def check_matplotlib():
    """ImportError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'pertstate[report]'") from error


def new_figure(width: float, height: float, compute_layout: bool = True):
    """An empty figure of matplotlib, in inches, which needs no display. Its layout is computed when it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if compute_layout else None)
    FigureCanvasAgg(figure)
    return figure
