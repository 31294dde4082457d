"""How long to train, chosen on training groups that are held out in turn: test cells choose nothing."""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from transformers import TrainerCallback, set_seed

from pertstate.base.constants import Split
from pertstate.base.messages import some
from pertstate.base.printable import get_logger
from pertstate.base.stopped import StoppedError
from pertstate.data.cells import Cells
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.sentences import SentenceDataset
from pertstate.evaluation.group_scores import scored_cells
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.stopping import Stop


logger = get_logger("pertstate.train")

Key = tuple[str, str, str]

# Control cells of a batch of a context that tell how much cells differ.
_CONTROLS = 1000
# Groups of contexts that are trained on are held out in so many parts.
_PARTS = 5
# Where whole perturbations are held out, further folds follow until so many are: each says little alone.
_JUDGED = 10
# Shares of the steps at which the held-out groups are scored, beside the start.
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


@dataclass
class InnerFold:
    """Training groups that are held out together, and what they are, in words."""

    name: str
    groups: set[Key]


def inner_folds(
    groups: pd.DataFrame, control: str, parts: Callable[[str], list[str]], folds: int, by_vector: bool = False
) -> list[InnerFold]:
    """
    Which training groups to hold out in turn. They are as new to the remaining training groups as the test groups are to all.

    - Where test groups are of contexts without training groups, or there are no test groups: all groups of a context. Of many
      contexts, those with a middling number of cells.
    - Where they are of contexts that are trained on: a fifth of the groups whose perturbation other contexts have, too; or,
      where a test perturbation has no training group, of the combinations whose parts all stand in other training groups, and with
      vectors of all perturbations.

    Args:
        groups (`pandas.DataFrame`): `dataset`, `context`, `perturbation`, `split`, `start` and `stop` of the cells.
        control (`str`): the name of controls.
        parts (`Callable`): gives the perturbations in a name.
        folds (`int`): at most so many folds.
        by_vector (`bool`): perturbations have vectors, so that one without training cells can be predicted.

    Returns:
        `list[InnerFold]`: empty where nothing can be held out: too few contexts, or no such combinations.
    """
    keys = groups[["dataset", "context", "perturbation"]].astype(str)
    table = keys.assign(split=groups["split"].to_numpy(), cells=(groups["stop"] - groups["start"]).to_numpy())
    training = table[table["split"] == Split.TRAIN]
    trained = training.groupby(["dataset", "context"], sort=True)["cells"].sum()
    test = {(d, c) for d, c in table.loc[table["split"] == Split.TEST, ["dataset", "context"]].itertuples(index=False)}
    if not test or not test <= set(trained.index):
        if len(trained) < 2:
            return []
        by_size = [place for place, _ in sorted(trained.items(), key=lambda item: (item[1], item[0]))]
        number = min(folds, len(by_size))
        # The middles of equal parts.
        chosen = [by_size[int((i + 0.5) * len(by_size) / number)] for i in range(number)]
        rows = training.groupby(["dataset", "context"])["perturbation"]
        return [
            InnerFold("/".join(place), {(*place, name) for name in rows.get_group(place)}) for place in sorted(chosen)
        ]
    rows = sorted(training[["perturbation", "dataset", "context"]].drop_duplicates().itertuples(index=False, name=None))
    names = {name for name, *_ in rows}
    if set(table.loc[table["split"] == Split.TEST, "perturbation"]) <= names:
        # Each perturbation stays in other contexts.
        several = {name for name in names if sum(other == name for other, *_ in rows) > 1}
        units = [[row] for row in rows if row[0] in several]
    else:
        units = []
        for name in sorted(name for name in names if by_vector or len(parts(name)) > 1):
            others = {part for other in names - {name, control} for part in parts(other)}
            if by_vector or set(parts(name)) <= others:
                units.append([row for row in rows if row[0] == name])
    if by_vector and len(units) < 2:
        return []
    of_parts = [sum(units[i::_PARTS], []) for i in range(min(_PARTS, len(units)))]
    return [
        InnerFold(
            some(sorted({name for name, *_ in held})), {(dataset, context, name) for name, dataset, context in held}
        )
        for held in of_parts[:folds]
    ]


