"""Cross-validation: every fold is trained, predicted and scored as a run by itself, and the scores are pooled."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import torch

from pertstate.base.bounded_text import LARGEST_TABLES, load_json
from pertstate.base.console import say
from pertstate.base.constants import Split
from pertstate.base.files import whole_file
from pertstate.base.input_errors import ERRORS, line_of
from pertstate.base.messages import given, some
from pertstate.base.outputs import Kind, claimed_folder, claimed_run, discard, no_empty_folder, whole_folder
from pertstate.base.processes import check_guarded, end_with_parent, how_it_ended, with_imports
from pertstate.base.public import public
from pertstate.base.stopped import stopped_by_signals
from pertstate.base.tables import write_csv
from pertstate.data.arguments import DataArguments
from pertstate.data.cells import assign_splits
from pertstate.data.record import source_of
from pertstate.data.source import FileSource
from pertstate.data.store import StoreSource
from pertstate.data.stores import open_store
from pertstate.evaluation.metrics import METRICS, MODEL
from pertstate.evaluation.pooling import pooled_scores
from pertstate.evaluation.report_data import SCORES_FOLDER
from pertstate.evaluation.scores import RESAMPLINGS, SCORES, Scores, with_interval
from pertstate.families import FAMILIES
from pertstate.hub.provenance import Provenance
from pertstate.hub.publish import CHECKPOINT
from pertstate.hub.unfinished import checkpoints_of
from pertstate.training.family_settings import check_families, words_of_family
from pertstate.training.run import check_further, config_class, read_run
from pertstate.training.run_config import RunConfig
from pertstate.training.run_folder import run_folder
from pertstate.training.whole_run import train_run


RESULTS, TABLE, TEXT, SETTINGS = "results.json", "results.csv", "results.md", "crossval.json"
CROSSVAL = Kind("cross-validation", (SETTINGS,), lambda name: name in (RESULTS, TABLE, TEXT, SETTINGS, "runs"))
# Bytes of a name. File systems take 255, and more follows these.
_LONGEST_NAME = 150
CONTEXTS, PERTURBATIONS, SEEDS = "contexts", "perturbations", "seeds"


@dataclass(frozen=True)
class Fold:
    """What a fold holds out, or sets otherwise: a name, and flags of the run."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One run of a fold: a family or setting, a seed, its folder and the words after `pertstate train`."""

    family: str
    fold: Fold
    seed: int
    folder: Path
    words: tuple[str, ...]

    @property
    def named(self) -> str:
        return f"{self.family}, {self.fold.name}, seed {self.seed}"


def folds_of(run: RunConfig, over: str, parts: int) -> list[Fold]:
    """
    The folds of a run.

    - `contexts`: each context with perturbed cells is held out in turn
    - `perturbations`: each perturbation that can be predicted without cells of its own is held out in one of `parts` folds, from
      all contexts: with `perturbation_features` all of them, otherwise combinations whose parts other groups have
    - `seeds`: what the run holds out itself is the only fold
    - `FIELD=a,b,c`: the field of the run takes each value in turn

    Raises:
        ValueError: there are fewer than two folds, and `over` is not `seeds`.
    """
    if over == SEEDS:
        return [Fold("split", ())]
    field, has_values, values = over.partition("=")
    if has_values:
        folds = [Fold(value, (f"--{field}", value)) for value in values.split(",") if value]
    elif over == CONTEXTS:
        groups, control = groups_of(run)
        names = sorted(groups.loc[groups["perturbation"] != control, "context"].unique())
        folds = [Fold(name, ("--test_contexts", quoted([name]))) for name in names]
    elif over == PERTURBATIONS:
        names = predictable(run)
        found = [names[i::parts] for i in range(min(parts, len(names)))]
        folds = [
            Fold(f"part {i + 1} of {len(found)}", ("--test_perturbations", quoted(of))) for i, of in enumerate(found)
        ]
    else:
        raise ValueError(f"--over {over}: expected {CONTEXTS}, {PERTURBATIONS}, {SEEDS} or FIELD=a,b,c")
    if len(folds) < 2:
        raise ValueError(
            f"--over {over}: expected two folds or more, found {[fold.name for fold in folds]}; perturbations without vectors "
            "(perturbation_features) can be held out only where they are combinations of others"
        )
    return folds


def quoted(names: list[str]) -> str:
    """A list as a flag reads it, whatever is in the names."""
    return json.dumps(names, ensure_ascii=False)


