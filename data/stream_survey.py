"""The first look over a stream of cells: vocabularies, control cells to draw from, cells to evaluate on."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from pertstate.base.cell_source import (
    GROUP_KEYS,
    Block,
    CellSource,
    LazyBlock,
    fit_processor,
    further_processor,
    with_rows,
)
from pertstate.base.constants import Normalize, Split, Values
from pertstate.base.messages import closest, counted, given, some
from pertstate.base.value_scale import Scale, look_at
from pertstate.data.cell_pool import CellRows, Reservoirs
from pertstate.data.cells import Cells, check_names, sort_into_groups, trained_on
from pertstate.data.splits import Splits
from pertstate.data.stream_blocks import CellKey, CellReader, in_units_of
from pertstate.data.stream_reading import CellStream
from pertstate.processing import StateProcessor


Controls = dict[tuple[str, str], dict[str | None, np.ndarray]]


@dataclass
class StreamSurvey:
    """
    What [`survey_stream`] learned of a stream. Its size depends on the numbers of contexts and groups, and on how many
    cells of each are kept; it does not grow with the number of cells.

    Args:
        processor ([`StateProcessor`]): fitted on the training cells.
        splits ([`Splits`], *optional*): what is held out.
        control_matching (`str`): `"context"`, or `"batch"` where controls were sampled by batch.
        counts (`dict[tuple[str, str, str], int]`): cells of each (dataset, context, perturbation), control included.
        controls ([`CellRows`]): sample of the control cells.
        control_rows (`dict`): (dataset, context), then batch (None where controls match by context) to rows of
            `controls`.
        sampled ([`CellRows`], *optional*): sample of the cells of each perturbed group.
        sampled_rows (`dict[tuple[str, str, str], np.ndarray]`): (dataset, context, perturbation) to rows of `sampled`.
        batch_names (`list[str]`): names of the batches of `controls` and `sampled`.
        cells (`int`): rows that were looked at.
        complete (`bool`): whether these were all rows of the stream.
    """

    processor: StateProcessor
    splits: Splits | None
    control_matching: str
    counts: dict[tuple[str, str, str], int]
    controls: CellRows
    control_rows: Controls
    sampled: CellRows | None
    sampled_rows: dict[tuple[str, str, str], np.ndarray]
    batch_names: list[str]
    cells: int
    complete: bool

    def split_of(self, dataset: str, context: str, perturbation: str) -> str | None:
        """`"control"`, `"train"`, `"val"`, `"test"` or None (not used)."""
        if perturbation == self.processor.control:
            return Split.CONTROL
        return _split_of(self.splits, dataset, context, perturbation)

    @property
    def trained(self) -> set[tuple[str, str]]:
        """The (dataset, context) pairs with training cells."""
        return {key[:2] for key in self.counts if self.split_of(*key) == Split.TRAIN}

    def to_cells(self, *wanted: str) -> Cells | None:
        """
        The sampled cells of some splits and all sampled control cells, in memory. A [`SentenceDataset`] of those splits
        is made from them.

        Args:
            wanted (`str`): `"train"`, `"val"`, `"test"`.

        Returns:
            [`Cells`], or None where no cell of these splits was sampled.
        """
        groups = [(key, rows) for key, rows in self.sampled_rows.items() if self.split_of(*key) in wanted]
        if not groups or self.sampled is None:
            return None
        rows = np.concatenate([rows for _, rows in groups])
        control = self.processor.control
        labels = [(*key, self.split_of(*key)) for key, rows in groups for _ in rows]
        control_rows = []
        for (dataset, context), batches in self.control_rows.items():
            for part in batches.values():
                control_rows.append(part)
                labels += [(dataset, context, control, Split.CONTROL)] * len(part)
        cells = CellRows.join([self.sampled.take(rows), self.controls.take(np.concatenate(control_rows))])
        obs = pd.DataFrame(labels, columns=["dataset", "context", "perturbation", "split"])
        if cells.batches is not None:
            obs["batch"] = np.array(self.batch_names, dtype=object)[cells.batches]
        order, groups = sort_into_groups(obs)
        groups["split"] = obs["split"].to_numpy()[order][groups["start"]]
        return Cells(*cells.dense(order), groups)

    def to_state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """All but processor and splits, as values for JSON and arrays."""
        arrays = self.controls.to_arrays("controls")
        if self.sampled is not None:
            arrays |= self.sampled.to_arrays("sampled")
        values = {
            "control_matching": self.control_matching,
            "counts": [[*key, count] for key, count in self.counts.items()],
            "controls": [
                [*owner, batch, len(rows)]
                for owner, parts in self.control_rows.items()
                for batch, rows in parts.items()
            ],
            "sampled": [[*key, len(rows)] for key, rows in self.sampled_rows.items()],
            "batch_names": self.batch_names,
            "cells": self.cells,
            "complete": self.complete,
        }
        return values, arrays

    @classmethod
    def from_state(cls, state: dict, processor: StateProcessor, splits: Splits | None = None) -> "StreamSurvey":
        """The survey in a saved state of a [`SentenceStream`], with which training goes on without another look."""
        values, arrays = state["survey"], state["arrays"]
        control_rows: Controls = {}
        for (dataset, context, batch, _), rows in zip(values["controls"], _ranges(values["controls"])):
            control_rows.setdefault((dataset, context), {})[batch] = rows
        return cls(
            processor=processor,
            splits=splits,
            control_matching=values["control_matching"],
            counts={tuple(key): count for *key, count in values["counts"]},
            controls=CellRows.from_arrays(arrays, "controls"),
            control_rows=control_rows,
            sampled=CellRows.from_arrays(arrays, "sampled") if values["sampled"] else None,
            sampled_rows={tuple(key): rows for (*key, _), rows in zip(values["sampled"], _ranges(values["sampled"]))},
            batch_names=list(values["batch_names"]),
            cells=values["cells"],
            complete=values["complete"],
        )


class StreamSample(CellSource):
    """
    The cells that a first look over a stream kept, as a source: its groups are those of the whole look, its cells a sample
    of them.

    Args:
        reader ([`StateProcessor`]): how labels are read.
        counts (`dict[CellKey, int]`): cells of each group that were seen.
        cells ([`CellReader`]): read the sample.
        samples (list of `(CellRows, dict)`): cells as they stand in the stream, and of each (dataset, context,
            perturbation) the rows of its cells among them.
    """

    def __init__(self, reader: StateProcessor, counts: dict[CellKey, int], cells: CellReader, samples: list):
        self.reader, self._cells, self._samples = reader, cells, samples
        keys = [name for name in GROUP_KEYS if name != "batch" or reader.batch_key is not None]
        groups = pd.DataFrame([key[: len(keys)] for key in sorted(counts)], columns=keys, dtype=object)
        self.groups = with_rows(groups, np.array([counts[key] for key in sorted(counts)], dtype=np.int64))
        self.genes = cells.genes or []
        self.expression = None if cells.genes is None else f"column {cells.source.columns.gene_values!r}"
        self.embedding_dim = samples[0][0].features.shape[1] if cells.embedded else None

    def kinds(self) -> set[str]:
        """What blocks are alone, and where none of them is of whole numbers, what all cells together are."""
        kinds = set(self._cells.kinds)
        return kinds if Values.COUNTS in kinds else {self._look().values}

    def scale(self) -> Scale | None:
        if self.expression is None:
            return None
        return Scale(Values.COUNTS) if Values.COUNTS in self._cells.kinds else self._look()

    @cache  # noqa: B019 - of one look
    def _look(self) -> Scale:
        cells = self._samples[0][0]  # controls
        matrix = given("expression", cells.genes if self._cells.embedded else cells.features)[:2000]
        scale = look_at(matrix)
        # Only some of the genes were read: the totals of the others are missing.
        return scale if len(self.genes) == len(self._cells.source.genes or ()) else replace(scale, total=None)

    @contextmanager
    def blocks(self, wanted: np.ndarray | None = None, genes: list[str] | None = None) -> Iterator[list[LazyBlock]]:
        keys = list(self.groups[list(GROUP_KEYS[:3])].itertuples(index=False, name=None))
        # The batch of a cell does not matter here: the first group of its other labels stands for them.
        code_of = {key: code for code, key in reversed(list(enumerate(keys))) if wanted is None or wanted[code]}
        columns = None if genes is None else pd.Index(self.genes).get_indexer(genes)
        yield [
            (len(rows), partial(self._read, cells, rows, code_of[key], columns))
            for cells, of_key in self._samples
            for key, rows in of_key.items()
            if key in code_of and len(rows)
        ]

    def _read(self, cells: CellRows, rows: np.ndarray, code: int, columns: np.ndarray | None) -> Block:
        taken = cells.take(rows)
        expression = taken.genes if self._cells.embedded else taken.features
        if expression is not None and columns is not None:
            expression = expression[:, columns]
        counts = Values.LOG1P not in self.kinds() and self.scaled or self.kinds() <= {Values.COUNTS, Values.ZEROS}
        embedding = taken.features if self._cells.embedded else None
        return Block(rows, np.full(len(rows), code), expression, taken.totals if counts else None, embedding)

    def in_units_of(self, processor: StateProcessor, cells: CellRows) -> CellRows:
        """Some cells of the sample as a model reads them."""
        places = pd.Index(self.genes).get_indexer(processor.vocabulary.genes)
        if self._cells.embedded:
            genes = None if cells.genes is None else cells.genes[:, places]
            return in_units_of(processor, replace(cells, genes=genes))
        return in_units_of(processor, replace(cells, features=cells.features[:, places]))


def survey_stream(
    source: CellStream,
    splits: Splits | None = None,
    processor: StateProcessor | None = None,
    genes: int | list[str] | None = None,
    normalize: str = Normalize.AUTO,
    target_sum: float | str | None = None,
    control_matching: str = "context",
    reservoir_cells: int = 2048,
    fill_cells: int | None = None,
    eval_cells: int = 0,
    baseline_cells: int = 0,
    seed: int = 0,
    progress: bool = True,
    **reading,
) -> StreamSurvey:
    r"""
    Read a stream once before training: labels and kind of values for the processor, a random sample of the control
    cells of each context, and (where asked for) a sample of each held-out group.

    Every process takes it over the whole stream, not over its own part, so that all have the same processor and model.

    Args:
        source ([`CellStream`]): the stream.
        splits ([`Splits`], *optional*): what is held out; its datasets need no files. By default nothing is held out.
        processor ([`StateProcessor`], *optional*): of a checkpoint that is trained further.
        genes (`int`, `list[str]` or None): the model's genes: this many highly variable ones of the sampled training cells
            and controls, the ones listed, or all of the stream.
        normalize: as in [`StateProcessor.fit`].
        target_sum (`float`, `"median"` or None): as in [`StateProcessor.fit`]; the median is that of the sampled training
            cells and controls.
        control_matching (`str`): which controls belong to a perturbed cell.

            - `"context"`: those of its dataset and context
            - `"batch"`: those of its dataset, context and batch; where none was sampled, those of the context
        reservoir_cells (`int`): control cells that are kept for each context. By batch, the batches of a context
            share them equally; batches times `set_size` leaves no sentence short.
        fill_cells (`int`, *optional*): stop after about so many rows (whole blocks; shards come in random order). A label
            that first comes up later is then an error in training. By default the whole stream is read.
        eval_cells (`int`): cells that are kept of each held-out group, for [`StreamSurvey.to_cells`].
        baseline_cells (`int`): cells that are kept of each training group; the baselines of an evaluation learn from
            them.
        seed (`int`): seed of the samples.
        progress (`bool`): show a progress bar.
        reading: the arguments of [`StateProcessor`] that say how files are read (`control`, `input`, `gene_input`,
            `combination_separator`, ..), `set_size` and `perturbation_features`. The columns of labels are by default those
            of the stream.

    Raises:
        KeyError: the stream lacks genes of the model.
        ValueError: a label is missing, values are wrong or of two kinds, there are no controls at all or in a training
            context, nothing is left for training, or the splits name what is not there.
    """
    if control_matching not in ("context", "batch"):
        raise ValueError(f"control_matching={control_matching!r}; {closest(control_matching, ('context', 'batch'))}")
    columns = source.columns
    if control_matching == "batch" and columns.batch is None:
        raise ValueError("control_matching='batch' needs the column with each cell's batch; name it with batch=")
    if fill_cells is not None and fill_cells < 1:
        raise ValueError(f"fill_cells={fill_cells}: expected at least 1 row, or None for all")
    template = processor
    if template is None:
        keys = {"perturbation_key": columns.perturbation, "context_key": columns.context, "batch_key": columns.batch}
        template = StateProcessor(**{**keys, "dose_key": columns.dose, **reading})
    source.read_labels_as(template.label_reader)
    embedded = template.input.startswith("obsm/")
    if template.gene_input is not None and not embedded:
        raise ValueError(
            f"gene_input={template.gene_input!r} is for a model on embeddings; input={template.input!r} is expression itself"
        )
    listed = (
        list(map(str, genes)) if isinstance(genes, list) else None if processor is None else processor.vocabulary.genes
    )
    batch_names: list[str] = []
    reader = CellReader(
        source,
        embedded,
        None if embedded and template.gene_input is None else (listed or source.gene_table[0]),
        batch_names if columns.batch is not None else None,
    )
    generator = np.random.default_rng([seed, source.num_shards])
    controls = Reservoirs(reservoir_cells, generator)
    samples = {
        split: Reservoirs(capacity, generator)
        for split, capacity in ((Split.TRAIN, baseline_cells), (Split.VAL, eval_cells), (Split.TEST, eval_cells))
        if capacity
    }
    counts: Counter[CellKey] = Counter()
    contexts: set[str] = set()
    cells, complete = 0, True
    with tqdm(desc="first look", unit=" cells", unit_scale=True, disable=not progress) as bar:
        for block, _ in source.blocks(generator.permutation(source.num_shards)):
            of_control: list[tuple] = []
            of_split: dict[str, list[tuple]] = {split: [] for split in samples}
            for key, rows in block.groups():
                contexts.add(key.context)
                _check_dataset(splits, key, block.where(rows[0]))
                if not source.uses(key.context):
                    continue
                counts[key] += len(rows)
                if key.perturbation == template.control:
                    of_control.append((key[:2], key.batch if control_matching == "batch" else None, rows))
                    continue
                split = _split_of(splits, *key[:3])
                if split in of_split:
                    of_split[split].append((key[:3], None, rows))
            offers = [(controls, _together(of_control))]
            offers += [(samples[split], _together(groups)) for split, groups in of_split.items()]
            for reservoirs, groups in offers:
                if groups:
                    reservoirs.offer(groups, partial(reader.read, block))
            cells += len(block)
            bar.update(len(block))
            if fill_cells is not None and cells >= fill_cells:
                complete = False
                break
    if cells == 0:
        raise ValueError("the stream holds no cells")
    _check_contexts(source.contexts, contexts, complete)
    survey = StreamSurvey(
        processor=template,
        splits=splits,
        control_matching=control_matching,
        counts=_without_batch(counts),
        controls=CellRows(np.zeros((0, 0), dtype=np.float32)),
        control_rows={},
        sampled=None,
        sampled_rows={},
        batch_names=batch_names,
        cells=cells,
        complete=complete,
    )
    if not controls.owners():
        found = sorted({key.perturbation for key in counts})
        raise ValueError(
            f"no control cells among {cells} rows: none has {columns.perturbation!r} == {template.control!r}, "
            f"found {some(found)}; say which label marks the controls with control=, or raise fill_cells"
        )
    if not survey.trained:
        raise ValueError(
            f"the splits leave no cell for training among {cells} rows; hold out fewer contexts or perturbations"
        )
    if complete and splits is not None:
        splits.assign(_present(survey.counts, template.control))

    # The sample says what the values are; then it is turned into what the model reads.
    of_controls, slots = _gather([controls])
    for owner, part, rows in slots:
        survey.control_rows.setdefault(owner, {})[part] = rows
    control_rows = {
        (*owner, template.control): np.concatenate([*of.values()]) for owner, of in survey.control_rows.items()
    }
    kept = [(of_controls, control_rows)]
    if any(reservoirs.owners() for reservoirs in samples.values()):
        sampled, slots = _gather([reservoirs for reservoirs in samples.values() if reservoirs.owners()])
        survey.sampled_rows = {owner: rows for owner, _, rows in slots}
        kept.append((sampled, survey.sampled_rows))
    sample = StreamSample(template, counts, reader, kept)
    groups = sample.groups.assign(
        split=[survey.split_of(*key) or Split.UNUSED for key in sample.groups[list(GROUP_KEYS[:3])].to_numpy()]
    )
    trained = np.ones(len(groups), dtype=bool) if splits is None else trained_on(groups, splits)
    if processor is None:
        survey.processor = fit_processor(sample, template, trained, genes, normalize, target_sum)
    else:
        survey.processor = further_processor(sample, processor, trained)
    check_names(groups, survey.processor)
    survey.controls, *rest = [sample.in_units_of(survey.processor, rows) for rows, _ in kept]
    survey.sampled = rest[0] if rest else None
    check_controls(sorted(survey.trained - set(survey.control_rows)))
    return survey


def check_controls(lonely: list[tuple[str, str]]):
    """ValueError for contexts of perturbed cells without control cells."""
    if lonely:
        raise ValueError(
            f"{counted(len(lonely), 'context')} with training cells and without control cells: "
            f"{some([' / '.join(pair) for pair in lonely])}; raise fill_cells (controls may come later in the stream), "
            "add controls, or leave these contexts out with contexts="
        )


def _split_of(splits: Splits | None, dataset: str, context: str, perturbation: str) -> str | None:
    return Split.TRAIN if splits is None else splits.split_of(dataset, context, perturbation)


def _check_dataset(splits: Splits | None, key: CellKey, where: str):
    if splits is not None and key.dataset not in splits.datasets:
        raise ValueError(
            f"{where} is of dataset {key.dataset!r}, which the splits do not name; {closest(key.dataset, splits.datasets)}"
        )


def _check_contexts(asked: list[str] | None, found: set[str], complete: bool):
    for context in asked or []:
        if complete and context not in found:
            raise ValueError(f"contexts names {context!r}, which is not in the data; {closest(context, sorted(found))}")


def _without_batch(counts: "Counter[CellKey]") -> dict[tuple[str, str, str], int]:
    summed: dict[tuple[str, str, str], int] = {}
    for key, count in counts.items():
        summed[key[:3]] = summed.get(key[:3], 0) + count
    return summed


def _present(counts: dict[tuple[str, str, str], int], control: str) -> dict[tuple[str, str], list[str]]:
    present: dict[tuple[str, str], list[str]] = {}
    for dataset, context, name in counts:
        names = present.setdefault((dataset, context), [])
        if name != control:
            names.append(name)
    return present


def _together(groups: list) -> list:
    """Rows of one owner and part in one group."""
    joined: dict = {}
    for owner, part, rows in groups:
        joined.setdefault((owner, part), []).append(rows)
    return [(owner, part, np.sort(np.concatenate(rows))) for (owner, part), rows in joined.items()]


def _gather(several: list[Reservoirs]) -> tuple[CellRows, list]:
    """All cells of some reservoirs, and (owner, part, rows among them)."""
    cells, found, before = [], [], 0
    for reservoirs in several:
        for owner in reservoirs.owners():
            for part, slots in reservoirs.parts(owner).items():
                cells.append(reservoirs.pool.take(slots))
                found.append((owner, part, before + np.arange(len(slots))))
                before += len(slots)
    return CellRows.join(cells), found


def _ranges(keys: list[list]) -> list[np.ndarray]:
    """Rows of consecutive groups, whose sizes stand last in each of `keys`."""
    sizes = [key[-1] for key in keys]
    return [np.arange(end - size, end) for size, end in zip(sizes, np.cumsum(sizes).tolist())]
