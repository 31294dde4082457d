"""Predicted cells as a file, and the control cells that they were predicted from."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from pertstate.base.constants import Values
from pertstate.base.messages import closest
from pertstate.base.outputs import claimed_file, claimed_folder
from pertstate.data.in_memory import CellData
from pertstate.evaluation.cell_eval import CellEval
from pertstate.evaluation.cells_file import ZARR, ZARR_FOLDER, CellTable, DenseRows, SparseRows, write_frame
from pertstate.evaluation.experiment import Arm, Unit, places
from pertstate.processing import StateProcessor


# Where control cells are in an output: stored once beside the predicted cells, as rows among these, or beside each of these.
ONCE, ROWS, LAYER = "once", "rows", "layer"
STORE, POINTER = "control_cells", "control_row"
_WHERE = {
    ONCE: f"uns[{STORE!r}], in the row that obs[{POINTER!r}] says",
    ROWS: "rows of their own, before the predicted cells",
    LAYER: "layers['control'] (of embeddings, obsm['control']), beside each predicted cell",
}
# Control cells that are read and written at once.
_BLOCK = 1024


@dataclass(frozen=True)
class OutputLayout:
    """
    How an output is laid out.

    Args:
        controls (`str`): where the control cells are that went in.

            - `"once"`: in `uns["control_cells"]`, an AnnData, each of them once; `obs["control_row"]` is its row
            - `"rows"`: rows of the output themselves, whose perturbation is the control, before all predicted cells
            - `"layer"`: in `layers["control"]` (of an embedding, `obsm["control"]`), beside each predicted cell
        sparse (`bool`): write matrices as CSR: zeros take no room.
        dtype (`str`): `"float32"`, or `"float16"`, which keeps three digits.
    """

    controls: str = ONCE
    sparse: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        for name, value, options in (
            ("controls", self.controls, (ONCE, ROWS, LAYER)),
            ("dtype", self.dtype, ("float32", "float16")),
        ):
            if value not in options:
                raise ValueError(f"{name}={value!r}: expected one of {list(options)}; {closest(value, options)}")
        if self.sparse and self.dtype != "float32":
            raise ValueError("sparse matrices of float16 cannot be computed with: choose sparse or float16, not both")

    @property
    def in_order(self) -> bool:
        """Whether predicted cells must come in the order of the output."""
        return self.sparse


def claimed_output(output: str | os.PathLike, cells: CellData, overwrite: bool) -> AbstractContextManager[Path]:
    """
    See [`claimed_file`], and for a `.zarr` [`claimed_folder`].

    Raises:
        ValueError: the output is the input file.
    """
    both = not isinstance(cells, ad.AnnData) and Path(cells).exists() and Path(output).exists()
    if both and Path(output).samefile(str(cells)):
        raise ValueError(f"{output} is the input file; write the predictions elsewhere")
    if Path(output).suffix == ZARR:
        return claimed_folder(output, ZARR_FOLDER, overwrite)
    return claimed_file(output, overwrite)


def controls_of(predicted: ad.AnnData):
    """
    The control cell that each predicted cell was made from, `(cells, features)`, whatever the layout of the output: what
    `layers["control"]` holds where it is there. Rows that are control cells are their own.

    Args:
        predicted (`AnnData`): what [`predict`] wrote or [`StateProcessor.decode`] made, or some of its cells or genes.

    Returns:
        `np.ndarray`, or a CSR matrix where it is stored so.

    Raises:
        KeyError: control cells are not in it.
    """
    for holder in (predicted.layers, predicted.obsm):
        if "control" in holder:
            return holder["control"]
    if STORE in predicted.uns:
        stored = predicted.uns[STORE]
        names = predicted.var_names if set(predicted.var_names) <= set(stored.var_names) else stored.var_names
        return stored[predicted.obs[POINTER].to_numpy(), names].X
    if POINTER in predicted.obs:
        # Control cells have the first numbers; cells may have been left out meanwhile.
        numbers, own = predicted.obs[POINTER].to_numpy(), predicted.obs_names == predicted.obs["control_barcode"]
        rows = pd.Series(np.flatnonzero(own), index=numbers[own])
        missing = set(numbers) - set(rows.index)
        if not missing:
            return predicted.X[rows[numbers].to_numpy()]
        raise KeyError(f"{len(missing)} control cells are no longer among the rows; take them from the whole output")
    raise KeyError(f"expected layers['control'], uns[{STORE!r}] or obs[{POINTER!r}], found none of them")


class PredictedFile:
    """
    An output file while it is written: first the tables and the control cells, then the predicted cells, pass by pass.

    Args:
        group: of h5py or of zarr, empty.
        processor ([`StateProcessor`]), config: of the model.
        layout ([`OutputLayout`]): how it is laid out.
        labels (`pandas.DataFrame`): of the input's cells.
        controls (`np.ndarray`): the rows of the input whose cells are control cells, each once.
        arms (`list[Arm]`): what is predicted. Their `first` counts predicted cells alone.
        uns (`dict`): what the output says of itself.
        var (`pandas.DataFrame`): its genes or dimensions.
        carried (`pandas.DataFrame`, *optional*): further columns of obs, of all cells of the input.
        naming ([`CellEval`], *optional*): the columns are as that says, and no others.
        check (`Callable`): raises the error of the disk.
    """

    def __init__(
        self,
        group,
        processor: StateProcessor,
        config,
        layout: OutputLayout,
        labels: pd.DataFrame,
        controls: np.ndarray,
        arms: list[Arm],
        uns: dict,
        var: pd.DataFrame,
        carried: pd.DataFrame | None,
        naming: CellEval | None,
        check: Callable[[], None],
    ):
        self.group, self.processor, self.config, self.layout, self.check = group, processor, config, layout, check
        self.labels, self.controls, self.arms, self.carried, self.naming = labels, controls, arms, carried, naming
        self.before = len(controls) if layout.controls == ROWS else 0
        total = self.before + sum(len(arm.cells) for arm in arms)
        on_embedding, decoded = processor.values == Values.EMBEDDING, config.gene_dim is not None
        uns = {**uns, "stored_controls": _WHERE[layout.controls]}
        write_frame(group, "/", None, var, {"pertstate": uns})
        self._matrices: list[DenseRows | SparseRows] = []
        self.main = self._matrix(group, "X", (total, config.gene_dim if decoded else config.output_dim))
        self.embedding = self._matrix(group, "obsm/embedding", (total, config.output_dim)) if decoded else None
        self.beside = None
        if layout.controls == LAYER:
            name = "obsm/control" if on_embedding else "layers/control"
            self.beside = self._matrix(group, name, (total, config.input_dim))
        self._write_obs()

    def _matrix(self, group, name: str, shape: tuple[int, int]) -> DenseRows | SparseRows:
        made = (SparseRows if self.layout.sparse else DenseRows)(group, name, shape, self.layout.dtype)
        self._matrices.append(made)
        return made

    # The tables

    def _write_obs(self):
        """The whole table of the cells, arm by arm."""
        processor, columns = self.processor, self.processor.output_columns()
        names, contexts = [arm.perturbation for arm in self.arms], [arm.context for arm in self.arms]
        if self.before:
            of_controls = pd.unique(self.labels["context"].to_numpy()[self.controls])
            names, contexts = [*names, *[processor.control] * len(of_controls)], [*contexts, *of_controls]
        # One row an arm, so that what is the same for its cells is written down once.
        table = processor.output_obs(names, contexts, [""] * len(names)).drop(columns="control_barcode")
        cells = pd.DataFrame(index=self.labels.index)
        if self.naming is not None:
            pairs = [*zip(contexts, names)]
            table = self.naming.obs_of(pairs, columns["context"], processor.control).set_axis(table.index)
        else:
            if "batch" in self.labels:
                cells[columns["batch"]] = self.labels["batch"].to_numpy()
            cells["control_barcode"] = self.labels.index
        for name, values in () if self.carried is None else self.carried.items():
            if name in table or name in cells or name == POINTER:
                raise ValueError(
                    f"obs_columns: {name!r} is a column of the output already ({[*table, *cells, POINTER]}); leave it out"
                )
            cells[name] = values
        # Arms share their arrays of cells: the cells of all arms one after another would be as long as the output.
        shared = {id(arm.cells): arm.cells for arm in self.arms}
        used = np.unique(np.concatenate([self.controls, *shared.values()]))
        coded = {**_coded(table, np.arange(len(table))), **_coded(cells, used)}
        kinds = {name: kind for name, (kind, _) in coded.items()}
        position = np.full(len(self.labels), -1, dtype=np.int64)
        position[self.controls] = np.arange(len(self.controls))
        points = self.naming is None and self.layout.controls != LAYER and bool((position[used] >= 0).all())
        if points:
            kinds[POINTER] = np.dtype(np.int32 if len(self.controls) < 1 << 31 else np.int64)
        written = CellTable(self.group, kinds)
        barcodes = self.labels.index.to_numpy(dtype=object)

        def write(row: int, rows: np.ndarray, ending: str):
            values = {name: np.full(len(rows), coded[name][1][row]) for name in table}
            values |= {name: coded[name][1][rows] for name in cells}
            if points:
                values[POINTER] = position[rows]
            written.write(barcodes[rows] + ending, values)
            self.check()

        if self.before:
            number_of = {context: len(self.arms) + i for i, context in enumerate(of_controls)}
            contexts_of = self.labels["context"].to_numpy()[self.controls]
            for part in np.split(self.controls, np.flatnonzero(contexts_of[1:] != contexts_of[:-1]) + 1):
                write(number_of[self.labels["context"].iloc[part[0]]], part, "")
        for i, arm in enumerate(self.arms):
            write(i, arm.cells, table.index[i])
        written.close()

    def write_controls(
        self, inputs: Callable[[np.ndarray], np.ndarray], expression: Callable[[np.ndarray], np.ndarray]
    ):
        """
        Write the control cells where they are stored by themselves.

        Args:
            inputs (`Callable`): gives the model's features of some rows of the input.
            expression (`Callable`): gives them in the units and genes of the predictions.
        """
        if self.layout.controls == LAYER:
            return
        store = self._open_store() if self.layout.controls == ONCE else None
        for start in range(0, len(self.controls), _BLOCK):
            rows = self.controls[start : start + _BLOCK]
            place = slice(start, start + len(rows))
            if store is not None:
                store.write(place, self.processor.as_predicted(inputs(rows)))
            else:
                self.main.write(place, expression(rows))
                if self.embedding is not None:
                    self.embedding.write(place, inputs(rows))
            self.check()

    def _open_store(self) -> DenseRows | SparseRows:
        processor, labels = self.processor, self.labels.iloc[self.controls]
        columns = processor.output_columns()
        on_embedding = processor.values == Values.EMBEDDING
        names = processor.output_names(self.config.input_dim) if on_embedding else processor.vocabulary.genes
        place = f"uns/{STORE}"
        write_frame(self.group, place, None, pd.DataFrame(index=pd.Index(names, dtype=object)), {})
        store = self.group[place]
        obs = pd.DataFrame({columns["context"]: labels["context"].to_numpy()}, index=labels.index)
        if "batch" in labels:
            obs[columns["batch"]] = labels["batch"].to_numpy()
        coded = _coded(obs, np.arange(len(obs)))
        table = CellTable(store, {name: kind for name, (kind, _) in coded.items()})
        table.write(labels.index.to_numpy(dtype=object), {name: codes for name, (_, codes) in coded.items()})
        table.close()
        return self._matrix(store, "X", (len(labels), self.config.input_dim))

    # The predicted cells

    def write(self, packed: list[Unit], values: np.ndarray, embedding: np.ndarray | None, inputs: np.ndarray):
        """
        Write the predicted cells of a pass.

        Args:
            packed (`list[Unit]`): whose they are.
            values (`np.ndarray` of shape `(cells, genes)`), embedding (`np.ndarray`, *optional*): what was predicted.
            inputs (`np.ndarray` of shape `(cells, feature_dim)`): the model's features of the cells that went in.
        """
        for place, part in places(packed):
            rows = slice(place.start + self.before, place.stop + self.before)
            self.main.write(rows, values[part])
            if self.embedding is not None and embedding is not None:
                self.embedding.write(rows, embedding[part])
            if self.beside is not None:
                self.beside.write(rows, self.processor.as_predicted(inputs[part]))
        self.check()

    def describe(self, name: str, text: str):
        """One more text of what the output says of itself."""
        ad.io.write_elem(self.group["uns/pertstate"], name, text)
        self.check()

    def __enter__(self) -> "PredictedFile":
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            for matrix in self._matrices:
                matrix.close()
            self.check()


def _coded(frame: pd.DataFrame, used: np.ndarray) -> dict[str, tuple[pd.Index | np.dtype, np.ndarray]]:
    """By column: the categories of those rows that are used, sorted, and each row's number; or type and values of numbers."""
    found: dict[str, tuple[pd.Index | np.dtype, np.ndarray]] = {}
    for name, column in frame.items():
        if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
            found[str(name)] = (column.dtype, column.to_numpy())
            continue
        if isinstance(column.dtype, pd.CategoricalDtype):
            found[str(name)] = (column.cat.categories, column.cat.codes.to_numpy())
            continue
        categories = pd.Index(np.unique(column.to_numpy(dtype=object)[used].astype(str)).astype(object))
        found[str(name)] = (categories, categories.get_indexer(column.to_numpy(dtype=object)))
    return found
