"""Virtual experiments on a whole file: control cells in, predicted cells out, in bounded memory."""

import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pertstate.base.cell_ids import cell_ids, order_of
from pertstate.base.cell_sentences import SentenceLayout
from pertstate.base.constants import BATCH_IDS, CONTEXT_IDS, CONTROL_CELLS, LABELS, Values
from pertstate.base.files import saying_disk_errors, whole_file
from pertstate.base.finite import check_predicted
from pertstate.base.gene_names import MAX_MISSING_GENES
from pertstate.base.messages import some
from pertstate.base.model_features import carried_columns
from pertstate.base.modeling_layers import UnseenWarning
from pertstate.base.modeling_perturbation import UnseenPerturbationError
from pertstate.base.outputs import claimed_file
from pertstate.base.printable import get_logger
from pertstate.data.reading import AnnDataFile, read_labels
from pertstate.evaluation.others_data import read_as
from pertstate.processing import NO_DOSES, StateProcessor


logger = get_logger(__name__)

CEILING = "decoded from the observed perturbed cells: the ceiling of decoding, not a prediction"


@dataclass
class Arm:
    """
    One (context, perturbation) of the experiment.

    Args:
        context, perturbation (`str`): their names.
        encoded (`dict[str, np.ndarray]`): the perturbation as the model reads it.
        cells (`np.ndarray`): the rows of the input whose cells the model is given.
        first (`int`): the first row of the output that the arm fills.
    """

    context: str
    perturbation: str
    encoded: dict[str, np.ndarray]
    cells: np.ndarray
    first: int


