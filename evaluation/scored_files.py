"""How the predicted and the real cells of two files are read to be scored, in one process or by the workers of a cluster."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from pertstate.base.bounded_text import parse_json
from pertstate.base.cell_ids import cell_ids, order_of
from pertstate.base.constants import Values
from pertstate.base.labels import control_settings
from pertstate.base.messages import given
from pertstate.base.processor_files import PROCESSOR_SETTINGS, check_settings
from pertstate.data.group_means import GroupMeans
from pertstate.data.in_memory import CellData, name_of, open_cells
from pertstate.data.reading import AnnDataFile, naming
from pertstate.evaluation.baselines import Baselines
from pertstate.evaluation.compared_genes import ComparedGenes, compared_genes
from pertstate.evaluation.group_scores import baselines_of
from pertstate.evaluation.read_ahead import read_ahead
from pertstate.evaluation.scoring import Group, GroupResult, Predicted, RealCells, score_groups
from pertstate.processing import StateProcessor, Vocabulary


@dataclass
class ScoredFiles:
    """
    Two files that are scored against one another.

    Args:
        predicted, real: `.h5ad`, `.zarr` or AnnData with the predicted and the real cells.
        keys (`dict`): how to read the real cells, see [`~pertstate.evaluation.comparison.evaluate`].
        contexts (`list[str]`, *optional*): those that are asked for. One alone names that of all cells, where a file has no such column.
        common_genes (`bool`): score the genes that both have.
        convert_scale (`bool`): convert log1p values of the real cells whose total is another one.
    """

    predicted: CellData
    real: CellData
    keys: dict[str, Any]
    contexts: list[str] | None
    common_genes: bool
    convert_scale: bool

    def open(self, stack: ExitStack) -> "OpenFiles":
        """The files, until the stack is closed."""
        truth = stack.enter_context(open_cells(self.real))
        guess = stack.enter_context(open_cells(self.predicted))
        reader, scorer = readers_of(guess, self.keys)
        if lacks_contexts(scorer, truth) and self.contexts is not None and len(self.contexts) == 1:
            reader, scorer = readers_of(guess, {**self.keys, "context": self.contexts[0]})
        return OpenFiles(truth, guess, reader, scorer)


@dataclass
class OpenFiles:
    """Open files, the processor that reads predicted cells as they are, and the one that reads real cells in the same units and genes."""

    truth: AnnDataFile
    guess: AnnDataFile
    reader: StateProcessor
    scorer: StateProcessor


@dataclass
class ScoringJob:
    """
    The scores of some groups of two files, which any process can find that sees the files: the figures do not depend on which others
    it scores.

    Args:
        files ([`ScoredFiles`]): the files.
        groups (`list[Group]`): the groups; those of a context follow one another.
        means ([`GroupMeans`], *optional*): what the baselines know, of the scored genes.
        seed, max_cells, samples, metrics: see [`score_groups`].
    """

    files: ScoredFiles
    groups: list[Group]
    means: GroupMeans | None
    seed: int
    max_cells: int | None
    samples: int
    metrics: tuple[str, ...]

    def __call__(self) -> list[GroupResult]:
        with ExitStack() as stack:
            files = self.files.open(stack)
            compared = compared_genes(files.scorer, files.truth, name_of(self.files.real), self.files.common_genes, [])
            scorer = compared.scorer
            scorer.check_scale(files.truth, convert=self.files.convert_scale)
            with naming(name_of(self.files.real)):
                real_labels = scorer.labels(files.truth)
            with naming(name_of(self.files.predicted)):
                labels = files.reader.labels(files.guess)
            cells = real_cells_of_file(
                scorer, files.truth, real_labels, sorted({context for _, context, _ in self.groups})
            )
            found = predicted_cells_of_file(
                files.reader, files.guess, labels, self.groups, cells, scorer.control, self.seed, self.max_cells
            )
            return list(
                score_groups(
                    cells,
                    of_scored_genes(found, compared),
                    scorer.control,
                    scored_baselines(self.means, scorer),
                    self.seed,
                    self.max_cells,
                    self.samples,
                    metrics=self.metrics,
                    order=self.groups,
                )
            )


def of_scored_genes(
    found: Iterator[tuple[Group, Predicted]], compared: ComparedGenes
) -> Iterator[tuple[Group, Predicted]]:
    """The predicted cells of groups with the genes that are scored alone."""
    return ((group, replace(of, cells=compared.of_predicted(of.cells))) for group, of in found)


def scored_baselines(means: GroupMeans | None, scorer: StateProcessor) -> Baselines:
    """The baselines that learn from such means; expression is not below 0."""
    return baselines_of(means, scorer, clip=scorer.values != Values.EMBEDDING)


def real_cells_of_file(
    scorer: StateProcessor, truth: AnnDataFile, labels: pd.DataFrame, contexts: list[str]
) -> RealCells:
    """
    The real cells of a file. ValueError if a context has no control cells.

    Args:
        scorer ([`StateProcessor`]): reads them in the units of predictions.
        truth ([`AnnDataFile`]): the file.
        labels (`pandas.DataFrame`): the labels of its cells.
        contexts (`list[str]`): the contexts that are scored.
    """
    scorer.control_groups(labels, contexts)
    grouped = labels.reset_index(drop=True).groupby(["context", "perturbation"], observed=True, sort=False).indices
    ids = cell_ids(labels.index)
    return RealCells(
        {("", str(context), str(name)): np.asarray(rows) for (context, name), rows in grouped.items()},
        lambda rows: ids[rows],
        lambda rows: _in_order(rows, lambda taken: scorer.as_predicted(scorer.features(truth, taken))),
    )


def _in_order(rows: np.ndarray, read) -> np.ndarray:
    """The cells of some rows, in the order of `rows`. They are read in the order of the file."""
    order = np.argsort(rows, kind="stable")
    found = read(rows[order])
    cells = np.empty_like(found)
    cells[order] = found
    return cells


def predicted_cells_of_file(reader, guess, labels, groups, cells: RealCells, control, seed, max_cells):
    """The predicted cells of each group of a file, in the order in which they are drawn."""
    grouped = labels.reset_index(drop=True).groupby(["context", "perturbation"], observed=True, sort=False).indices
    barcodes = (
        guess.some_obs(slice(None), ["control_barcode"])["control_barcode"].astype(str)
        if "control_barcode" in guess.obs_columns
        else None
    )
    ids = cell_ids(labels.index if barcodes is None else barcodes)
    of_context: dict[str, np.ndarray] = {}
    rows_of = [np.asarray(grouped[context, name]) for _, context, name in groups]
    rows_of = [rows[order_of(ids[rows], len(rows), seed)][:max_cells] for rows in rows_of]
    read = read_ahead(
        rows_of, lambda rows: _in_order(rows, lambda taken: reader.as_predicted(reader.features(guess, taken)))
    )
    for group, rows, found in zip(groups, rows_of, read, strict=True):
        if group[1] not in of_context:
            of_context = {group[1]: given("ids", cells.ids)(cells.rows(("", group[1], control), seed, max_cells))}
        # True if each cell was predicted from the control cell that is drawn at its place.
        paired = barcodes is not None and np.array_equal(ids[rows], of_context[group[1]][: len(rows)])
        yield group, Predicted(found, paired)


def lacks_contexts(scorer: StateProcessor, data: AnnDataFile) -> bool:
    """Whether a file lacks the column of contexts, so that the one context of all cells has to be named."""
    key = scorer.context_key
    return scorer.context is None and not set([key] if isinstance(key, str) else key or []) <= set(data.obs_columns)


def scorer_of(processor: StateProcessor, config, keys: dict | None = None) -> StateProcessor:
    """A processor that reads real cells in the units and genes of a model's predictions."""
    settings = {name: value for name, value in (keys or {}).items() if value is not None}
    if "control" in settings:
        settings |= control_settings(settings["control"])
    settings = {**{name: getattr(processor, name) for name in PROCESSOR_SETTINGS}, **settings}
    if config.gene_dim is None:
        settings["gene_input"] = None
    return _scorer(settings, processor.vocabulary.genes or [f"dim_{i}" for i in range(config.output_dim)])


