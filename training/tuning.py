"""Choosing settings of a run by cross-validation over its training groups; no test cell is read or scored for the choice."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pertstate.base.files import whole_file
from pertstate.base.outputs import Kind, claimed_run
from pertstate.base.public import public
from pertstate.base.tables import write_csv
from pertstate.data.record import source_of
from pertstate.evaluation.metrics import METRICS, MODEL
from pertstate.evaluation.pooling import over_seeds
from pertstate.evaluation.report_data import SCORES_FOLDER
from pertstate.evaluation.scores import Scores
from pertstate.evaluation.verdict import averages_of
from pertstate.hub.provenance import Provenance
from pertstate.training.crossval import (
    RESULTS,
    TABLE,
    Fold,
    Trial,
    begin,
    groups_of,
    predictable,
    quoted,
    safe_name,
    train_trials,
)
from pertstate.training.run import read_run
from pertstate.training.run_config import RunConfig
from pertstate.training.suggesting import Range, check_optuna, range_of, search


SETTINGS = "tune.json"
TUNING = Kind("search for settings", (SETTINGS,), lambda name: name in (RESULTS, TABLE, SETTINGS, "runs"))
# Fields that say what is trained on and scored, or where it goes: they are no settings to choose.
_NO_SETTINGS = ("test_", "val_", "output_dir", "seed", "datasets", "splits", "store", "contexts", "validation")


@dataclass(frozen=True)
class Tuned:
    """
    What a search has found.

    Args:
        table (`pandas.DataFrame`): a row for each setting, the best one first: its fields, and of each metric the mean over the
            held-out training groups, `METRIC`, and its 95 % interval, `METRIC_low` and `METRIC_high`.
        flags (`list[str]`): those of the best setting.
    """

    table: pd.DataFrame
    flags: list[str]


def inner_folds_of(run: RunConfig, parts: int) -> list[Fold]:
    """
    Folds over the training groups of a run, which hold out what the run holds out: contexts, or perturbations in `parts`. The
    run's test contexts are not read; its test perturbations are in no fold's training groups.

    Raises:
        ValueError: the run names its held-out groups in another way, or there are fewer than two folds.
    """
    data = run.data
    if data.splits is not None or data.val_contexts or data.val_perturbations:
        raise ValueError(
            "tune holds out training groups itself: expected test_contexts, test_perturbations or neither, found "
            + ("splits" if data.splits is not None else "val_contexts or val_perturbations")
        )
    if data.test_contexts and data.test_perturbations:
        raise ValueError(
            "tune holds out contexts or perturbations: found test_contexts and test_perturbations; name one"
        )
    groups, control = groups_of(run)
    if data.test_perturbations:
        reader = run.data.reader()
        held = {reader.canonical(name) for name in data.test_perturbations}
        names = [name for name in predictable(run) if name not in held]
        of_parts = [names[i::parts] for i in range(min(parts, len(names)))]
        folds = [
            Fold(f"part {i + 1} of {len(of_parts)}", ("--test_perturbations", quoted([*of, *data.test_perturbations])))
            for i, of in enumerate(of_parts)
        ]
    else:
        read = sorted(set(groups["context"]) - set(data.test_contexts))
        perturbed = set(groups.loc[groups["perturbation"] != control, "context"])
        folds = [
            Fold(name, ("--contexts", quoted(read), "--test_contexts", quoted([name])))
            for name in read
            if name in perturbed
        ]
    if len(folds) < 2:
        raise ValueError(
            f"expected two folds of training groups or more, found {[fold.name for fold in folds]}; hold out less"
        )
    return folds


def space_of(grid: list[str]) -> dict[str, list[str] | Range]:
    """
    The values of each `FIELD=a,b,c`, and the range of each `FIELD=LOW..HIGH` or `FIELD=LOW..HIGH:log`.

    Raises:
        ValueError: a part of the grid is none, or names no setting.
    """
    space: dict[str, list[str] | Range] = {}
    for one in grid:
        field, _, listed = one.partition("=")
        found = [value for value in listed.split(",") if value]
        if not field or not found:
            raise ValueError(f"--grid {one}: expected FIELD=a,b,c")
        if field in space:
            raise ValueError(f"--grid {one}: {field} has values already")
        if field.startswith(_NO_SETTINGS):
            raise ValueError(
                f"--grid {one}: {field} says what is trained on or where it goes, and is not chosen by scores"
            )
        try:
            space[field] = range_of(listed) or found
        except ValueError as error:
            raise ValueError(f"--grid {field}={error}") from None
    return space


def settings_of(space: dict[str, list[str] | Range]) -> list[dict[str, str]]:
    """
    Every combination of the values.

    Raises:
        ValueError: there is a range, or one combination alone.
    """
    values = {field: of for field, of in space.items() if not isinstance(of, Range)}
    if len(values) < len(space):
        open_ones = [field for field in space if field not in values]
        raise ValueError(
            f"--grid: {', '.join(open_ones)} is a range, of which --trials N tries values; or list the values"
        )
    settings = [dict(zip(values, of)) for of in itertools.product(*values.values())]
    if len(settings) < 2:
        raise ValueError(f"--grid: expected two settings or more, found {len(settings)}")
    return settings


def _ends(space: dict[str, list[str] | Range]) -> list[dict[str, str]]:
    """Settings that have every listed value and both ends of every range."""
    values = {field: [str(of.low), str(of.high)] if isinstance(of, Range) else of for field, of in space.items()}
    most = max(map(len, values.values()))
    return [{field: of[i % len(of)] for field, of in values.items()} for i in range(most)]


def tune(
    words: list[str],
    grid: list[str],
    output: str | os.PathLike,
    metric: str = "energy",
    seeds: int = 1,
    jobs: int = 1,
    parts: int = 5,
    overwrite: bool = False,
    trials: int | None = None,
) -> Tuned:
    """
    Train a run with every setting on each fold of its training groups, and choose the setting whose held-out training groups
    are predicted best. Test cells are not read for a held-out context, and not counted for held-out perturbations. A run that is
    there already is kept; one that was stopped goes on.

    Args:
        words (`list[str]`): what `pertstate train` takes: cells or a run file, and flags.
        grid (`list[str]`): `FIELD=a,b,c` for each field; every combination is tried. With `trials` also ranges,
            `FIELD=LOW..HIGH` or `FIELD=LOW..HIGH:log`.
        output: the folder: `results.csv`, `results.json` and `runs/SETTING/FOLD-seedN`.
        metric (`str`): what is best: the highest `pearson`, or the lowest `mae` or `energy`.
        seeds (`int`): runs of each fold.
        jobs (`int`): runs at a time.
        parts (`int`): folds over perturbations.
        overwrite (`bool`): remove what the folder holds, and begin anew.
        trials (`int`, *optional*): settings that optuna suggests, one after the other from the scores of those before. A search
            that is there already goes on to this number.

    Raises:
        ImportError: `trials`, and optuna is not installed.
        ValueError: the folder is of another search, or a run cannot be; the run's own error is in the message.
        InUseError: another process writes the folder.
    """
    for name, number in (("seeds", seeds), ("jobs", jobs), ("parts", parts), ("trials", trials)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: expected at least 1")
    if metric not in METRICS:
        raise ValueError(f"metric={metric}: expected one of {', '.join(METRICS)}")
    space = space_of(grid)
    settings = settings_of(space) if trials is None else []
    if trials is not None:
        check_optuna()
    run = read_run(words)
    for setting in settings or _ends(space):
        read_run([*words, *_flags(setting)])  # an unknown field or value is said before anything is trained
    folds = inner_folds_of(run, parts)
    reader = run.data.reader()
    held = {reader.canonical(name) for name in run.data.test_perturbations}
    with claimed_run(output, TUNING) as place:
        about = {
            "words": public(list(words)),
            "grid": list(grid),
            "metric": metric,
            "folds": {fold.name: list(fold.flags) for fold in folds},
            "sources": [source_of(source) for source in Provenance.of_run(run).sources],
        }
        begin(place, output, about, overwrite, TUNING)

        def trained(some: list[dict[str, str]]) -> list[dict[str, object]]:
            """The rows of settings, whose runs are trained where they are not there yet."""
            runs = [[[_trial(place, words, of, fold, seed) for seed in range(seeds)] for fold in folds] for of in some]
            train_trials([trial for of in runs for fold in of for trial in fold], jobs)
            return [_row(setting, of, held) for setting, of in zip(some, runs)]

        if trials is None:
            rows = trained(settings)
        else:
            row_of: dict[tuple[str, ...], dict[str, object]] = {}

            def value_of(setting: dict[str, str]) -> float:
                row = row_of[tuple(setting.values())] = trained([setting])[0]
                return float(str(row[metric]))

            settings = search(space, trials, value_of, maximize=metric == "pearson")
            rows = [row_of[tuple(setting.values())] for setting in settings]
        table = pd.DataFrame(rows).sort_values(metric, ascending=metric != "pearson", kind="stable", na_position="last")
        best = settings[table.index[0]]
        table = table.reset_index(drop=True)
        write_csv(table, place / TABLE)
        with whole_file(place / RESULTS) as partial:
            found = {**about, "seeds": seeds, "best": best, "settings": json.loads(table.to_json(orient="records"))}
            partial.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return Tuned(table, _flags(best))


def _row(setting: dict[str, str], runs: list[list[Trial]], held: set[str]) -> dict[str, object]:
    """The row of a setting: the mean over the held-out training groups of its runs, by fold and seed."""
    results = []
    for of_fold in runs:
        several = [Scores.load(trial.folder / SCORES_FOLDER).results for trial in of_fold]
        results += [result for result in over_seeds(several) if result.group[2] not in held]
    averages = averages_of(results)
    of_model = averages[averages["method"] == MODEL].set_index("metric")
    row: dict[str, object] = dict(setting)
    for name in METRICS:
        for column, key in (("value", name), ("low", f"{name}_low"), ("high", f"{name}_high")):
            row[key] = of_model[column].get(name, float("nan"))
    return row


def _flags(setting: dict[str, str]) -> list[str]:
    return [word for field, value in setting.items() for word in (f"--{field}", value)]


def _trial(place: Path, words: list[str], setting: dict[str, str], fold: Fold, seed: int) -> Trial:
    name = ", ".join(f"{field} {value}" for field, value in setting.items())
    of_setting = safe_name("_".join(f"{field}-{value}" for field, value in setting.items()))
    folder = place / "runs" / of_setting / f"{safe_name(fold.name)}-seed{seed}"
    own = ["--seed", str(seed), "--output_dir", str(folder), "--keep_resamplings", "true"]
    return Trial(name, fold, seed, folder, (*words, *_flags(setting), *fold.flags, *own))