def check_folds(words: list[str], folds: list[Fold]):
    """
    Check, before anything is trained, that each fold can be scored.

    Raises:
        ValueError, KeyError: a field or value is none of a run's, or a fold holds out nothing for testing.
    """
    checked: list[DataArguments] = []
    for fold in folds:
        run = read_run([*words, *fold.flags])
        if run.data in checked or run.stream.path is not None:
            continue
        checked.append(run.data)
        source = source_of_cells(run)
        splits = run.data.resolve_splits(source.groups, source.reader)
        if Split.TEST not in set(assign_splits(source.groups, splits, source.reader.control)["split"]):
            raise ValueError(
                f"fold {fold.name} holds out no cells for testing, so there is nothing to score: say what to hold out, as with "
                "--test_contexts or --test_perturbations"
            )


def source_of_cells(run: RunConfig) -> FileSource | StoreSource:
    """The cells of a run, with their groups."""
    if run.stream.path is not None:
        raise ValueError(
            "a stream is read once, and its folds are not known; prepare a store of it (pertstate prepare)"
        )
    data = run.data
    return data.file_source() if data.store is None else StoreSource(open_store(data.store), data.contexts)


def groups_of(run: RunConfig) -> tuple[pd.DataFrame, str]:
    """The groups of the run's cells, and the name of the control."""
    source = source_of_cells(run)
    return source.groups, source.reader.control


def predictable(run: RunConfig) -> list[str]:
    groups, control = groups_of(run)
    names = sorted({name for name in groups["perturbation"] if name != control})
    if run.data.by_vector:
        return names
    reader = run.data.reader()
    parts = {name: reader.split_combination(name) for name in names}
    alone = {part for name in names if len(parts[name]) == 1 for part in parts[name]}
    return [name for name in names if len(parts[name]) > 1 and set(parts[name]) <= alone]


def crossval(
    words: list[str],
    over: str,
    output: str | os.PathLike,
    families: list[str] | dict[str, dict[str, dict[str, Any]]] | None = None,
    seeds: int = 3,
    jobs: int = 1,
    parts: int = 5,
    overwrite: bool = False,
) -> dict[str, Scores]:
    """
    Train every fold with every seed and family, and pool the scores. A run that is there already is kept; one that was stopped
    goes on.

    Args:
        words (`list[str]`): what `pertstate train` takes: cells or a run file, and flags.
        over (`str`): see [`folds_of`].
        output: the folder: `results.csv`, `results.json`, the table and the verdicts as text in `results.md`, and `runs/FAMILY/FOLD-seedN`, with `scores/FAMILY` for a report.
        families (`list[str]` or `dict`, *optional*): values of `model_type`; by default that of the run. A dictionary has the fields
            that each family sets otherwise, by section, see [`~pertstate.training.family_settings.read_families`].
        seeds (`int`): runs of each fold; a family that is fitted in one pass has one.
        jobs (`int`): runs at a time.
        parts (`int`): folds over perturbations.
        overwrite (`bool`): remove what the folder holds, and begin anew.

    Returns:
        `dict[str, Scores]`: by family, the mean over seeds of each group's figures, averaged over all folds' groups.

    Raises:
        ValueError: the folder is of another cross-validation, or a run cannot be; the run's own error is in the message.
        InUseError: another process writes the folder.
    """
    check_guarded()
    for name, number in (("seeds", seeds), ("jobs", jobs), ("parts", parts)):
        if number < 1:
            raise ValueError(f"{name}={number}: expected at least 1")
    run = read_run(words)
    own = config_class(run.model).model_type
    changes = families if isinstance(families, dict) else {name: {} for name in families or [own]}
    check_families(changes)
    folds = folds_of(run, over, parts)
    if over not in (CONTEXTS, PERTURBATIONS):  # those folds hold something out themselves
        check_folds(words, folds)
    with claimed_run(output, CROSSVAL) as place:
        settings = {
            "words": public(list(words)),
            "over": over,
            "folds": {fold.name: list(fold.flags) for fold in folds},
            "sources": [source_of(source) for source in Provenance.of_run(run).sources],
        }
        begin(place, output, settings, overwrite, CROSSVAL)
        words_of = {family: words_of_family(words, own, family, of, place / "runs") for family, of in changes.items()}
        for family_words in words_of.values():
            read_run(family_words)  # an unknown field or value is said before anything is trained
        trials = [
            _trial(place, words_of[family], family, fold, seed)
            for family in changes
            for fold in folds
            for seed in range(1 if FAMILIES[family].model.fitted else seeds)
        ]
        train_trials(trials, jobs)
        found = {}
        for family in changes:
            of = [
                [Scores.load(t.folder / SCORES_FOLDER) for t in trials if t.family == family and t.fold == fold]
                for fold in folds
            ]
            found[family] = pooled_scores(of, family)
            (place / SCORES_FOLDER).mkdir(exist_ok=True)
            of_family = place / SCORES_FOLDER / family
            with claimed_folder(of_family, SCORES, overwrite=True), whole_folder(of_family, SCORES) as scratch:
                found[family].save(scratch)
        _write(place, found, settings, {family: [t for t in trials if t.family == family] for family in changes})
    return found