def predict(
    model,
    processor: StateProcessor,
    adata_path: str | os.PathLike,
    output: str | os.PathLike,
    perturbations: list[str] | None = None,
    contexts: list[str] | None = None,
    cells_per_perturbation: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    missing_genes: str = "error",
    input: str | None = None,
    sample_counts: int | None = None,
    checkpoint: str | None = None,
    quiet: bool = False,
    reading: dict[str, str | None] | None = None,
    all_are_controls: bool = False,
    doses: list[float] | None = None,
    convert_scale: bool = False,
    max_missing_genes: float = MAX_MISSING_GENES,
    obs_columns: list[str] | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    r"""
    Predict every chosen perturbation from the control cells of every chosen context, and write one `.h5ad`.

    Args:
        model ([`PerturbationPreTrainedModel`]): in any mode, on any device; it is put into evaluation mode.
        processor ([`StateProcessor`]): of the same checkpoint.
        adata_path: `.h5ad` with the control cells; read block by block.
        output: `.h5ad` to write, with the layout of [`StateProcessor.decode`]. It appears whole or not at all.
        perturbations (`list[str]`, *optional*): names, `"A+B"` for a combination. By default those that the file itself
            has in each context, so that the output can be compared with the file.
        contexts (`list[str]`, *optional*): by default all contexts of the file.
        cells_per_perturbation (`int`, *optional*): use at most this many control cells of a context, drawn at random; all
            by default. Each of them is used once for each perturbation. (A model that is a ceiling is given the perturbed
            cells instead, and at most this many.)
        seed (`int`): seed of the draw, and of the order in which cells are put into sentences.
        batch_size (`int`): full sentences in one forward pass. Shorter ones share a pass as far as there is room.
        missing_genes, input: see [`StateProcessor.__call__`].
        sample_counts (`int`, *optional*): for a model on counts. Write cells that are drawn with this seed and have the
            noise of real counts, instead of the model's expectation.
        checkpoint (`str`, *optional*): where the model came from, recorded in the output.
        quiet (`bool`): no progress bar.
        reading, all_are_controls: how to read a file that was made elsewhere, see [`read_as`].
        doses (`list[float]`, *optional*): predict each perturbation at each of these doses; for a model that knows doses.
        max_missing_genes (`float`): with `missing_genes="zero"`, the largest share of the model's genes that may be missing.
        convert_scale (`bool`): convert log1p values whose cells sum to another total than those of the training cells.
        obs_columns (`list[str]`, *optional*): columns of obs to copy from each control cell to its predicted cell. Columns of
            var are always copied.
        overwrite (`bool`): replace an output that is there.

    Returns:
        `dict[str, int]`: the numbers of `cells` written, of `contexts`, of `perturbations` and of `unseen` groups. A group
        (context, perturbation) is unseen if its perturbation or context has no training cells, so that the model predicts it
        in another way. A warning names these groups.

    Raises:
        KeyError, ValueError: see [`StateProcessor.__call__`]; or there is nothing to predict.
        UnseenPerturbationError: the model cannot predict some of the perturbations; it names them.
        FloatingPointError: a prediction is NaN or infinite; the error names cell and gene, and nothing is left behind.
        FileExistsError, FileNotFoundError, InUseError: see [`claimed_output`].
        OSError: the output cannot be written; nothing is left behind.
    """
    output = Path(output)
    for name, value in (("cells_per_perturbation", cells_per_perturbation), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    model.eval()
    with claimed_output(output, adata_path, overwrite), AnnDataFile(adata_path) as data:
        uses_batches = bool(model.config.embeds_batches)
        processor = read_as(processor, data, reading or {}, contexts, all_are_controls, uses_batches)
        perturbations = _at_doses(processor, perturbations, doses)
        processor.check_scale(data, input, convert_scale)
        lacking = processor.check_genes(data, input, max_missing_genes) if missing_genes == "zero" else None
        if lacking is not None:
            logger.warning(lacking)
        labels = read_labels(data, processor)
        groups = processor.control_groups(labels, contexts)
        chosen = {}
        for context, rows in groups.items():
            # Cells are drawn by their barcodes, so that the draw does not depend on where they stand in the file.
            rows = rows[order_of(cell_ids(labels.index[rows]), len(rows), seed)]
            chosen[context] = rows[:cells_per_perturbation]
        if uses_batches:
            check_batches(processor, labels["batch"].to_numpy()[np.concatenate([*chosen.values()])])
        arms = _plan(processor, labels, chosen, perturbations)
        check_perturbations(
            model, {key: np.stack([arm.encoded[key] for arm in arms]) for key in arms[0].encoded}, processor
        )
        if model.is_ceiling:
            arms = _observed(arms, labels, cells_per_perturbation, seed)
        new_doses = processor.unseen_doses(dict.fromkeys(arm.perturbation for arm in arms))
        if new_doses:
            logger.warning(f"{len(new_doses)} perturbations are at doses that no training cell had: {some(new_doses)}")
        total = sum(len(arm.cells) for arm in arms)
        note = "; ".join(f"{name}: {len(chosen[name])} of {len(rows)} control cells" for name, rows in groups.items())
        uns = processor.describe_output(model.config.gene_dim is not None, note, checkpoint)
        if lacking is not None:
            uns["missing_genes"] = lacking
        generator = None
        if sample_counts is not None:
            uns["X"] += f", of counts drawn with seed {sample_counts}"
            generator = torch.Generator(model.device).manual_seed(sample_counts)
        if model.is_ceiling:
            uns |= {"controls": "none", "ceiling": CEILING}
        unseen: dict[tuple[str, str], None] = {}
        with _whole_hdf5(output) as (file, check_disk), torch.inference_mode(), ExitStack() as stack:
            stack.enter_context(counted_elsewhere())
            rows = np.concatenate([np.concatenate(processor.cut(arm.cells)) for arm in arms])
            carried = (
                carried_columns(data.some_obs(slice(None), obs_columns), obs_columns, rows) if obs_columns else None
            )
            var = processor.output_var(data, input) if processor.vocabulary.genes else None
            _write_frame(file, processor, labels, arms, rows, model.config, uns, carried, var)
            bar = stack.enter_context(tqdm(total=total, unit="cells", unit_scale=True, disable=quiet, desc="predict"))
            writer = _Writer(file, processor, model.config, total, labels.index)
            reader = _Reader(processor, data, labels, missing_genes, input, model.device)
            for packed in _packs(processor, arms, batch_size, alone=generator is not None):
                batch, cells, mask = reader.batch(packed)
                if model.is_ceiling:
                    batch[LABELS] = batch[CONTROL_CELLS]
                if generator is None:
                    outputs = model(**batch)
                    if outputs.unseen is not None:
                        of_sentences = [unit for unit in packed for _ in unit.sentences]
                        for flag, unit in zip(outputs.unseen.tolist(), of_sentences):
                            if flag:
                                unseen[unit.arm.context, unit.arm.perturbation] = None
                    writer.write(packed, outputs, mask, cells)
                else:
                    drawn = model.sample_counts(**batch, generator=generator).cpu().numpy()[mask]
                    writer.write_main(packed, drawn, cells, counts=True)
                check_disk()
                bar.update(len(cells))
    if unseen:
        logger.warning(
            f"{len(unseen)} of {len(arms)} groups (context / perturbation) have a perturbation or a context without training "
            f"cells: {[' / '.join(group) for group in unseen][:10]}; the model card says how these are predicted"
        )
    counts = {"contexts": len(chosen), "perturbations": len({arm.perturbation for arm in arms})}
    return {"cells": total, **counts, "unseen": len(unseen)}


def claimed_output(
    output: str | os.PathLike, adata_path: str | os.PathLike, overwrite: bool
) -> AbstractContextManager[Path]:
    """
    Claim the file of predictions, see [`claimed_file`].

    Raises:
        ValueError: the output is the input file.
    """
    if Path(output).exists() and Path(adata_path).exists() and Path(output).samefile(adata_path):
        raise ValueError(f"{output} is the input file; write the predictions elsewhere")
    return claimed_file(output, overwrite)


def check_perturbations(model, encoded: dict[str, np.ndarray], processor: StateProcessor):
    """
    Check that a model can predict these perturbations, which its processor has encoded.

    Raises:
        UnseenPerturbationError: it cannot predict some of them, which are named.
    """
    try:
        model.check_perturbations(**{key: torch.from_numpy(v).to(model.device) for key, v in encoded.items()})
    except UnseenPerturbationError as error:
        raise UnseenPerturbationError(error.ids, error.reason, processor.vocabulary.perturbations) from None


def check_batches(processor: StateProcessor, names: np.ndarray):
    """ValueError that names the batches of cells that a model, which uses batches, was not trained on."""
    found = pd.unique(names)
    unknown = [name for name, number in zip(found, processor.encode_batches(found)) if number < 0]
    if unknown:
        several = processor.batch_datasets is not None and processor.dataset is None
        raise ValueError(
            f"control cells of batches without training cells: {some(unknown)}; "
            + (
                f"say which of the datasets {processor.batch_datasets} they are of (--dataset)"
                if several
                else f"the model knows {some(processor.vocabulary.batches)}, and predicts only from control cells of these"
            )
        )


@contextmanager
def counted_elsewhere() -> Iterator[None]:
    """Silence the model's warnings about what was not in training. The caller counts such cases over all batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnseenWarning)
        yield


def _at_doses(processor, perturbations: list[str] | None, doses: list[float] | None) -> list[str] | None:
    """Canonical names of the perturbations asked for, at each dose.

    Raises:
        ValueError: doses are given and no perturbation is named, or the model knows no doses.
    """
    if doses is None:
        return None if perturbations is None else list(dict.fromkeys(map(processor.canonical, perturbations)))
    if perturbations is None:
        raise ValueError("doses: name the perturbations that are predicted at them (--perturbation, or --all)")
    if processor.dose_key is None:
        raise ValueError(f"doses={doses}: {NO_DOSES}")
    of_parts = [len(processor.split_combination(name)) for name in perturbations]
    names = [
        processor.label_reader.at_doses(name, [dose] * number)
        for name, number in zip(perturbations, of_parts)
        for dose in doses
    ]
    return list(dict.fromkeys(names))


def _plan(processor, labels, chosen, perturbations) -> list[Arm]:
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
        for name in wanted[context]:
            arms.append(Arm(context, name, by_name[name], rows, first))
            first += len(rows)
    if not arms:
        raise ValueError(
            "nothing to predict: no perturbation was named, and the chosen contexts hold control cells alone; name "
            "some with --perturbation, or all that the model knows with --all"
        )
    return arms


def _observed(arms: list[Arm], labels: pd.DataFrame, at_most: int | None, seed: int) -> list[Arm]:
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
        rows = rows[order_of(cell_ids(labels.index[rows]), len(rows), seed)][:at_most]
        found.append(Arm(arm.context, arm.perturbation, arm.encoded, rows, first))
        first += len(rows)
    return found


@dataclass(eq=False)
class Unit:
    """
    Some sentences of an arm, which are predicted together.

    Args:
        arm ([`Arm`]): the arm of the sentences.
        sentences (`list[np.ndarray]`): the rows of the input that each sentence holds.
        first (`int`): the first row of the output that they fill.
    """

    arm: Arm
    sentences: list[np.ndarray]
    first: int

    @property
    def cells(self) -> int:
        return sum(map(len, self.sentences))


def _units(processor, arms: list[Arm], batch_size: int) -> Iterator[Unit]:
    """All sentences of the experiment, in blocks. Arms with the same cells follow one another block by block."""
    for _, group in itertools.groupby(arms, key=lambda arm: id(arm.cells)):
        alike = list(group)
        sentences = processor.cut(alike[0].cells)
        offset = 0
        for start in range(0, len(sentences), batch_size):
            block = sentences[start : start + batch_size]
            for arm in alike:
                yield Unit(arm, block, arm.first + offset)
            offset += sum(map(len, block))


def _packs(processor, arms: list[Arm], batch_size: int, alone: bool) -> Iterator[list[Unit]]:
    """
    Units that go through the model in one pass: together no more than `batch_size` full sentences, padding included.

    Args:
        alone (`bool`): one unit in each pass.
    """
    room = batch_size * processor.set_size
    packed: list[Unit] = []
    width = sentences = 0
    for unit in _units(processor, arms, batch_size):
        wider = max(width, *map(len, unit.sentences))
        if packed and (alone or (sentences + len(unit.sentences)) * wider > room):
            yield packed
            packed, sentences, wider = [], 0, max(map(len, unit.sentences))
        packed.append(unit)
        width, sentences = wider, sentences + len(unit.sentences)
    if packed:
        yield packed


class _Reader:
    """Makes the batches of a pass. Cells are read once for perturbations that follow one another and start from them."""

    def __init__(self, processor, data, labels: pd.DataFrame, missing_genes: str, input: str | None, device):
        self.processor, self.data, self.labels, self.device = processor, data, labels, device
        self._options = (missing_genes, input)
        self._rows, self._values = np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float32)

    def batch(self, packed: list[Unit]) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
        """The tensors of some units, their cells `(cells, feature_dim)` in the order of the sentences, and their mask."""
        processor, sentences = self.processor, [rows for unit in packed for rows in unit.sentences]
        rows = np.concatenate(sentences)
        wanted = np.unique(rows)
        if not np.array_equal(wanted, self._rows):
            self._rows, self._values = wanted, processor.features(self.data, wanted, *self._options)
        cells = self._values[np.searchsorted(wanted, rows)]
        layout = SentenceLayout([len(of) for of in sentences])
        each = np.repeat(np.arange(len(packed)), [len(unit.sentences) for unit in packed])
        batch = {
            CONTROL_CELLS: layout.spread(cells),
            CONTEXT_IDS: processor.encode_contexts([unit.arm.context for unit in packed])[each],
        }
        for key in packed[0].arm.encoded:
            batch[key] = np.stack([unit.arm.encoded[key] for unit in packed])[each]
        if processor.batch_key is not None:
            batch[BATCH_IDS] = layout.spread(processor.encode_batches(self.labels["batch"].to_numpy()[rows]))
        tensors = layout.batch(batch, masked=True)
        return {key: value.to(self.device) for key, value in tensors.items()}, cells, layout.mask


@contextmanager
def _whole_hdf5(output: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """
    An HDF5 file that appears whole or not at all, see [`whole_file`], and a function that raises the disk's error if a write
    has failed.
    """
    with whole_file(output) as partial, open(partial, "w+b", buffering=0) as raw:
        disk = _Disk(raw, output)
        try:
            with h5py.File(disk, "w") as file:
                yield file, disk.check
        finally:
            disk.check()


class _Disk:
    """
    The file object that h5py writes to. HDF5 cannot close a file whose writes fail. If it reads back what it could not write,
    it gets undefined memory, which ends the process. So a failed write raises nothing here: its error is kept, and `check`
    raises it. What is written from then on is kept in memory, from which HDF5 can read it back.
    """

    def __init__(self, raw: io.FileIO, output: Path):
        self._raw, self._output = raw, output
        self._error: BaseException | None = None
        self._place = 0
        self._kept: list[tuple[int, bytes]] = []  # the place and the content of each write, in order

    def check(self):
        if self._error is not None:
            with saying_disk_errors(self._output):
                raise self._error

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self._error is None:
                done += self._raw.write(view[done:])
        except BaseException as error:  # noqa: BLE001 - a signal's, too
            self._error = error
        if self._error is not None:
            self._kept.append((self._place, view.tobytes()))
        self._place += len(view)
        return len(view)

    def truncate(self, size: int) -> int:
        try:
            self._raw.truncate(size)
        except BaseException as error:  # noqa: BLE001 - a signal's, too
            self._error = self._error or error
        return size

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def readinto(self, data) -> int:
        view = memoryview(data).cast("B")
        start, stop = self._place, self._place + len(view)
        done = 0
        while done < len(view) and (read := self._raw.readinto(view[done:])):
            done += read
        view[done:] = bytes(len(view) - done)
        for place, kept in self._kept:
            first, last = max(start, place), min(stop, place + len(kept))
            if first < last:
                view[first - start : last - start] = kept[first - place : last - place]
        self._place = stop
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = self._raw.seek(offset, whence)
        if whence == os.SEEK_END:
            self._place = max([self._place, *(place + len(kept) for place, kept in self._kept)])
        return self._place

    def tell(self) -> int:
        return self._place

    def flush(self):
        """Do nothing, as the file is not buffered."""


def _write_frame(file, processor, labels, arms, rows, config, uns, carried, var):
    """Write all of the output except its matrices."""
    sizes = [len(arm.cells) for arm in arms]
    obs = processor.output_obs(
        np.repeat(np.array([arm.perturbation for arm in arms], dtype=object), sizes),
        np.repeat(np.array([arm.context for arm in arms], dtype=object), sizes),
        labels.index.to_numpy()[rows],
        labels["batch"].to_numpy()[rows] if "batch" in labels else None,
        carried=carried,
    )
    if var is None:
        var = pd.DataFrame(index=[f"dim_{i}" for i in range(config.output_dim)])
    obs = obs.astype(
        {name: "category" for name in obs.columns if name != "control_barcode" and obs[name].dtype == object}
    )
    ad.io.write_elem(file, "/", ad.AnnData(obs=obs, var=var, uns={"pertstate": uns}))
    if "raw" in file:  # an empty entry that anndata before 0.11 cannot read
        del file["raw"]


class _Writer:
    """Fills the matrices of an output file, block by block."""

    def __init__(self, file: h5py.File, processor: StateProcessor, config, total: int, barcodes: pd.Index):
        on_embedding = processor.values == Values.EMBEDDING
        self.processor, self.barcodes = processor, barcodes
        decoded = config.gene_dim is not None
        self.main = self._dataset(file, "X", (total, config.gene_dim if decoded else config.output_dim))
        self.embedding = self._dataset(file, "obsm/embedding", (total, config.output_dim)) if decoded else None
        self.control = self._dataset(
            file, "obsm/control" if on_embedding else "layers/control", (total, config.input_dim)
        )

    @staticmethod
    def _dataset(file: h5py.File, name: str, shape: tuple[int, int]) -> h5py.Dataset:
        if name in file:
            del file[name]
        dataset = file.create_dataset(name, shape, dtype="float32", chunks=(min(shape[0], 256), shape[1]))
        dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = "array", "0.2.0"
        return dataset

    def write(self, packed: list[Unit], outputs, mask: np.ndarray, controls: np.ndarray):
        predictions = outputs.predictions.float().cpu().numpy()[mask]
        if self.embedding is not None:
            names = self.processor.output_names(predictions.shape[1])
            check_predicted(predictions, names, lambda row: self._cell(packed, row))
            for rows, part in _places(packed):
                self.embedding[rows] = predictions[part]
            predictions = outputs.gene_predictions.float().cpu().numpy()[mask]
        self.write_main(packed, predictions, controls)

    def write_main(self, packed: list[Unit], predictions: np.ndarray, controls: np.ndarray, counts: bool = False):
        """Write X and the control cells of some units. Drawn `counts` are first converted to the units of predictions."""
        predictions = self.processor.as_predicted(predictions) if counts else predictions
        names = self.processor.vocabulary.genes or self.processor.output_names(predictions.shape[1])
        check_predicted(predictions, names, lambda row: self._cell(packed, row))
        controls = self.processor.as_predicted(controls)
        for rows, part in _places(packed):
            self.main[rows] = predictions[part]
            self.control[rows] = controls[part]

    def _cell(self, packed: list[Unit], row: int) -> str:
        """What errors call a cell of some units: its context and perturbation, and the barcode of its control cell."""
        of = [unit for unit in packed for _ in range(unit.cells)][row]
        barcode = self.barcodes[np.concatenate([rows for unit in packed for rows in unit.sentences])[row]]
        return f"{of.arm.context} / {of.arm.perturbation} (control cell {barcode!r})"


def _places(packed: list[Unit]) -> Iterator[tuple[slice, slice]]:
    """Rows of the output, each with the cells of a pass that fill them. Units that are neighbours there go together."""
    start = done = 0
    for unit, following in itertools.zip_longest(packed, packed[1:]):
        done += unit.cells
        if following is None or following.first != unit.first + unit.cells:
            first = unit.first + unit.cells - (done - start)
            yield slice(first, first + done - start), slice(start, done)
            start = done
