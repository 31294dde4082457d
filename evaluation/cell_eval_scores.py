"""The metrics of the package `cell-eval`, computed by it for the cells that are scored."""

import importlib.metadata
import io
import tempfile
from contextlib import redirect_stderr
from importlib.util import find_spec

import anndata as ad
import numpy as np
import pandas as pd
import torch

from pertstate.base.messages import some
from pertstate.evaluation.metrics import CELL_EVAL, MODEL
from pertstate.evaluation.scoring import Group, GroupResult, Predicted


_COLUMN = "target"
# cell-eval takes larger values for counts.
_LARGEST = 15.0
CAVEAT = (
    "cell-eval tests genes cell by cell. Predicted cells have less noise than real ones, and often other zeros, so its p-values "
    "mislead, and so do the overlap, precision, recall, counts and AUCs that follow from them"
)


def check_cell_eval():
    """ImportError that says what to install, if cell-eval is missing."""
    if find_spec("cell_eval") is None:
        raise ImportError("the metrics of cell-eval need the package: pip install 'pertstate[eval]'")


def cell_eval_version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("cell-eval")


class CellEvalMetrics:
    """
    Has cell-eval compare the predicted with the real cells of each context. The predicted file that it sees has the real control
    cells, as that of `pertstate predict --cell-eval`. The cells of one context are held in memory at a time.

    Args:
        features (`list[str]`): names of the genes.
        control (`str`): the perturbation of control cells.
    """

    def __init__(self, features: list[str], control: str):
        self.features, self.control = features, control
        self.figures: dict[Group, dict[str, float]] = {}
        self._lacking: dict[tuple[str, str], list[str]] = {}
        self._place: tuple[str, str] | None = None
        self._names: list[str] = []
        self._cells: dict[str, list[np.ndarray]] = {}

    def add(self, group: Group, predicted: Predicted | None, real: np.ndarray, controls: np.ndarray):
        """
        Take the cells of a group. All groups of a context must follow one another.

        Raises:
            ValueError: predicted cells hold values that cell-eval does not take for log1p expression, or it refuses them.
        """
        if predicted is None:
            return
        low, high = float(predicted.cells.min()), float(predicted.cells.max())
        if low < 0 or high >= _LARGEST:
            raise ValueError(
                f"cell-eval takes log1p expression from 0 to {_LARGEST:g}, and the predicted cells of {group[1]} / {group[2]} hold "
                f"{low if low < 0 else high:.4g}; score without --cell-eval, or clip them"
            )
        if self._place != group[:2]:
            self.finish()
            self._place = group[:2]
            self._names = [self.control]
            self._cells = {"predicted": [controls], "real": [controls]}
        self._names.append(group[2])
        self._cells["predicted"].append(predicted.cells)
        self._cells["real"].append(real)

    def finish(self):
        """Compare the cells of the context whose groups were taken last. ValueError if cell-eval refuses them."""
        if self._place is None:
            return
        place, cells = self._place, {kind: self._of(parts) for kind, parts in self._cells.items()}
        self._place, self._cells = None, {}
        threads = torch.get_num_threads()
        # Its progress bars, and the reasons that become notes here.
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            table = self._compare(place, cells, folder, threads)
        torch.set_num_threads(threads)  # numba, which it uses, resets the number
        for name, row in table.iterrows():
            figures = {f"{CELL_EVAL}{metric}": float(value) for metric, value in row.items()}
            self.figures[(*place, str(name))] = figures

    def _of(self, parts: list[np.ndarray]) -> ad.AnnData:
        names = [name for name, part in zip(self._names, parts) for _ in range(len(part))]
        obs = pd.DataFrame({_COLUMN: names}, index=[f"cell{i}" for i in range(len(names))])
        return ad.AnnData(np.concatenate(parts), obs=obs, var=pd.DataFrame(index=self.features))

    def _compare(self, place: tuple[str, str], cells: dict[str, ad.AnnData], folder: str, threads: int) -> pd.DataFrame:
        from cell_eval import MetricPipeline, MetricsEvaluator
        from cell_eval.metrics import metrics_registry

        try:
            evaluator = MetricsEvaluator(
                cells["predicted"],
                cells["real"],
                control_pert=self.control,
                pert_col=_COLUMN,
                num_threads=threads,
                outdir=folder,
            )
        except ValueError as error:
            raise ValueError(f"cell-eval refuses the cells of the context {place[1]!r}: {error}") from error
        found = pd.DataFrame()
        for metric in metrics_registry.list_metrics():
            pipeline = MetricPipeline(profile=None, break_on_error=True)
            pipeline.add_metrics([metric])
            try:
                pipeline.compute_de_metrics(evaluator.de_comparison)
                pipeline.compute_anndata_metrics(evaluator.anndata_pair)
            except Exception as error:  # noqa: BLE001 - whatever a metric of the package raises, the others are found
                self._lacking.setdefault((metric, str(error)), []).append(place[1])
                continue
            columns = pipeline.get_results().to_dict(as_series=False)
            if not columns:
                self._lacking.setdefault((metric, "no perturbation has it"), []).append(place[1])
                continue
            values = pd.DataFrame(columns).set_index("perturbation").astype(np.float64)
            found = found.join(values.where(np.isfinite(values)), how="outer")
        return found

    @property
    def notes(self) -> list[str]:
        """What must be known of the metrics, and which were not found, why."""
        lacking = [
            f"cell-eval found no {metric} in {some(contexts)} ({reason})"
            for (metric, reason), contexts in self._lacking.items()
        ]
        return [CAVEAT, *lacking]

    def give(self, results: list[GroupResult]):
        """Put what was found into the results of the groups, as further figures of the model."""
        self.finish()
        for result in results:
            figures = self.figures.get(result.group, {})
            result.further.setdefault(MODEL, {}).update({name: np.array([value]) for name, value in figures.items()})