def begin(place: Path, output: str | os.PathLike, settings: dict, overwrite: bool, kind: Kind):
    """Check that the folder is new or of these settings, and note them. `kind.keys` names the file that they stand in."""
    about = place / kind.keys[0]
    if overwrite and about.is_file():
        for name in (RESULTS, TABLE, TEXT):
            (place / name).unlink(missing_ok=True)
        for name in ("runs", SCORES_FOLDER):
            discard(place / name, place)
        about.unlink()
    if about.is_file():
        before = load_json(about, advice="name another folder, or begin anew with --overwrite")
        if not isinstance(before, dict):
            raise ValueError(
                f"{about}: expected the settings of a {kind.name}, found {_short(before)}; name another folder, or begin anew "
                "with --overwrite"
            )
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{output} holds another {kind.name}: {name} was {_short(before.get(name))}, now {_short(value)}; name "
                    "another folder, or begin anew with --overwrite"
                )
        return
    with no_empty_folder(place):
        place.mkdir(exist_ok=True)
        others = [entry.name for entry in place.iterdir() if not entry.name.startswith(".")]
        if others:
            raise FileExistsError(f"{output} is not empty and holds no {kind.name}, found {some(sorted(others), 3)}")
        with whole_file(about) as partial:
            partial.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 200 else text[:200] + " .."


def _trial(place: Path, words: list[str], family: str, fold: Fold, seed: int) -> Trial:
    folder = place / "runs" / family / f"{safe_name(fold.name)}-seed{seed}"
    own = ["--seed", str(seed), "--output_dir", str(folder), "--keep_resamplings", "true"]
    return Trial(family, fold, seed, folder, (*words, *fold.flags, *own))


def safe_name(name: str) -> str:
    """
    A name as that of a folder: letters, digits and a few signs stay. A name that has others, or is long, ends in a part of its
    SHA-256, so that different names are different folders.
    """
    safe = "".join(letter if letter.isalnum() or letter in "+-_." else "_" for letter in name)
    if safe == name and not name.startswith(".") and len(name.encode()) <= _LONGEST_NAME:
        return name
    cut = safe.encode()[:_LONGEST_NAME].decode("utf-8", "ignore")
    return f"{cut}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _is_done(trial: Trial) -> bool:
    return CHECKPOINT.is_in(trial.folder) and (trial.folder / SCORES_FOLDER / RESAMPLINGS).is_file()


def train_trials(trials: list[Trial], jobs: int):
    """Train what is not there yet, so many runs at a time."""
    open_ones = [trial for trial in trials if not _is_done(trial)]
    if len(open_ones) < len(trials):
        say(f"{len(trials) - len(open_ones)} of {len(trials)} runs are there already", sys.stderr)
    ended, lock = len(trials) - len(open_ones), Lock()
    # After an error or a signal the runs are told to end before the threads that wait for them are waited for.
    with ThreadPoolExecutor(jobs) as pool, _children() as start:

        def run(trial: Trial) -> str | None:
            nonlocal ended
            error = start(trial, jobs)
            with lock:
                ended += error is None
                if error is None:
                    say(f"{ended} of {len(trials)} runs: {trial.named}: {_in_short(trial)}", sys.stderr)
            return error

        for trial, error in zip(open_ones, pool.map(run, open_ones)):
            if error is not None:
                raise ValueError(f"{trial.named}: {error}")


def _in_short(trial: Trial) -> str:
    scores = Scores.load(trial.folder / SCORES_FOLDER)
    return ", ".join(f"{metric} {scores.value(MODEL, metric):.4g}" for metric in ("pearson", "mae", "energy"))