def folds_of(dataset: SentenceDataset, folds: int) -> list[InnerFold]:
    """
    The [`inner_folds`] of a training split on which a run chooses its number of steps: so many; and where whole perturbations are held
    out, because they have vectors, so many more that ten perturbations are held out in all, where there are so many.
    """
    processor, groups = dataset.processor, dataset.cells.groups
    by_vector = processor.perturbation_features is not None
    if by_vector:
        more = inner_folds(groups, processor.control, processor.split_combination, max(folds, _PARTS), by_vector)
        if _holds_whole(groups, more):
            held = np.cumsum([len({name for *_, name in fold.groups}) for fold in more])
            return more[: max(folds, 1 + int(np.searchsorted(held, _JUDGED)))]
    return inner_folds(groups, processor.control, processor.split_combination, folds, by_vector)


def _holds_whole(groups: pd.DataFrame, folds: list[InnerFold]) -> bool:
    """Whether each of some folds leaves no training group of its perturbations."""
    training = groups.loc[groups["split"] == Split.TRAIN, ["dataset", "context", "perturbation"]].astype(str)
    keys = [*training.itertuples(index=False, name=None)]
    return all(
        not any(key not in fold.groups and key[2] in {name for *_, name in fold.groups} for key in keys)
        for fold in folds
    )


def with_fold(cells: Cells, fold: InnerFold) -> Cells:
    """The training cells with a fold's groups for validation; the groups that the run holds out are not used."""
    groups = cells.groups.copy()
    split = groups["split"].astype(object)
    keys = list(groups[["dataset", "context", "perturbation"]].astype(str).itertuples(index=False, name=None))
    held = np.array([key in fold.groups for key in keys])
    split[split.isin([Split.VAL, Split.TEST])] = Split.UNUSED
    split[held & (split == Split.TRAIN)] = Split.VAL
    groups["split"] = split
    return Cells(cells.features, cells.genes, groups, cells.notes, cells.ids)


def choose_steps(
    trainer_of: Callable,
    datasets_of: Callable[[Cells], dict[str, SentenceDataset]],
    dataset: SentenceDataset,
    args: StateTrainingArguments,
    folds: int,
) -> tuple[int, ChangeIntervals] | None:
    """
    Train with each inner fold held out, and choose the number of steps with the lowest mean, over folds, of

        1/3 (energy / energy_0 + MAE / MAE_0 + (1 - Pearson) / (1 - Pearson_0))

    of the held-out groups, `_0` being before the first step. Where whole perturbations are held out in three folds or more, choose the
    smallest number whose mean is within one standard error of the lowest (Breiman et al. 1984, Classification and Regression Trees,
    section 3.4.3): a few perturbations differ more from one another than numbers of steps do.

    Args:
        trainer_of (`Callable`): makes a [`StateTrainer`] with a new model, from arguments, training and validation data.
        datasets_of (`Callable`): makes the datasets of cells.
        dataset ([`SentenceDataset`]): the training split.
        args ([`StateTrainingArguments`]): `max_steps` is the largest number.
        folds (`int`): how many, see [`folds_of`].

    Returns:
        The number of steps, 0 where no training betters the start, and the intervals that the held-out groups give at this number;
        None where nothing can be held out.
    """
    processor = dataset.processor
    found = folds_of(dataset, folds)
    if not found:
        return None
    steps = sorted({max(1, round(args.max_steps * share)) for share in _SHARES})
    ratios, changes, numbers = [], [], []
    for number, fold in enumerate(found):
        logger.info(
            f"choosing the number of steps, {number + 1} of {len(found)}: {fold.name} of the training groups is held out"
        )
        data = datasets_of(with_fold(dataset.cells, fold))
        with tempfile.TemporaryDirectory() as folder:
            set_seed(args.seed)
            scores = _Scores(steps)
            trainer = trainer_of(
                inner_arguments(args, folder),
                data[Split.TRAIN],
                data[Split.VAL],
                stop=UnsavedStop("stopped while the number of steps was being chosen; start the run again"),
                callbacks=[scores],
            )
            scores.trainer = trainer
            trainer.train()
        ratios.append(scores.ratios())
        changes.append(scores.changes)
        numbers += scores.numbers(control_counts(data[Split.VAL].cells.groups, processor.control))
        logger.info(f"with {fold.name} held out: {scores}")
    by_vector = processor.perturbation_features is not None
    careful = by_vector and len(found) > 2 and _holds_whole(dataset.cells.groups, found)
    best = chosen_step(np.array(ratios), careful)
    predicted, observed = np.concatenate([of_fold[best] for of_fold in changes], axis=1)
    spread = control_spread(dataset, trainer.decodes)
    cells, controls = np.array(numbers).T
    return [0, *steps][best], ChangeIntervals.of_held_out(predicted, observed, cells, controls, spread)


