"""What `cell-eval` and the Virtual Cell Challenge take: a pair of files, and tables of how many cells are wanted."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pertstate.base.constants import Normalize, Values
from pertstate.base.messages import closest, some
from pertstate.base.tables import read_csv
from pertstate.evaluation.cells_file import CellTable, DenseRows, SparseRows, write_frame
from pertstate.evaluation.experiment import Arm
from pertstate.processing import StateProcessor, Vocabulary


# How such tables call the perturbation and the number of cells.
_NAMES, _NUMBER = ("target_gene", "perturbation"), "n_cells"
# Real cells that are read and written at once.
_BLOCK = 1024


@dataclass(frozen=True)
class CellEval:
    """
    Write an output as `cell-eval` takes it: log1p expression in float32, control cells among the predicted cells, one column
    for perturbations (with any dose in the name).

    Args:
        real: `.h5ad` to write with the real cells of the same perturbations and all control cells of their contexts, the same
            genes in the same order; None where there are none, as in the Virtual Cell Challenge.
        column (`str`): the column of obs with the perturbation.
        control (`str`): what control cells are called in it.
    """

    real: str | os.PathLike | None = None
    column: str = "target_gene"
    control: str = "non-targeting"

    def check(self, output: Path, is_log1p: bool):
        """ValueError if a model predicts something else than log1p expression, or a file is no `.h5ad`."""
        if not is_log1p:
            raise ValueError("cell-eval takes log1p expression; this model predicts something else")
        for path in (output, self.real):
            if path is not None and Path(path).suffix != ".h5ad":
                raise ValueError(f"{path}: cell-eval reads .h5ad; name a file that ends so")

    def obs_of(self, arms: list[tuple[str, str]], context: str, control: str) -> pd.DataFrame:
        """
        The obs of some (context, perturbation), a row each.

        Args:
            context (`str`): the name of the column of contexts.
            control (`str`): what control cells are called in `arms`.

        Raises:
            ValueError: a perturbation is called as control cells are to be called.
        """
        names = [name for _, name in arms]
        if self.control != control and self.control in names:
            raise ValueError(
                f"{self.control!r} is a perturbation of the data, whose control cells are {control!r}; name another label for "
                "the control cells with --cell-eval-control"
            )
        of = {self.column: [self.control if name == control else name for name in names]}
        return pd.DataFrame({**of, context: [name for name, _ in arms]} if context != self.column else of)

    def reader_of(self, processor: StateProcessor) -> StateProcessor:
        """A processor that reads both files: what predictions record, so that they can be scored against the real file."""
        return StateProcessor(
            vocabulary=Vocabulary(),
            perturbation_key=self.column,
            control=self.control,
            context_key=processor.output_columns()["context"],
            combination_separator=processor.combination_separator,
            normalize=Normalize.NONE,
            values=Values.LOG1P,
            target_sum=processor.target_sum,
            scale=processor.scale,
        )


def read_cell_counts(path: str | os.PathLike) -> dict[str, int]:
    """
    How many cells of each perturbation are wanted, from a CSV table with the columns `target_gene` (or `perturbation`) and
    `n_cells`, such as `pert_counts_Validation.csv` of the Virtual Cell Challenge.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a perturbation is empty or stands twice, or a number is no whole number above 0.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()})")
    try:
        table = read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV table ({error})") from error
    column = next((name for name in _NAMES if name in table), None)
    if column is None or _NUMBER not in table:
        raise ValueError(
            f"{path}: expected the columns {' or '.join(map(repr, _NAMES))} and {_NUMBER!r}, found {list(table.columns)}"
        )
    names, numbers = table[column], table[_NUMBER]
    whole = pd.to_numeric(numbers, errors="coerce")
    for row in np.flatnonzero(names.isna() | ~(whole >= 1) | (whole % 1 != 0)):
        raise ValueError(
            f"{path}: row {row + 1}: expected a perturbation and a whole number of cells, found {names[row]!r} and {numbers[row]!r}"
        )
    names = names.astype(str)
    if names.duplicated().any():
        raise ValueError(f"{path}: {some(names[names.duplicated()])} stand twice; leave one row of each")
    if not len(names):
        raise ValueError(f"{path} has no rows; expected one for each perturbation")
    return {name: int(number) for name, number in zip(names, whole)}


def wanted_cells(table: dict[str, int], perturbations: list[str]) -> dict[str, int]:
    """The rows of a table for some perturbations. ValueError if it lacks one."""
    for name in perturbations:
        if name not in table:
            raise ValueError(f"the table of cells has no row for {name!r}; {closest(name, table)}")
    return {name: table[name] for name in perturbations}


def real_rows(arms: list[Arm], labels: pd.DataFrame, control: str) -> list[tuple[str, str, np.ndarray]]:
    """
    The real cells of predicted groups: context, perturbation and rows, control cells first.

    Raises:
        ValueError: there are no real cells of a predicted group.
    """
    found = labels.reset_index(drop=True).groupby(["context", "perturbation"], observed=True, sort=False).indices
    wanted = [(context, control) for context in dict.fromkeys(arm.context for arm in arms)]
    wanted += [(arm.context, arm.perturbation) for arm in arms]
    missing = [" / ".join(pair) for pair in wanted if pair not in found]
    if missing:
        raise ValueError(
            f"cell-eval takes the same perturbations in both files, and the data have no cells of {len(missing)} that are "
            f"predicted: {some(missing)}; leave these out, or name no file for the real cells"
        )
    return [(context, name, np.sort(np.asarray(found[context, name]))) for context, name in wanted]


def write_real(
    file,
    check: Callable[[], None],
    naming: CellEval,
    groups: list[tuple[str, str, np.ndarray]],
    labels: pd.DataFrame,
    names: tuple[str, str],
    var: pd.DataFrame,
    expression: Callable[[np.ndarray], np.ndarray],
    sparse: bool,
):
    """
    Write the real cells of some groups.

    Args:
        file, check: see [`whole_cells`].
        groups (`list`): see [`real_rows`].
        labels (`pandas.DataFrame`): of the cells of the data.
        names (`tuple[str, str]`): the column of contexts, and what control cells are called in `labels`.
        var (`pandas.DataFrame`): the genes.
        expression (`Callable`): gives some rows in the units and genes of the predictions.
        sparse (`bool`): as CSR.
    """
    table = naming.obs_of([(context, name) for context, name, _ in groups], *names)
    shape = (sum(len(rows) for *_, rows in groups), len(var))
    categories = {name: pd.Index(sorted(set(table[name]))) for name in table}
    write_frame(file, "/", None, var, {})
    obs = CellTable(file, {**categories})
    matrix = (SparseRows if sparse else DenseRows)(file, "X", shape, "float32")
    done = 0
    for i, (*_, rows) in enumerate(groups):
        codes = {name: np.full(len(rows), categories[name].get_loc(table[name][i])) for name in table}
        obs.write(labels.index.to_numpy(dtype=object)[rows], codes)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            matrix.write(slice(done, done + len(block)), expression(block))
            done += len(block)
            check()
    obs.close()
    matrix.close()
    check()
