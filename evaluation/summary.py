"""What a screen of predictions comes to, group by group and gene by gene, without the cells: in bounded memory, whatever their number."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from pertstate.base.tables import append_csv
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.group_sums import GroupSums, log_fold_change
from pertstate.evaluation.bootstrap import bootstrap_weights, generator_of, intervals
from pertstate.evaluation.experiment import Arm, Unit
from pertstate.processing import StateProcessor


TABLES = (".parquet", ".csv")
# Rows of the table that are written at once, and control cells that are read at once.
_ROWS, _BLOCK = 1 << 16, 1024


class Resampled:
    """
    The mean of some cells, of which parts come one after another, and of each resampling of them.

    Args:
        weights (`np.ndarray` of shape `(1 + draws, cells)`): see [`bootstrap_weights`].
        log1p (`bool`): the cells are log1p expression, whose mean is taken, too.
    """

    def __init__(self, weights: np.ndarray, log1p: bool):
        self.weights, self.sums = weights, GroupSums("", expression={} if log1p else None)
        self._done = 0
        self._drawn: list[np.ndarray] = []  # weighted sums of the cells, and of their expression

    def add(self, cells: np.ndarray):
        """The next cells `(cells, genes)`."""
        self.sums.add(("", "", ""), cells)
        weights = self.weights[:, self._done : self._done + len(cells)]
        parts = [cells] if self.sums.expression is None else [cells, np.expm1(cells)]
        if not self._drawn:
            self._drawn = [np.zeros((len(weights), cells.shape[1])) for _ in parts]
        for total, part in zip(self._drawn, parts):
            total += weights @ part
        self._done += len(cells)

    @property
    def means(self) -> np.ndarray:
        """The mean cell, and that of each resampling, `(1 + draws, genes)`; the first row is added up in float64."""
        return self._with_first(self._drawn[0], self.sums.sums)

    @property
    def expression(self) -> np.ndarray:
        """The same of `expm1` of the cells."""
        return self._with_first(self._drawn[1], self.sums.expression or {})

    def _with_first(self, drawn: np.ndarray, sums: dict) -> np.ndarray:
        drawn[0] = sums["", "", ""] / self._done
        return drawn


def changes(found: Resampled, controls: Resampled) -> dict[str, np.ndarray]:
    """
    What changes between control cells and the cells that were predicted from them, with 95 % intervals.

    Args:
        found, controls ([`Resampled`]): of the predicted and of the control cells, with the same weights.

    Returns:
        `dict[str, np.ndarray]`: the columns of [`SummaryFile`] from `control_mean` on, `(genes,)` each.
    """
    change = found.means - controls.means
    low, high = intervals(change)
    columns = {
        "control_mean": controls.means[0],
        "mean": found.means[0],
        "change": change[0],
        "change_low": low,
        "change_high": high,
    }
    if found.sums.expression is not None:
        with np.errstate(invalid="ignore"):  # a model may predict less than nothing; it has no logarithm
            folds = log_fold_change(found.expression, controls.expression) / np.log(2)
        low, high = intervals(folds)
        columns |= {"log2_fold_change": folds[0], "log2_fold_change_low": low, "log2_fold_change_high": high}
    return columns


class SummaryFile:
    """
    A table that is written while predictions come, arm by arm: a row for each group and gene.

    | column | |
    |---|---|
    | `context`, `perturbation`, `dose` | the group; `dose` where there are doses |
    | `gene`, `cells` | the gene, and how many cells were predicted |
    | `control_mean`, `mean` | mean of the control cells that went in, and of the predicted cells |
    | `change`, `change_low`, `change_high` | their difference, and its 95 % interval |
    | `calibrated_low`, `calibrated_high` | the 90 % interval of the change that would be measured with as many cells and control cells, see [`ChangeIntervals`]; where the model has some |
    | `expected_mae` | the mean absolute error over genes that is to be expected of such a measurement, with them |
    | `log2_fold_change`, `_low`, `_high` | of mean expression, see [`log_fold_change`], in base 2; where log1p expression is predicted |
    | `expected_loss`, `expected_energy` | what the model expects of the group, see [`ConfidenceCalibration`]; where it has a confidence, and that was calibrated |

    The other intervals are those of the bootstrap over control cells, each with the cell that was predicted from it.

    Args:
        output (`Path`): to write, `.parquet` or `.csv`.
        processor ([`StateProcessor`]): names doses.
        genes (`list[str]`): what is predicted.
        arms (`list[Arm]`): the groups.
        log1p (`bool`): log1p expression is predicted.
        expression (`Callable`): gives cells of the input in the units and genes of predictions.
        seed (`int`): of the resamplings.
        calibrated ([`ChangeIntervals`], *optional*): the intervals of predicted changes.
        expected (`Callable`, *optional*): gives further columns of a group whose cells have all been written.
    """

    def __init__(
        self,
        output: Path,
        suffix: str,
        processor: StateProcessor,
        genes: list[str],
        arms: list[Arm],
        log1p: bool,
        expression: Callable[[np.ndarray], np.ndarray],
        seed: int,
        calibrated: ChangeIntervals | None = None,
        expected: Callable[[Arm], dict[str, float]] = lambda arm: {},
    ):
        if calibrated is not None and len(calibrated.spread) != len(genes):
            raise ValueError(
                f"the record of the checkpoint has intervals of {len(calibrated.spread)} features, and the model predicts "
                f"{len(genes)}; copy the checkpoint again"
            )
        self.calibrated = calibrated
        self.expected = expected
        self.genes, self.log1p, self.seed, self._of_cells = genes, log1p, seed, expression
        columns = processor.output_columns()
        table = processor.output_obs(
            [arm.perturbation for arm in arms], [arm.context for arm in arms], [""] * len(arms)
        ).drop(columns="control_barcode")
        known = {columns["context"]: "context", columns["perturbation"]: "perturbation"}
        table.columns = [known.get(name, "dose") for name in table]
        order = ["context", "perturbation", *(["dose"] if "dose" in table else [])]
        self._groups = {id(arm): row for arm, row in zip(arms, table[order].to_dict("records"))}
        self._open: tuple[Arm, Resampled] | None = None
        self._cells: np.ndarray | None = None
        self._waiting: list[pd.DataFrame] = []
        self._stack = ExitStack()
        self._write = _csv(output, self._stack) if suffix == ".csv" else _parquet(output, self._stack)

    def write(self, packed: list[Unit], values: np.ndarray, embedding: np.ndarray | None, inputs: np.ndarray):
        """Take in the predicted cells `(cells, genes)` of a pass; passes must come arm by arm."""
        start = 0
        for unit in packed:
            self._turn_to(unit.arm)
            cells, start = values[start : start + unit.cells], start + unit.cells
            self._open[1].add(cells)  # type: ignore[index]  # an arm is open

    def _turn_to(self, arm: Arm):
        if self._open is not None and self._open[0] is arm:
            return
        self._finish()
        if self._cells is not arm.cells:
            self._cells = arm.cells
            weights = bootstrap_weights(generator_of(self.seed, arm.context), len(arm.cells))
            self._controls = Resampled(weights, self.log1p)
            for start in range(0, len(arm.cells), _BLOCK):
                self._controls.add(self._of_cells(arm.cells[start : start + _BLOCK]))
        self._open = (arm, Resampled(self._controls.weights, self.log1p))

    def _finish(self):
        """Write the rows of the arm that is open."""
        if self._open is None:
            return
        (arm, found), controls = self._open, self._controls
        columns = {**self._groups[id(arm)], "gene": self.genes, "cells": len(arm.cells), **changes(found, controls)}
        if self.calibrated is not None:
            measured = (columns["change"], len(arm.cells), len(arm.cells))
            columns["calibrated_low"], columns["calibrated_high"] = self.calibrated.around(*measured)
            columns["expected_mae"] = float(self.calibrated.expected_mae(*measured))
        columns |= self.expected(arm)
        self._waiting.append(pd.DataFrame(columns))
        self._open = None
        if len(self._waiting) * len(self.genes) >= _ROWS:
            self._flush()

    def _flush(self):
        if self._waiting:
            self._write(pd.concat(self._waiting, ignore_index=True))
        self._waiting = []

    def __enter__(self) -> "SummaryFile":
        return self

    def __exit__(self, kind, *_):
        with self._stack:
            if kind is None:
                self._finish()
                self._flush()


def _csv(output: Path, stack: ExitStack) -> Callable[[pd.DataFrame], None]:
    file = stack.enter_context(open(output, "w", encoding="utf-8", newline=""))
    return lambda frame: append_csv(frame, file)


def _parquet(output: Path, stack: ExitStack) -> Callable[[pd.DataFrame], None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = stack.enter_context(open(output, "wb"))
    writers: list[pq.ParquetWriter] = []

    def write(frame: pd.DataFrame):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if not writers:
            writers.append(stack.enter_context(pq.ParquetWriter(file, table.schema)))
        writers[0].write_table(table)

    return write