def chosen_step(ratios: np.ndarray, careful: bool) -> int:
    """
    The column of `ratios` `(folds, 1 + steps)` with the lowest mean; if `careful`, the first whose mean is within one standard error
    of it.
    """
    mean = ratios.mean(axis=0)
    best = int(np.argmin(mean))
    if not careful:
        return best
    return int(np.argmax(mean <= mean[best] + ratios[:, best].std(ddof=1) / np.sqrt(len(ratios))))


def control_spread(dataset: SentenceDataset, decoded: bool) -> np.ndarray:
    """
    The standard deviation of each feature among control cells of the training contexts, within contexts `(features,)`, in the
    units of predictions.

    Args:
        dataset ([`SentenceDataset`]): the training split.
        decoded (`bool`): whether predictions are decoded genes.
    """
    cells, processor = dataset.training_cells(), dataset.processor
    values, places = scored_cells(cells, processor, decoded), set(dataset.learned_controls())
    variances: list[np.ndarray] = []
    for *place, name, start, stop in cells.groups[["dataset", "context", "perturbation", "start", "stop"]].to_numpy():
        if name == processor.control and tuple(place) in places and stop - start > 1:
            variances.append(np.asarray(values[np.arange(start, min(stop, start + _CONTROLS))]).var(axis=0, ddof=1))
    return np.sqrt(np.mean(variances, axis=0, dtype=np.float64))


def control_counts(groups: pd.DataFrame, control: str) -> Counter:
    """The number of control cells of each dataset and context."""
    found: Counter = Counter()
    for *place, start, stop in groups.loc[
        groups["perturbation"] == control, ["dataset", "context", "start", "stop"]
    ].itertuples(index=False, name=None):
        found[tuple(map(str, place))] += stop - start
    return found


def inner_arguments(args: StateTrainingArguments, folder: str) -> StateTrainingArguments:
    """The arguments of a run for a training inside of it, of which nothing is kept."""
    inner = copy.copy(args)
    inner.output_dir, inner.save_strategy, inner.eval_strategy = folder, "no", "no"
    inner.report_to, inner.disable_tqdm = [], True
    inner.load_best_model_at_end, inner.push_to_hub, inner.eval_on_start = False, False, True
    return inner


class _Scores(TrainerCallback):
    """
    Asks for an evaluation at some steps, and keeps the figures, and the mean changes of each group, `(2, groups, features)`: predicted
    and observed.
    """

    def __init__(self, steps: list[int]):
        self.steps = steps
        self.found: list[dict[str, float]] = []
        self.changes: list[np.ndarray] = []
        self.results: list[tuple[Key, dict[str, int]]] = []
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step in self.steps

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.found.append(metrics)
        results = self.trainer.compute_metrics.results
        means = [result.means for result in results]
        self.results = [(result.group, result.numbers) for result in results]
        self.changes.append(
            np.array([[of[name] - of["control"] for of in means] for name in ("predicted", "observed")])
        )

    def ratios(self) -> np.ndarray:
        """`(1 + steps,)`: the mean of the three figures, each beside that before the first step."""
        figures = np.array([[m["eval_energy"], m["eval_mae"], 1 - m.get("eval_pearson", 0.0)] for m in self.found])
        return (figures / figures[0]).mean(axis=1)

    def numbers(self, controls: Counter) -> list[tuple[int, int]]:
        """Of each group the cells that were measured, and the control cells; those of a context are drawn again where they are few."""
        return [(of["real_cells"], min(of["control_cells"], controls[group[:2]])) for group, of in self.results]

    def __str__(self) -> str:
        return ", ".join(f"{ratio:.3f} after {step} steps" for step, ratio in zip([0, *self.steps], self.ratios()))


class UnsavedStop(Stop):
    """
    A signal ends the training after the running step, and nothing is saved.

    Args:
        message (`str`): what [`StoppedError`] says.
    """

    def __init__(self, message: str):
        super().__init__()
        self._message = message

    def on_step_end(self, args, state, control, **kwargs):
        if number := self._agreed():
            raise StoppedError(number, self._message)

    def after_the_last_step(self, args, state):
        self.on_step_end(args, state, None)
