"""A virtual experiment: which cells go into the model under which perturbation, and in which batches."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from pertstate.base.cell_ids import cell_ids, order_of
from pertstate.base.cell_sentences import SentenceLayout
from pertstate.base.constants import BATCH_IDS, CONTEXT_IDS, CONTROL_CELLS
from pertstate.data.reading import AnnDataFile
from pertstate.processing import StateProcessor


# Cells that several arms start from are held in memory between them if they take at most so many bytes.
HELD = 1 << 28


@dataclass
class Arm:
    """
    One (context, perturbation) of the experiment.

    Args:
        context, perturbation (`str`): their names.
        encoded (`dict[str, np.ndarray]`): the perturbation as the model takes it.
        cells (`np.ndarray`): the rows of the input whose cells go in.
        first (`int`): the first row of the output that it fills.
    """

    context: str
    perturbation: str
    encoded: dict[str, np.ndarray]
    cells: np.ndarray
    first: int


def plan_arms(
    processor: StateProcessor,
    labels: pd.DataFrame,
    chosen: dict[str, np.ndarray],
    perturbations: list[str] | None,
    cells_of: Mapping[str, int] | None = None,
) -> list[Arm]:
    """
    The arms of an experiment, context by context.

    Args:
        labels (`pandas.DataFrame`): of the input's cells.
        chosen (`dict[str, np.ndarray]`): context to the rows of its control cells, in the order in which they are drawn.
        perturbations (`list[str]`, *optional*): what is predicted; by default what each context has.
        cells_of (`Mapping[str, int]`, *optional*): perturbation to the number of its cells; all control cells by default.

    Raises:
        KeyError: a perturbation is unknown to the model.
        ValueError: there is nothing to predict.
    """
    wanted = {}
    for context in chosen:
        own = labels.loc[(labels["context"] == context).to_numpy(), "perturbation"]
        own = [name for name in pd.unique(own) if name != processor.control]
        wanted[context] = own if perturbations is None else list(dict.fromkeys(perturbations))
    names = list(dict.fromkeys(name for of_context in wanted.values() for name in of_context))
    encoded = processor.encode(names)
    by_name = {name: {key: values[i] for key, values in encoded.items()} for i, name in enumerate(names)}
    arms, first = [], 0
    for context, rows in chosen.items():
        # Arms with as many cells share one array: see `_units`.
        parts = {len(rows): rows}
        for name in wanted[context]:
            number = min(len(rows), len(rows) if cells_of is None else cells_of[name])
            cells = parts.setdefault(number, rows[:number])
            arms.append(Arm(context, name, by_name[name], cells, first))
            first += number
    if not arms:
        raise ValueError(
            "nothing to predict: no perturbation was named, and the chosen contexts hold control cells alone; name "
            "some with --perturbation, or all that the model knows with --all"
        )
    return arms


def observed_arms(
    arms: list[Arm], labels: pd.DataFrame, at_most: int | Mapping[str, int] | None, seed: int
) -> list[Arm]:
    """The arms of a ceiling: the perturbed cells themselves go in, instead of control cells."""
    found, first = [], 0
    for arm in arms:
        here = (labels["context"] == arm.context) & (labels["perturbation"] == arm.perturbation)
        rows = np.flatnonzero(here.to_numpy())
        if not len(rows):
            raise ValueError(
                f"{arm.context} / {arm.perturbation}: this model decodes observed cells (the ceiling of decoding), and the "
                "file has no such cells; name perturbations that it has"
            )
        number = at_most[arm.perturbation] if isinstance(at_most, Mapping) else at_most
        rows = rows[order_of(cell_ids(labels.index[rows]), len(rows), seed)][:number]
        found.append(Arm(arm.context, arm.perturbation, arm.encoded, rows, first))
        first += len(rows)
    return found


@dataclass(eq=False)
class Unit:
    """
    Some sentences of an arm, which are predicted together.

    Args:
        arm ([`Arm`]): whose they are.
        sentences (`list[np.ndarray]`): the rows of the input that each holds.
        first (`int`): the first row of the output that they fill.
    """

    arm: Arm
    sentences: list[np.ndarray]
    first: int

    @property
    def cells(self) -> int:
        return sum(map(len, self.sentences))


def _units(processor: StateProcessor, arms: list[Arm], batch_size: int, in_order: bool) -> Iterator[Unit]:
    """All sentences of the experiment. Arms that use the same cells follow one another in each part of these cells."""
    for _, group in itertools.groupby(enumerate(arms), key=lambda pair: pair[0] if in_order else id(pair[1].cells)):
        alike = [arm for _, arm in group]
        sentences = processor.cut(alike[0].cells)
        offset = 0
        for start in range(0, len(sentences), batch_size):
            block = sentences[start : start + batch_size]
            for arm in alike:
                yield Unit(arm, block, arm.first + offset)
            offset += sum(map(len, block))


def packs(
    processor: StateProcessor, arms: list[Arm], batch_size: int, alone: bool = False, in_order: bool = False
) -> Iterator[list[Unit]]:
    """
    Units that go through the model in one pass: together no more than `batch_size` full sentences, padding counted.

    Args:
        alone (`bool`): one unit in each pass.
        in_order (`bool`): arm by arm, in the order of the output. By default each part of the control cells goes through all
            perturbations, so that it is read once.
    """
    room = batch_size * processor.set_size
    packed: list[Unit] = []
    width = sentences = 0
    for unit in _units(processor, arms, batch_size, in_order):
        wider = max(width, *map(len, unit.sentences))
        if packed and (alone or (sentences + len(unit.sentences)) * wider > room):
            yield packed
            packed, sentences, wider = [], 0, max(map(len, unit.sentences))
        packed.append(unit)
        width, sentences = wider, sentences + len(unit.sentences)
    if packed:
        yield packed


def places(packed: list[Unit]) -> Iterator[tuple[slice, slice]]:
    """Rows of the output, and the cells of a pass that belong there. Units that follow one another there go together."""
    start = done = 0
    for unit, following in itertools.zip_longest(packed, packed[1:]):
        done += unit.cells
        if following is None or following.first != unit.first + unit.cells:
            first = unit.first + unit.cells - (done - start)
            yield slice(first, first + done - start), slice(start, done)
            start = done


def cell_name(packed: list[Unit], row: int, barcodes: pd.Index) -> str:
    """What errors call a cell of some units: its context and perturbation, and the barcode of its control cell."""
    of = [unit for unit in packed for _ in range(unit.cells)][row]
    barcode = barcodes[np.concatenate([rows for unit in packed for rows in unit.sentences])[row]]
    return f"{of.arm.context} / {of.arm.perturbation} (control cell {barcode!r})"


class BatchReader:
    """
    Makes the batches of a pass. Cells that several perturbations start from are read once, as long as they follow.

    Args:
        controls (`dict[str, np.ndarray]`): the rows of all control cells of each context.
        held (`bool`): arms come one after another, so that the cells of a whole arm are kept for the next one, where they
            take at most `HELD` bytes.
    """

    def __init__(
        self,
        processor: StateProcessor,
        data: AnnDataFile,
        labels: pd.DataFrame,
        controls: dict[str, np.ndarray],
        missing_genes: str,
        input: str | None,
        device,
        held: bool = False,
    ):
        self.processor, self.data, self.labels, self.device, self.held = processor, data, labels, device, held
        self._options = (missing_genes, input)
        self._controls = controls
        self._expressed: dict[str, tuple[np.ndarray, int]] = {}
        self._rows, self._values = np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float32)

    def features(self, rows: np.ndarray) -> np.ndarray:
        """The model's features of some cells, in any order and repeated, `(cells, feature_dim)` float32."""
        wanted, values = self._rows, self._values
        if not np.isin(rows, wanted).all():
            wanted = np.unique(rows)
            values = self._take(wanted)
        return values[np.searchsorted(wanted, rows)]

    def _take(self, rows: np.ndarray) -> np.ndarray:
        return self.processor.features(self.data, rows, *self._options)

    def batch(self, packed: list[Unit]) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
        """The tensors of some units, their cells `(cells, feature_dim)` in the order of the sentences, and their mask."""
        processor, sentences = self.processor, [rows for unit in packed for rows in unit.sentences]
        rows = np.concatenate(sentences)
        self._read(packed, np.unique(rows))
        cells = self._values[np.searchsorted(self._rows, rows)]
        layout = SentenceLayout([len(of) for of in sentences])
        each = np.repeat(np.arange(len(packed)), [len(unit.sentences) for unit in packed])
        batch = {
            CONTROL_CELLS: layout.spread(cells),
            CONTEXT_IDS: processor.encode_contexts([unit.arm.context for unit in packed])[each],
        }
        contexts = [packed[i].arm.context for i in each]
        batch |= processor.control_values(contexts, self._take, self._controls.__getitem__, self._expressed)
        for key in packed[0].arm.encoded:
            batch[key] = np.stack([unit.arm.encoded[key] for unit in packed])[each]
        if processor.batch_key is not None:
            batch[BATCH_IDS] = layout.spread(processor.encode_batches(self.labels["batch"].to_numpy()[rows]))
        tensors = layout.batch(batch, masked=True)
        return {key: value.to(self.device) for key, value in tensors.items()}, cells, layout.mask

    def _read(self, packed: list[Unit], wanted: np.ndarray):
        if np.isin(wanted, self._rows).all():
            return
        if self.held:
            whole = np.unique(np.concatenate([unit.arm.cells for unit in packed]))
            wanted = whole if len(whole) * self.processor.feature_dim * 4 <= HELD else wanted
        self._rows, self._values = wanted, self.processor.features(self.data, wanted, *self._options)
