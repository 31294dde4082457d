"""Scores predicted cells of a file, or of a model, against the real cells of another file, beside the baselines."""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from pertstate.base.bounded_text import parse_json
from pertstate.base.cell_ids import cell_ids, order_of
from pertstate.base.constants import Split, Values
from pertstate.base.files import whole_file
from pertstate.base.labels import control_settings
from pertstate.base.messages import given
from pertstate.base.outputs import claimed_file
from pertstate.base.processor_files import PROCESSOR_SETTINGS, check_settings
from pertstate.base.public import last_part
from pertstate.base.tables import check_table, write_csv
from pertstate.data.cells import sort_into_groups
from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import GroupSums
from pertstate.data.in_memory import CellData, name_of, open_cells
from pertstate.data.reading import AnnDataFile, naming
from pertstate.data.record import RunRecord
from pertstate.evaluation.assembly import samples_of, scores_of
from pertstate.evaluation.cell_eval_scores import CellEvalMetrics, cell_eval_version, check_cell_eval
from pertstate.evaluation.compared_genes import compared_genes
from pertstate.evaluation.further_metrics import check_metrics
from pertstate.evaluation.group_scores import baselines_of, is_log1p
from pertstate.evaluation.metrics import COSTLY, FURTHER, AsPredicted
from pertstate.evaluation.others_data import read_as
from pertstate.evaluation.predicted_groups import predicted_groups
from pertstate.evaluation.prediction import CEILING
from pertstate.evaluation.read_ahead import read_ahead
from pertstate.evaluation.scores import Scores
from pertstate.evaluation.scoring import MAX_CELLS, Group, Predicted, RealCells, score_groups
from pertstate.processing import StateProcessor, Vocabulary