def _scorer(settings: dict, genes: list[str]) -> StateProcessor:
    """A processor as of [`scorer_of`], from settings and from the names of the features that are predicted."""
    settings = dict(settings)
    if settings.get("gene_input") is not None:
        # The expression that a gene decoder predicts is in X. The real expression is where the decoder's target was.
        settings |= {"input": settings["gene_input"], "gene_input": None, "values": Values.LOG1P}
    if settings.get("context") is not None:
        settings["context_key"] = None
    settings |= control_settings(settings.get("control", "control")) if "control_labels" not in settings else {}
    settings["batch_key"] = None
    if settings.get("values") == Values.EMBEDDING:
        return StateProcessor(**{**settings, "vocabulary": Vocabulary(), "feature_dim": len(genes)})
    return StateProcessor(**{**settings, "vocabulary": Vocabulary(genes=genes)})


def about(guess: AnnDataFile) -> dict:
    """What a file of predictions says of itself."""
    said = guess.uns.get("pertstate", {})
    if not isinstance(said, dict):
        raise ValueError(
            f"{guess.path}: uns['pertstate']: expected a mapping, found a {type(said).__name__}; predict again"
        )
    return said


def _recorded_settings(guess: AnnDataFile) -> dict | None:
    """How real cells were read, as predictions record it; None where they do not. ValueError where no processor wrote it."""
    recorded = about(guess).get("processor")
    if recorded is None:
        return None
    where = f"{guess.path}: uns['pertstate']['processor']"
    try:
        settings = parse_json(str(recorded))
    except ValueError as error:
        raise ValueError(f"{where} is not whole JSON ({error}); predict again") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{where}: expected the settings of a processor, found a {type(settings).__name__}; predict again"
        )
    check_settings({"feature_dim": max(1, len(guess.var_names)), **settings}, where)
    return settings


def readers_of(guess: AnnDataFile, keys: dict | None = None) -> tuple[StateProcessor, StateProcessor]:
    """Two processors: one reads predicted cells as they are, the other reads real cells in the same units and genes."""
    settings = {name: value for name, value in (keys or {}).items() if value is not None}
    if "control" in settings:
        settings |= control_settings(settings["control"])
    recorded = _recorded_settings(guess)
    if recorded is not None:
        settings = {**recorded, **settings}
    genes = [str(gene) for gene in guess.var_names]
    truth = _scorer(settings, genes)
    # The columns of predictions are those that were recorded, whatever those of the real cells are. Their values are not
    # checked: a model's counts are not whole numbers, and its expression may be negative.
    recorded_by = truth if recorded is None else StateProcessor(**recorded)
    as_they_are = StateProcessor(values=Values.EMBEDDING, feature_dim=len(guess.var_names), **recorded_by.of_output())
    return as_they_are, truth
