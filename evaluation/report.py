"""A report of scores: one file that shows them in a browser and loads nothing else."""

import base64
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pertstate._version import __version__
from pertstate.base.files import whole_file
from pertstate.base.outputs import claimed_file
from pertstate.base.printable import printable
from pertstate.base.public import last_part, public
from pertstate.evaluation.cell_eval_scores import CAVEAT
from pertstate.evaluation.metrics import ABOUT, CELL_EVAL, MODEL
from pertstate.evaluation.record_text import entries_of, in_short
from pertstate.evaluation.report_data import (
    COUNTS,
    KINDS,
    by_step,
    cell_map,
    expectation,
    find_scores,
    gene_tests,
    mean_changes,
    metrics_of,
    read_log,
)
from pertstate.evaluation.scores import Scores, cell_eval_averages, models_as_text


_PAGE = Path(__file__).parent / "page"
# Up to so many numbers, changes are kept with 16 bits. More are kept with 8, in steps of 1/127 of a group's largest change.
_FINE = 1_000_000
# How many p-values are shown over all groups. Of each group, the smallest are shown.
_TESTS = 600_000
_LARGEST = 655.0  # the largest -log10(p), as it is kept in hundredths with 16 bits


def write_report(path: str | os.PathLike, output: str | os.PathLike, overwrite: bool = False, title: str | None = None):
    """
    Write a report of the scores of a run: one HTML file, which holds all that it needs.

    Args:
        path: the folder of a run, or of scores.
        output: the file to write, whole or not at all.
        overwrite (`bool`): replace a file that is there.
        title (`str`, *optional*): title of the page; by default the name of the folder.

    Raises:
        FileNotFoundError: there are no scores.
        ImportError: plotly is not installed.
        ValueError: the scores are damaged.
        FileExistsError, InUseError: see [`claimed_file`].
    """
    check_plotly()
    scores = Scores.load(find_scores(path))
    with claimed_file(output, overwrite) as place:
        text = render_report(scores, read_log(path), title or last_part(os.path.abspath(path)))
        with whole_file(place) as partial:
            partial.write_text(text, encoding="utf-8")


def check_plotly():
    """ImportError that says what to install, if plotly is missing."""
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise ImportError("reports need plotly: pip install 'pertstate[report]'") from error