def evaluate(
    predicted: CellData | None,
    real: CellData,
    train: CellData | None = None,
    *,
    model=None,
    processor: StateProcessor | None = None,
    record: RunRecord | None = None,
    contexts: list[str] | None = None,
    perturbations: list[str] | None = None,
    quiet: bool = False,
    convert_scale: bool = False,
    max_cells: int | None = MAX_CELLS,
    seed: int = 0,
    include_seen: bool = False,
    name: str = "the model",
    metrics: Sequence[str] = (),
    cell_eval: bool = False,
    common_genes: bool = False,
    **keys,
) -> Scores:
    """
    Score each (context, perturbation): compare predicted cells, or cells that a model predicts here, with the real ones.

    All methods are judged on the same real cells, and every change is measured from the mean of the same real control
    cells. The baselines know what the record of the model says; without a record, they learn from `train`. `train` may be the
    whole screen: its cells that are among the evaluated real cells, by barcode and labels, are left out. Groups
    that the model, or a checkpoint that it was trained from, was trained on are marked, and are not averaged.

    Args:
        predicted: `.h5ad` or AnnData that [`predict`] made, or one with the same layout; None if `model` predicts.
        real: `.h5ad` or AnnData with the real perturbed and control cells.
        train (*optional*): `.h5ad` or AnnData with the cells that the baselines learn from if there is no record.
        model ([`PerturbationPreTrainedModel`], *optional*), processor ([`StateProcessor`], *optional*): the model that
            predicts, and the processor of the same checkpoint.
        record ([`RunRecord`], *optional*): the record of the checkpoint that predicted.
        contexts, perturbations (`list[str]`, *optional*): score only these. By default all that are predicted. With `model`,
            by default those that its record holds out for the test, or all that it knows if there are none.
        quiet (`bool`): no progress bar.
        max_cells (`int`, *optional*): the largest number of cells of each kind in a group, drawn with `seed`; None takes all.
            The time grows with the square of this number.
        seed (`int`): seed of this draw and of the bootstrap.
        convert_scale (`bool`): convert log1p values of `real` and `train` whose cells sum to another total than the model's.
        include_seen (`bool`): average over groups that were trained on, too.
        name (`str`): what the verdict calls the model.
        metrics (`Sequence[str]`): the figures to find besides those that cost little: any of `mmd`, `sinkhorn` and `discrimination`, see
            [`FurtherFigures`] and [`~pertstate.evaluation.further_metrics.discrimination`].
        cell_eval (`bool`): also find the metrics of the package cell-eval for the same cells, see [`CellEvalMetrics`].
        common_genes (`bool`): score the genes that both the predictions and the real cells have, if the real cells lack some.
            `model` then reads those that are missing as not expressed.
        keys: `perturbation_key`, `context_key`, `context`, `control`, `input`, `normalize`: how to read the real files, if
            they differ from what `predicted` or the processor says.

    Returns:
        [`Scores`].

    Raises:
        ValueError, KeyError, FileNotFoundError: see [`AnnDataFile`] and [`StateProcessor`]; or there is nothing to
            compare, or a figure is unknown.
        ImportError: the metrics of cell-eval are asked for, and it is not installed.
    """
    if (predicted is None) == (model is None):
        raise ValueError("evaluate needs either predicted cells or a model that predicts them, not both")
    check_metrics(metrics, FURTHER)
    if cell_eval:
        check_cell_eval()
    costly = tuple(metric for metric in COSTLY if metric in metrics)
    notes: list[str] = []
    with ExitStack() as stack:
        truth = stack.enter_context(open_cells(real))
        if model is None:
            guess = stack.enter_context(open_cells(given("predicted", predicted)))
            reader, scorer = readers_of(guess, keys)
            if _lacks_contexts(scorer, truth) and contexts is not None and len(contexts) == 1:
                reader, scorer = readers_of(guess, {**keys, "context": contexts[0]})
            ceiling = _about(guess).get("ceiling")
        else:
            own = given("the model's processor", processor)
            ceiling = CEILING if model.is_ceiling else None
            scorer = scorer_of(own, model.config, keys)
            if _lacks_contexts(scorer, truth) and contexts is not None and len(contexts) == 1:
                scorer = scorer_of(own, model.config, {**keys, "context": contexts[0]})
        if cell_eval and not is_log1p(scorer, decoded=False):
            raise ValueError("cell-eval takes log1p expression, and something else was predicted; score without it")
        compared = compared_genes(scorer, truth, name_of(real), common_genes, notes)
        scorer = compared.scorer
        scorer.check_scale(truth, convert=convert_scale)
        with naming(name_of(real)):
            real_labels = scorer.labels(truth)
        there = set(map(tuple, real_labels[["context", "perturbation"]].dropna().drop_duplicates().to_numpy()))
        if model is None:
            with naming(name_of(given("predicted", predicted))):
                labels = reader.labels(guess)
            pairs = [tuple(pair) for pair in labels[["context", "perturbation"]].dropna().drop_duplicates().to_numpy()]
        else:
            pairs = _asked(own, record, there, contexts, perturbations)
        pairs = [
            pair
            for pair in pairs
            if pair[1] != scorer.control
            and (contexts is None or pair[0] in contexts)
            and (perturbations is None or pair[1] in map(scorer.canonical, perturbations))
        ]
        # Groups of a context follow one another.
        of_contexts = list(dict.fromkeys(context for context, _ in pairs))
        common = sorted((pair for pair in pairs if pair in there), key=lambda pair: of_contexts.index(pair[0]))
        missing = [" / ".join(pair) for pair in pairs if pair not in there]
        if not common:
            raise ValueError(
                f"no (context, perturbation) of {name if predicted is None else name_of(predicted)} is in {name_of(real)}: predicted {missing[:5]}, real "
                f"{[' / '.join(pair) for pair in sorted(there)[:5]]}"
            )
        if missing:
            notes.append(f"{len(missing)} predicted groups have no real cells and are not scored: {missing[:10]}")
        groups: list[Group] = [("", context, perturbation) for context, perturbation in common]
        cells = real_cells_of_file(scorer, truth, real_labels, sorted({context for context, _ in common}))
        means = None if record is None else record.means
        if train is not None and means is not None:
            notes.append(f"the baselines know what the record of the model says; {name_of(train)} was not read")
        elif train is not None:
            means = _means_of_file(train, scorer, real_labels, common, convert_scale, notes)
        elif means is None:
            notes.append(
                "what the model was trained on is not known, so only the baseline 'no change' can be scored: name its "
                "checkpoint with --model, or the training cells with --train"
            )
        if record is not None and means is not None:
            means = compared.of_means(means, processor)
        intervals = None if record is None else record.intervals
        if intervals is not None:
            intervals = compared.of_intervals(intervals, processor)
        baselines = baselines_of(means, scorer, clip=scorer.values != Values.EMBEDDING)
        if model is None:
            found = _predicted_of_file(reader, guess, labels, groups, cells, scorer.control, seed, max_cells)
        else:
            inputs = read_as(own, truth, _reading_of(keys), contexts, needs_batches=bool(model.config.embeds_batches))
            cells.inputs = lambda rows: inputs.features(truth, rows, "zero" if common_genes else "error")
            if inputs.batch_key is not None:
                batches = inputs.labels(truth)["batch"].to_numpy()
                cells.batches = lambda rows: batches[rows]
            found = predicted_groups(model, inputs, cells, groups, seed, max_cells)
        chosen = ((group, replace(of, cells=compared.of_predicted(of.cells))) for group, of in found)
        bar = tqdm(chosen, total=len(groups), unit="groups", desc="evaluate", disable=quiet)
        kept = samples_of(len(groups))
        field = CellEvalMetrics(scorer.vocabulary.genes, scorer.control) if cell_eval else None
        also = None if field is None else field.add
        results = list(
            score_groups(
                cells, bar, scorer.control, baselines, seed, max_cells, kept, metrics=costly, also=also, order=groups
            )
        )
        if field is not None:
            field.give(results)
            notes += field.notes
        genes = scorer.output_names(len(results[0].means["observed"]))

    def seen(group: Group) -> str:
        if record is None:
            return ""
        how = record.seen(None, *group[1:])
        if how or cells.ids is None:
            return how
        ids = cells.ids(cells.rows(group, seed, max_cells))
        return "its cells were trained on" if record.seen_cells(group[2], ids) else ""

    settings = {"cells": max_cells or "all", "real": last_part(name_of(real))}
    if cell_eval:
        settings["cell-eval"] = cell_eval_version()
    return scores_of(
        sorted(results, key=lambda result: common.index(result.group[1:])),
        genes,
        record,
        name,
        notes,
        seed,
        include_seen,
        seen,
        ceiling is not None,
        settings,
        intervals,
    )


