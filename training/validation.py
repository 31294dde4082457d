"""Choosing the training groups that are held out for validation (`validation: auto`)."""

from collections import Counter
from dataclasses import replace

import pandas as pd

from pertstate.base.constants import Split
from pertstate.base.messages import counted, some
from pertstate.data.cells import assign_splits
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor
from pertstate.training.inner_folds import Key, inner_folds


def with_validation(
    splits: Splits, groups: pd.DataFrame, reader: StateProcessor, by_vector: bool = False
) -> tuple[Splits, str]:
    """
    Hold some training groups out for validation: the first of [`inner_folds`], which are as new to the remaining training groups as
    the test groups are. One group of each perturbation stays in training, unless perturbations have vectors. Splits that name
    validation groups stay as they are. Returns the splits, and a sentence that says what is held out.

    Args:
        splits ([`Splits`]): what the run names.
        groups (`pandas.DataFrame`): `dataset`, `context`, `perturbation`, `start` and `stop` of the source's groups.
        reader ([`StateProcessor`]): has read them.
        by_vector (`bool`): perturbations have vectors.
    """
    splits = splits.canonical(reader.canonical, groups)
    table = assign_splits(groups, splits, reader.control)
    if (table["split"] == Split.VAL).any():
        return splits, f"validation: auto: the groups of split {Split.VAL!r} are there already"
    train = _keys(table[table["split"] == Split.TRAIN])
    folds = inner_folds(table, reader.control, reader.split_combination, 1, by_vector)
    held = _staying(train, folds[0].groups, reader, by_vector) if folds else []
    if not held:
        return splits, (
            "validation: auto: no training groups can be held out as the test groups are; the last step is kept"
        )
    named = some([f"{context} / {name}" for _, context, name in held])
    return _holding_out(
        splits, held, train
    ), f"validation: auto: {counted(len(held), 'training group')} held out: {named}"


def _keys(table: pd.DataFrame) -> list[Key]:
    keys = table[["dataset", "context", "perturbation"]].astype(str).drop_duplicates()
    return list(keys.itertuples(index=False, name=None))


def _staying(train: list[Key], fold: set[Key], reader: StateProcessor, by_vector: bool) -> list[Key]:
    """The groups of a fold that leave another one, and another one of each of their perturbations."""
    left = None if by_vector else Counter(part for key in train for part in reader.split_combination(key[2]))
    held: list[Key] = []
    for key in sorted(fold):
        parts = reader.split_combination(key[2])
        if len(held) + 1 < len(train) and (left is None or all(left[part] > 1 for part in parts)):
            held.append(key)
            if left is not None:
                left.subtract(parts)
    return held


def _holding_out(splits: Splits, held: list[Key], train: list[Key]) -> Splits:
    """A context of which no group is left is held out whole."""
    zeroshot = dict(splits.zeroshot)
    fewshot = {place: {split: list(names) for split, names in of.items()} for place, of in splits.fewshot.items()}
    for place in dict.fromkeys(key[:2] for key in held):
        names = [key[2] for key in held if key[:2] == place]
        here = [key[2] for key in train if key[:2] == place]
        if len(names) == len(here) and place not in fewshot:
            zeroshot[place] = Split.VAL
        else:
            fewshot.setdefault(place, {})[Split.VAL] = sorted(names)
    return replace(splits, zeroshot=zeroshot, fewshot=fewshot)
