"""The first look over a stream of cells: vocabularies, control cells to draw from, cells to evaluate on."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from pertstate.base.cell_values import kind_of_values, resolve_normalisation, resolve_target_sum
from pertstate.base.constants import Normalize, Split, Values
from pertstate.base.messages import closest, some
from pertstate.base.processor_files import PROCESSOR_SETTINGS
from pertstate.base.vocabulary import PerturbationFeatures, Vocabulary
from pertstate.data.cell_pool import CellRows, Reservoirs
from pertstate.data.cells import Cells, check_names, sort_into_groups
from pertstate.data.splits import Splits
from pertstate.data.stream_blocks import CellKey, CellReader
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


def survey_stream(
    source: CellStream,
    splits: Splits | None = None,
    processor: StateProcessor | None = None,
    control: str = "control",
    genes: list[str] | None = None,
    input: str = "X",
    gene_input: str | None = None,
    normalize: str = Normalize.AUTO,
    combination_separator: str | None = "+",
    set_size: int = 128,
    target_sum: float | None = None,
    perturbation_features: PerturbationFeatures | None = None,
    control_matching: str = "context",
    reservoir_cells: int = 2048,
    fill_cells: int | None = None,
    eval_cells: int = 0,
    baseline_cells: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> StreamSurvey:
    r"""
    Read a stream once before training: labels and kind of values for the processor, a random sample of the control
    cells of each context, and (where asked for) a sample of each held-out group.

    Every process takes it over the whole stream, not over its own part, so that all have the same processor and model.

    Args:
        source ([`CellStream`]): the stream.
        splits ([`Splits`], *optional*): what is held out; its datasets need no files. By default nothing is held out.
        processor ([`StateProcessor`], *optional*): of a checkpoint that is trained further.
        control (`str`): the name of unperturbed cells.
        genes (`list[str]`, *optional*): the model's genes, all of the stream by default. Highly variable genes are
            chosen beforehand, on some files in memory.
        input (`str`): `"X"` for expression; `"obsm/NAME"` for the stream's embedding, by the name that it has in AnnData.
        gene_input (`str`, *optional*): for an embedding with a gene decoder, `"X"` or `"layers/NAME"`.
        normalize, combination_separator, set_size, perturbation_features: as in [`StateProcessor.fit`].
        target_sum (`float`, *optional*): what counts are scaled to, a cell; 10,000 by default. A median is not taken on
            a stream.
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

    Raises:
        KeyError: the stream lacks genes of the model.
        ValueError: a label is missing, values are wrong or of two kinds, there are no controls at all or in a training
            context, nothing is left for training, or the splits name what is not there.
    """
    if control_matching not in ("context", "batch"):
        raise ValueError(f"control_matching={control_matching!r}; {closest(control_matching, ('context', 'batch'))}")
    if control_matching == "batch" and source.columns.batch is None:
        raise ValueError("control_matching='batch' needs the column with each cell's batch; name it with batch=")
    if normalize not in Normalize.OPTIONS:
        raise ValueError(f"normalize={normalize!r}; {closest(normalize, Normalize.OPTIONS)}")
    if fill_cells is not None and fill_cells < 1:
        raise ValueError(f"fill_cells={fill_cells}: expected at least 1 row, or None for all")
    template = processor
    if template is None:
        template = StateProcessor(
            vocabulary=Vocabulary(_genes_of_model(source, genes, input, gene_input)),
            perturbation_key=source.columns.perturbation,
            control=control,
            context_key=source.columns.context,
            batch_key=source.columns.batch,
            input=input,
            gene_input=gene_input,
            combination_separator=combination_separator or None,
            set_size=set_size,
            perturbation_features=perturbation_features,
        )
    with_batches = source.columns.batch is not None
    batch_names: list[str] = []
    reader = CellReader(source, processor, batch_names if with_batches else None) if processor is not None else None
    settled = processor is not None
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
                if not groups:
                    continue
                if reader is None or not settled:
                    rows = np.concatenate([rows for *_, rows in groups])
                    values, settled = _settle(source, template, normalize, target_sum, block, rows)
                    reader = CellReader(source, values, batch_names if with_batches else None)
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
    if reader is None or not controls.owners():
        found = sorted({key.perturbation for key in counts})
        raise ValueError(
            f"no control cells among {cells} rows: none has {source.columns.perturbation!r} == {template.control!r}, "
            f"found {some(found)}; say which label marks the controls with control=, or raise fill_cells"
        )
    if not survey.trained:
        raise ValueError(f"the splits leave no cell for training among {cells} rows")
    if complete and splits is not None:
        splits.assign(_present(survey.counts, template.control))
    survey.processor = processor if processor is not None else _fit(reader.processor, counts, splits)
    labels = [(key[2], survey.split_of(*key)) for key in survey.counts]
    check_names(pd.DataFrame(labels, columns=["perturbation", "split"]), survey.processor)
    survey.controls, slots = _gather([controls])
    for owner, part, rows in slots:
        survey.control_rows.setdefault(owner, {})[part] = rows
    if any(reservoirs.owners() for reservoirs in samples.values()):
        survey.sampled, slots = _gather([reservoirs for reservoirs in samples.values() if reservoirs.owners()])
        survey.sampled_rows = {owner: rows for owner, _, rows in slots}
    check_controls(sorted(survey.trained - set(survey.control_rows)))
    return survey


def check_controls(lonely: list[tuple[str, str]]):
    """ValueError for contexts of perturbed cells without control cells."""
    if lonely:
        raise ValueError(
            f"{len(lonely)} contexts have training cells and no control cells: "
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


def _genes_of_model(source: CellStream, genes, input: str, gene_input: str | None) -> list[str]:
    if isinstance(genes, (int, np.integer, str)):
        raise ValueError(
            f"genes={genes!r}: expected a list of gene names; highly variable genes are not chosen on a stream, choose "
            "them on some files in memory (StateProcessor.fit) and give their names"
        )
    embedding = input.startswith("obsm/")
    if gene_input is not None and not embedding:
        raise ValueError(
            f"gene_input={gene_input!r} is for a model on embeddings; input={input!r} is expression itself"
        )
    if embedding and gene_input is None:
        return []
    if genes is not None:
        return [str(gene) for gene in genes]
    if source.genes is None:
        raise ValueError(
            "the stream has no expression; name its columns gene_ids and gene_values, or use input='obsm/NAME'"
        )
    return list(source.genes)


def _settle(
    source: CellStream, template: StateProcessor, normalize: str, target_sum, block, rows: np.ndarray
) -> tuple[StateProcessor, bool]:
    """A processor that knows what the values are, and whether these cells showed it (cells that are all 0 do not)."""
    settings = {name: getattr(template, name) for name in PROCESSOR_SETTINGS}
    embedding, decoder = template.input.startswith("obsm/"), template.gene_input is not None
    settled, values = True, Values.EMBEDDING
    if not embedding or decoder:
        kind = kind_of_values(block.expression(rows))
        settled = kind != Values.ZEROS
        settings["normalize"], values = resolve_normalisation(
            normalize, {kind}, f"column {source.columns.gene_values!r}"
        )
    elif normalize == Normalize.COUNTS_TO_LOG1P:
        raise ValueError(
            f"normalize='counts_to_log1p' is for counts; input={template.input!r} is an embedding: use 'none'"
        )
    if embedding and values == Values.COUNTS:
        raise ValueError("the gene decoder predicts log1p expression, the stream holds counts: use normalize='auto'")
    if target_sum is not None:
        settings["target_sum"] = resolve_target_sum(target_sum, settings["normalize"], "the stream", _no_median)
    if embedding and source.columns.embedding is None:
        raise ValueError(f"input={template.input!r} is an embedding; name its column with embedding=")
    settings["values"] = Values.EMBEDDING if embedding else values
    settings["feature_dim"] = block.embedding(rows).shape[1] if embedding else len(template.vocabulary.genes)
    settings["perturbation_features"] = template.perturbation_features
    return StateProcessor(vocabulary=template.vocabulary, **settings), settled


def _no_median() -> np.ndarray:
    raise ValueError(
        "target_sum='median' is not taken on a stream, which would be read once more for it; give a number"
    )


def _fit(values: StateProcessor, counts: "Counter[CellKey]", splits: Splits | None) -> StateProcessor:
    """The processor with the vocabularies of the training cells, as `load_cells` takes them."""
    names, contexts, batches = set(), set(), set()
    for key in counts:
        if key.perturbation == values.control:
            training = splits is None or (key.dataset in splits.training and splits.split_of_context(*key[:2]) is None)
        else:
            training = _split_of(splits, *key[:3]) == Split.TRAIN
        if training:
            names.update(values.split_combination(key.perturbation))
            contexts.add(key.context)
            batches.update([] if key.batch is None else [key.batch])
    settings = {name: getattr(values, name) for name in (*PROCESSOR_SETTINGS, "feature_dim")}
    settings["perturbation_features"] = values.perturbation_features
    if values.perturbation_features is not None:
        values.perturbation_features.check_covers(names, "of the training cells")
    vocabulary = Vocabulary(values.vocabulary.genes, sorted(names), sorted(contexts), sorted(batches))
    return StateProcessor(vocabulary=vocabulary, **settings)


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