def _lacks_contexts(scorer: StateProcessor, data: AnnDataFile) -> bool:
    """Whether a file lacks the column of contexts, so that the one context of all cells has to be named."""
    key = scorer.context_key
    return scorer.context is None and not set([key] if isinstance(key, str) else key or []) <= set(data.obs_columns)


def _reading_of(keys: dict) -> dict:
    return {
        name: value
        for name, value in keys.items()
        if name in ("perturbation_key", "context_key", "batch_key", "control")
    }


def _asked(
    processor: StateProcessor,
    record: RunRecord | None,
    there: set[tuple[str, str]],
    contexts: list[str] | None,
    perturbations: list[str] | None,
) -> list[tuple[str, str]]:
    """The groups that a model is scored on: those asked for, those that its record holds out, or all that it knows."""
    held = set() if record is None else {(g.context, g.perturbation) for g in record.of_split(Split.TEST)}
    if held & there and contexts is None and perturbations is None:
        return sorted(held & there)
    vectors, vocabulary = processor.perturbation_features, set(processor.vocabulary.perturbations)
    known = vocabulary if vectors is None else set(vectors.names)
    return sorted(pair for pair in there if set(processor.split_combination(pair[1])) <= known)


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


def _predicted_of_file(reader, guess, labels, groups, cells: RealCells, control, seed, max_cells):
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