def render_report(scores: Scores, log: list[dict[str, float]], title: str) -> str:
    """
    The HTML of a report.

    Args:
        scores ([`Scores`]): the scores to show. Names in it may hold anything: they are shown as text.
        log (`list[dict]`): what the training logged, see [`read_log`].
        title (`str`): title of the page.
    """
    from plotly.offline import get_plotlyjs

    packed = _Packed()
    own = scores.averages[~scores.averages["metric"].str.startswith(CELL_EVAL)]
    data, missing = _data(scores, log, packed)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    return environment.from_string(_read("report.html")).render(
        title=title,
        version=__version__,
        verdict=scores.verdict,
        notes=scores.notes,
        averages=_averages(own),
        metrics=list(dict.fromkeys(own["metric"])),
        cell_eval=_averages(cell_eval_averages(scores.averages)),
        caveat=CAVEAT,
        models=models_as_text(scores.models).to_dict("records"),
        about=ABOUT,
        has_seen=bool((scores.table["seen"] != "").any()),
        record=entries_of(public(in_short(scores.record))),
        settings=entries_of(public(scores.settings)),
        missing=missing,
        groups=len(scores.groups),
        genes=len(scores.genes),
        data=Markup(_json(data)),
        pack=packed.text(),
        style=Markup(_read("report.css")),
        script=Markup(_read("report.js")),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _shown(value: object) -> str:
    """A name or sentence on one line; the template escapes it."""
    return printable(value)


def _json(data: dict) -> str:
    """JSON for an element `script`: no text in it can end the element, or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Packed:
    """Arrays, one after another, which the browser unpacks."""

    def __init__(self):
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, values: np.ndarray) -> dict[str, Any]:
        """Where an array is found: its type, shape and first byte, which is a multiple of 4."""
        raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
        place = {"type": values.dtype.name, "shape": list(values.shape), "at": self._length}
        raw += bytes(-len(raw) % 4)
        self._parts.append(raw)
        self._length += len(raw)
        return place

    def text(self) -> str:
        return base64.b64encode(zlib.compress(b"".join(self._parts), 6)).decode("ascii") if self._parts else ""


def _data(scores: Scores, log: list[dict[str, float]], packed: _Packed) -> tuple[dict, dict[str, str]]:
    """The data that the script draws, and for each picture that it cannot draw the reason."""
    missing = {}
    several = len({dataset for dataset, _, _ in scores.groups}) > 1
    contexts = [f"{dataset} / {context}" if several else context for dataset, context, _ in scores.groups]
    data: dict[str, Any] = {
        "genes": [printable(gene) for gene in scores.genes],
        "groups": {"context": _coded(contexts), "perturbation": _coded([p for _, _, p in scores.groups])},
        "averages": _figures(scores.averages[~scores.averages["metric"].str.startswith(CELL_EVAL)]),
        "table": _table(scores, several),
        "model": MODEL,
        "cell_eval": CELL_EVAL,
    }
    changes = mean_changes(scores)
    if changes:
        data["changes"] = {name: _quantised(values, packed) for name, values in changes.items()}
    else:
        missing["changes"] = "The scores keep no mean changes."
    tests = gene_tests(scores) if changes else None
    if tests is None:
        missing["volcano"] = "The scores keep no real perturbed and control cells, so genes were not tested."
    else:
        data["tests"] = _smallest(tests, packed)
    places = cell_map(scores)
    if places is None:
        missing["map"] = "The scores keep too few cells for a map."
    else:
        data["map"] = {
            "x": [round(float(x), 2) for x in places["x"]],
            "y": [round(float(y), 2) for y in places["y"]],
            "kind": [KINDS.index(kind) for kind in places["kind"]],
            "group": [int(group) for group in places["group"]],
        }
    if log:
        history = by_step(log)
        data["history"] = {printable(name): _numbers(history[name], 6) for name in history}
    else:
        missing["curves"] = (
            "No log of a training lies beside these scores. A model that is fitted in one pass has none."
        )
    shown = expectation(scores.table)
    if shown is None:
        missing["calibration"] = (
            "The run held no training groups out that say which errors to expect, and the model gives no confidence."
        )
    else:
        rank = shown.rank_correlation
        data["calibration"] = {
            "rank_correlation": None if np.isnan(rank) else round(rank, 3),
            "expected": _numbers(shown.rows[shown.expected]),
            "found": _numbers(shown.rows[shown.found]),
            "labels": list(shown.labels),
            "name": [printable(f"{c} / {p}") for c, p in zip(shown.rows["context"], shown.rows["perturbation"])],
        }
    return data, missing


def _table(scores: Scores, several: bool) -> dict[str, Any]:
    table = scores.table
    contexts = table["context"] if not several else table["dataset"] + " / " + table["context"]
    texts = {"context": contexts, **{name: table[name] for name in ("perturbation", "method", "seen", "reason")}}
    numbers = [
        *metrics_of(table),
        *(name for name in ("confidence", "expected_energy", "expected_mae", *COUNTS) if name in table),
    ]
    return {
        "texts": {name: _coded(values.tolist()) for name, values in texts.items()},
        "numbers": {printable(name): _numbers(table[name]) for name in numbers},
        "metrics": [printable(name) for name in metrics_of(table)],
    }


def _coded(values: list[str]) -> dict[str, list]:
    """The different names, and for each value the number of its name."""
    codes, names = pd.factorize(np.asarray(values, dtype=object))
    return {"names": [printable(name) for name in names], "codes": codes.tolist()}


def _numbers(values: pd.Series, digits: int = 4) -> list[float | None]:
    """Numbers with so many digits; whole numbers stay whole. None for a number that is NaN or infinite."""
    if values.dtype.kind in "iu":
        return [int(value) for value in values]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.to_numpy(np.float64)]


def _quantised(values: np.ndarray, packed: _Packed) -> dict[str, Any]:
    """Changes as whole numbers of steps, and the size of a step in each group."""
    kind: Any = np.int16 if values.size <= _FINE else np.int8
    steps = np.abs(values).max(axis=1, initial=0) / np.iinfo(kind).max
    whole = np.rint(values / np.where(steps > 0, steps, 1)[:, None]).astype(kind)
    return {"values": packed.add(whole), "steps": packed.add(steps.astype(np.float32))}


def _smallest(p: np.ndarray, packed: _Packed) -> dict[str, Any]:
    """The smallest p-values of each group: numbers of genes, and hundredths of -log10(p)."""
    groups, genes = p.shape
    most = min(genes, max(100, _TESTS // max(1, groups)))
    order = np.argsort(p, axis=1, kind="stable")[:, :most]
    chosen = np.take_along_axis(p, order, axis=1).astype(np.float64)
    with np.errstate(divide="ignore"):
        logs = np.minimum(-np.log10(chosen), _LARGEST)
    # The largest whole number, 65535, marks genes that could not be tested.
    whole = np.where(np.isnan(logs), 65535, np.rint(100 * np.nan_to_num(logs))).astype(np.uint16)
    return {"genes": packed.add(order.astype(np.uint32)), "logs": packed.add(whole), "all": most == genes}


def _figures(averages: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "method": printable(row.method),
            "metric": printable(row.metric),
            **{name: _or_none(getattr(row, name)) for name in ("value", "low", "high")},
        }
        for row in averages.itertuples()
    ]


def _or_none(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _averages(averages: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry for each method: its name, and for each metric the figure with its interval and share, as text."""
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for row in averages.itertuples():
        interval = f"[{_figure(row.low)}, {_figure(row.high)}]" if np.isfinite(row.low) else ""
        share = getattr(row, "share", float("nan"))
        rows.setdefault(str(row.method), {})[str(row.metric)] = {
            "value": _figure(row.value),
            "interval": interval,
            "share": f"{100 * share:.0f} %" if np.isfinite(share) else "",
        }
    return [{"method": method, "is_model": method == MODEL, "figures": figures} for method, figures in rows.items()]


def _figure(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "–"