@contextmanager
def _children() -> Iterator:
    """Starts runs, as processes that end with this one."""
    running: set[BaseProcess | subprocess.Popen] = set()
    context: Any = with_imports(__name__)
    stopping, begins = False, Lock()
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1

    def start(trial: Trial, jobs: int) -> str | None:
        """Train, and wait for the end. The last line of the error where it failed."""
        words = [*trial.words, *(["--resume_from_checkpoint", "last"] if checkpoints_of(trial.folder) else [])]
        with tempfile.NamedTemporaryFile("r", errors="replace") as said:
            threads = max(1, (os.cpu_count() or 1) // jobs)
            one: BaseProcess | subprocess.Popen
            with begins:  # a run that begins is either told to end, or not begun
                if stopping:
                    return "not begun"
                if devices > 1:
                    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(devices)]
                    with open(said.name, "w") as log:
                        one = subprocess.Popen(
                            [*launch, "-m", "pertstate.train", *words], stdout=subprocess.DEVNULL, stderr=log
                        )
                else:
                    forked = context.Process(target=_run_one, args=(words, said.name, threads))
                    forked.start()
                    one = forked
                running.add(one)
            code = one.wait() if isinstance(one, subprocess.Popen) else _exit_code(one)
            running.discard(one)
            return None if code == 0 else how_it_ended(code, said.read())

    try:
        yield start
    except BaseException:
        with begins:
            stopping = True
            for process in [*running]:
                # A training saves its step and ends.
                process.terminate()
        raise


def _exit_code(process: BaseProcess) -> int:
    process.join()
    return given("an exit code", process.exitcode)


def _run_one(words: list[str], log: str, threads: int):
    """A run in a process of its own, with what it says in a file."""
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    with stopped_by_signals("the cross-validation was stopped"):
        try:
            run = read_run(words)
            check_further(run)
            with run_folder(run) as resume:
                train_run(run, resume)
        except ERRORS as error:
            say(line_of(error), sys.stderr)
            raise SystemExit(1) from error


def _write(place: Path, found: dict[str, Scores], settings: dict, trials: dict[str, list[Trial]]):
    """The table of all families and baselines, and the verdicts."""
    rows = []
    for i, (family, scores) in enumerate(found.items()):
        averages = scores.averages
        # The baselines are the same for all, and stand once.
        shown = averages if i == 0 else averages[averages["method"] == MODEL]
        rows.append(shown.assign(method=shown["method"].replace(MODEL, family)))
    table = pd.concat(rows, ignore_index=True)
    write_csv(table, place / TABLE)
    verdicts = {family: scores.verdict for family, scores in found.items()}
    results = {**settings, "averages": json.loads(table.to_json(orient="records")), "verdicts": verdicts}
    with whole_file(place / RESULTS) as partial:
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    with whole_file(place / TEXT) as partial:
        partial.write_text(_as_markdown(table, verdicts, trials), encoding="utf-8")


def _as_markdown(table: pd.DataFrame, verdicts: dict[str, str], trials: dict[str, list[Trial]]) -> str:
    """Families, then baselines and the ceiling, with 95 % intervals; how many steps the runs of a family took; the verdicts."""
    lines = [f"| | {' | '.join(METRICS)} | steps |", "|---|" + "---|" * (len(METRICS) + 1)]
    others = [method for method in dict.fromkeys(table["method"]) if method not in verdicts]
    for method in (*verdicts, *others):
        of = table[table["method"] == method].set_index("metric")
        figures = [with_interval(of.loc[metric]) if metric in of.index else "-" for metric in METRICS]
        steps = _steps(trials[method]) if method in verdicts else ""
        lines.append(f"| {f'**{method}**' if method in verdicts else method} | {' | '.join(figures)} | {steps} |")
    return "\n".join([*lines, "", *(f"- {verdict}" for verdict in verdicts.values())]) + "\n"


def _steps(trials: list[Trial]) -> str:
    """How many steps the runs took: the number, or the fewest and the most."""
    states = [trial.folder / "trainer_state.json" for trial in trials]
    taken = sorted({_steps_in(state) for state in states if state.is_file()})
    return " to ".join(f"{steps:,}" for steps in dict.fromkeys([*taken[:1], *taken[-1:]]))


def _steps_in(state: Path) -> int:
    content = load_json(state, LARGEST_TABLES, "remove it")
    steps = content.get("global_step") if isinstance(content, dict) else None
    if type(steps) is not int or not 0 <= steps < 2**63:
        raise ValueError(f"{state}: expected a global_step of 0 or more, found {_short(steps)}; remove it")
    return steps