def _means_of_file(train, scorer, real_labels, common, convert_scale, notes) -> GroupMeans | None:
    """The means of the training groups of a file, without the cells that are scored."""
    with open_cells(train) as training:
        of_training = scorer.with_vocabulary(scorer.vocabulary)
        of_training.check_scale(training, convert=convert_scale)
        with naming(name_of(train)):
            labels = of_training.labels(training)
        # The barcode alone does not tell which cell it is: files often number their cells from 0.
        real_cells, train_cells = (
            pd.MultiIndex.from_arrays([frame["context"], frame["perturbation"], frame.index])
            for frame in (real_labels, labels)
        )
        evaluated = real_cells.droplevel(2).isin(common)
        seen = train_cells.isin(real_cells[evaluated])
        if seen.any():
            notes.append(
                f"{int(seen.sum())} cells of {name_of(train)} are among the real cells that are scored, and are left out of it"
            )
        rows = np.flatnonzero(~seen & labels["perturbation"].notna().to_numpy())
        order, groups = sort_into_groups(labels.iloc[rows].assign(dataset=""))
        sums = GroupSums.of_cells(
            AsPredicted(_Rows(of_training, training, rows[order]), scorer),
            groups,
            scorer.control,
            log1p=is_log1p(scorer, decoded=False),
        )
        return GroupMeans.of_sums(sums) if sums.paired else None


def table_of(scores: Scores) -> pd.DataFrame:
    """The table of scores, with the averages as rows of the context and perturbation `"mean"` at its end."""
    wide = [
        {"dataset": "", "context": "mean", "perturbation": "mean", "method": method, "reason": "", "seen": ""}
        | {row.metric: row.value for row in rows.itertuples()}
        | {f"{row.metric}_{end}": getattr(row, end) for row in rows.itertuples() for end in ("low", "high")}
        for method, rows in scores.averages.groupby("method", sort=False)
    ]
    table = pd.concat([scores.table, pd.DataFrame(wide)], ignore_index=True) if wide else scores.table
    return table if table["dataset"].any() else table.drop(columns="dataset")


def write_table(table: pd.DataFrame, output: str | os.PathLike, overwrite: bool = False):
    """
    Write `.csv` (see [`~pertstate.base.tables.write_csv`]) or `.json`, whole or not at all.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, InUseError: see [`claimed_table`].
        FloatingPointError: see [`~pertstate.base.tables.check_table`].
        OSError: the disk is full; the file is as it was.
    """
    with claimed_table(output, overwrite) as place:
        if Path(output).suffix == ".csv":
            return write_csv(table, place)
        check_table(table)
        records = json.loads(table.to_json(orient="records"))
        with whole_file(place) as partial:
            partial.write_text(json.dumps(records, indent=1), encoding="utf-8")


def claimed_table(output: str | os.PathLike, overwrite: bool) -> AbstractContextManager[Path]:
    """
    Claim the table to write, see [`claimed_file`]. A name that [`write_table`] cannot write is refused before any work is
    done.

    Raises:
        ValueError: the name does not end in `.csv` or `.json`.
    """
    if Path(output).suffix not in (".csv", ".json"):
        raise ValueError(f"--output {output}: expected a name that ends in .csv or .json")
    return claimed_file(output, overwrite)


@dataclass
class _Rows:
    """Features of some cells of a file, read when they are asked for."""

    processor: StateProcessor
    data: AnnDataFile
    rows: np.ndarray

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.processor.features(self.data, self.rows[part])


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


def _about(guess: AnnDataFile) -> dict:
    """What a file of predictions says of itself."""
    about = guess.uns.get("pertstate", {})
    if not isinstance(about, dict):
        raise ValueError(
            f"{guess.path}: uns['pertstate']: expected a mapping, found a {type(about).__name__}; predict again"
        )
    return about


def _recorded_settings(guess: AnnDataFile) -> dict | None:
    """How real cells were read, as predictions record it; None where they do not. ValueError where no processor wrote it."""
    recorded = _about(guess).get("processor")
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
