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

from pertstate.base.constants import Split
from pertstate.base.files import whole_file
from pertstate.base.messages import given
from pertstate.base.outputs import claimed_file
from pertstate.base.public import last_part
from pertstate.base.tables import check_table, write_csv
from pertstate.data.cells import sort_into_groups
from pertstate.data.cluster import check_distributed, on_cluster
from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import GroupSums
from pertstate.data.in_memory import CellData, name_of, open_cells
from pertstate.data.reading import AnnDataFile, naming
from pertstate.data.record import RunRecord
from pertstate.evaluation.assembly import samples_of, scores_of
from pertstate.evaluation.cell_eval_scores import CellEvalMetrics, cell_eval_version, check_cell_eval
from pertstate.evaluation.compared_genes import compared_genes
from pertstate.evaluation.further_metrics import check_metrics
from pertstate.evaluation.group_scores import is_log1p
from pertstate.evaluation.metrics import COSTLY, FURTHER, AsPredicted
from pertstate.evaluation.others_data import read_as
from pertstate.evaluation.predicted_groups import predicted_groups
from pertstate.evaluation.prediction import CEILING
from pertstate.evaluation.scored_files import (
    ScoredFiles,
    ScoringJob,
    about,
    lacks_contexts,
    of_scored_genes,
    predicted_cells_of_file,
    real_cells_of_file,
    scored_baselines,
    scorer_of,
)
from pertstate.evaluation.scores import Scores
from pertstate.evaluation.scoring import MAX_CELLS, Group, GroupResult, score_groups
from pertstate.processing import StateProcessor


# The groups are given to the workers of a cluster in so many parts.
_JOBS = 32


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
    scheduler: str | None = None,
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
        scheduler (`str`, *optional*): address of a Dask scheduler, or the path of its scheduler file. Its workers, which see the files under the
            same names, each score some of the groups. The figures are the same.
        keys: `perturbation_key`, `context_key`, `context`, `control`, `input`, `normalize`: how to read the real files, if
            they differ from what `predicted` or the processor says.

    Returns:
        [`Scores`].

    Raises:
        ValueError, KeyError, FileNotFoundError: see [`AnnDataFile`] and [`StateProcessor`]; or there is nothing to
            compare, or a figure is unknown.
        ImportError: the metrics of cell-eval are asked for, and it is not installed; or `distributed` is absent for a scheduler.
    """
    if (predicted is None) == (model is None):
        raise ValueError("evaluate needs either predicted cells or a model that predicts them, not both")
    if scheduler is not None:
        predicted, real = _seen_by_workers(predicted, real, cell_eval)
    check_metrics(metrics, FURTHER)
    if cell_eval:
        check_cell_eval()
    costly = tuple(metric for metric in COSTLY if metric in metrics)
    notes: list[str] = []
    with ExitStack() as stack:
        if model is None:
            of_files = ScoredFiles(given("predicted", predicted), real, keys, contexts, common_genes, convert_scale)
            files = of_files.open(stack)
            truth, scorer = files.truth, files.scorer
            ceiling = about(files.guess).get("ceiling")
        else:
            truth = stack.enter_context(open_cells(real))
            own = given("the model's processor", processor)
            ceiling = CEILING if model.is_ceiling else None
            scorer = scorer_of(own, model.config, keys)
            if lacks_contexts(scorer, truth) and contexts is not None and len(contexts) == 1:
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
                labels = files.reader.labels(files.guess)
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
        kept = samples_of(len(groups))
        field = CellEvalMetrics(scorer.vocabulary.genes, scorer.control) if cell_eval else None
        if scheduler is not None:
            job = ScoringJob(of_files, groups, means, seed, max_cells, kept, costly)
            results = _on_cluster(scheduler, job, quiet)
        else:
            if model is None:
                found = predicted_cells_of_file(
                    files.reader, files.guess, labels, groups, cells, scorer.control, seed, max_cells
                )
            else:
                inputs = read_as(
                    own, truth, _reading_of(keys), contexts, needs_batches=bool(model.config.embeds_batches)
                )
                cells.inputs = lambda rows: inputs.features(truth, rows, "zero" if common_genes else "error")
                if inputs.batch_key is not None:
                    batches = inputs.labels(truth)["batch"].to_numpy()
                    cells.batches = lambda rows: batches[rows]
                found = predicted_groups(model, inputs, cells, groups, seed, max_cells)
            chosen = of_scored_genes(found, compared)
            bar = tqdm(chosen, total=len(groups), unit="groups", desc="evaluate", disable=quiet)
            results = list(
                score_groups(
                    cells,
                    bar,
                    scorer.control,
                    scored_baselines(means, scorer),
                    seed,
                    max_cells,
                    kept,
                    metrics=costly,
                    also=None if field is None else field.add,
                    order=groups,
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


def _seen_by_workers(predicted: CellData | None, real: CellData, cell_eval: bool) -> tuple[Path, Path]:
    """
    The files as the workers of a cluster find them, which stand in folders of their own.

    Raises:
        ValueError: they cannot score this.
        ImportError: `distributed` is absent.
    """
    check_distributed()
    if cell_eval:
        raise ValueError("the metrics of cell-eval are found in one process; leave --scheduler or --cell-eval out")
    if not isinstance(predicted, (str, os.PathLike)) or not isinstance(real, (str, os.PathLike)):
        raise ValueError(
            "the workers of a cluster score predicted cells of a file; write them with pertstate predict, and give both files by name"
        )
    return Path(predicted).absolute(), Path(real).absolute()


def _on_cluster(scheduler: str, job: ScoringJob, quiet: bool) -> list[GroupResult]:
    """What the workers of a cluster find, each for some groups that follow one another."""
    size = -(-len(job.groups) // _JOBS)
    jobs = [replace(job, groups=job.groups[i : i + size]) for i in range(0, len(job.groups), size)]
    with tqdm(total=len(job.groups), unit="groups", desc="evaluate", disable=quiet) as bar:
        return sum(on_cluster(scheduler, jobs, lambda number: bar.update(len(jobs[number].groups))), [])


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
