"""Which of a run's training groups are held out to choose its best step, where the run leaves that to the package."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from pertstate.base.constants import Split
from pertstate.data.splits import Splits


Group = tuple[str, str, str]

# The share of the training groups, or contexts, that is held out; at least one, at most so many groups.
SHARE, MOST_GROUPS = 0.1, 64
# Contexts are held out whole where at least so many are trained on.
FEWEST_CONTEXTS = 3
# Groups of fewer cells are no measure.
FEWEST_CELLS = 10


def with_validation(
    splits: Splits, groups: pd.DataFrame, control: str, parts_of: Callable[[str], list[str]], by_name: bool
) -> Splits:
    """
    The splits with some training groups held out for validation; as they are where they name some already. Test groups are
    never among them. What is held out is like the test: contexts, where the test holds out contexts and at least three are
    trained on; combinations, where it holds out combinations; (context, perturbation) groups otherwise. A tenth of them,
    those of middling size, at least one. Every perturbation stays among the training groups.

    Args:
        splits ([`Splits`]): canonical.
        groups (`pandas.DataFrame`): `dataset`, `context`, `perturbation`, `start` and `stop` of the source's groups.
        control (`str`): the perturbation of control cells.
        parts_of (`Callable`): gives the single perturbations of a name.
        by_name (`bool`): the model knows a perturbation by its training cells alone, and not by features.
    """
    cells = _cells_of(groups)
    perturbed = [key for key in cells if key[2] != control]
    found = {key: splits.split_of(*key) for key in perturbed}
    if Split.VAL in found.values():
        return splits
    train = [key for key in perturbed if found[key] == Split.TRAIN]
    test = [key for key in perturbed if found[key] == Split.TEST]
    stays = _Staying(train, parts_of if by_name else lambda name: [])
    contexts = list(dict.fromkeys(key[:2] for key in train))
    whole = any(splits.split_of_context(*key[:2]) == Split.TEST for key in test)
    if whole and len(contexts) >= FEWEST_CONTEXTS:
        size = {place: sum(cells[key] for key in train if key[:2] == place) for place in contexts}
        wanted = max(1, round(SHARE * len(contexts)))
        held = [key for place in _middling(size)[:wanted] for key in train if key[:2] == place and stays.without(key)]
    else:
        size = {key: cells[key] for key in train if cells[key] >= FEWEST_CELLS}
        combined = [key for key in size if len(parts_of(key[2])) > 1]
        if combined and test and all(len(parts_of(key[2])) > 1 for key in test):
            size = {key: size[key] for key in combined}
        wanted = min(MOST_GROUPS, max(1, round(SHARE * len(train))))
        held = []
        for key in _middling(size):
            if len(held) < wanted and stays.without(key):
                held.append(key)
    return _holding_out(splits, held, train)


def _cells_of(groups: pd.DataFrame) -> dict[Group, int]:
    sizes = groups["stop"] - groups["start"]
    summed = sizes.groupby([groups[name] for name in ("dataset", "context", "perturbation")], observed=True).sum()
    return {(str(a), str(b), str(c)): int(count) for (a, b, c), count in summed.items()}


class _Staying:
    """Counts the training groups that each single perturbation is left in."""

    def __init__(self, train: list[Group], parts_of: Callable[[str], list[str]]):
        self._parts_of, self._left = parts_of, len(train)
        self._groups = Counter(part for key in train for part in parts_of(key[2]))

    def without(self, key: Group) -> bool:
        """Take a group away, if that leaves another one, and another one of each of its perturbations."""
        parts = self._parts_of(key[2])
        if self._left < 2 or any(self._groups[part] < 2 for part in parts):
            return False
        self._left -= 1
        self._groups.subtract(parts)
        return True


def _middling(size: dict) -> list:
    """Keys by how near the median their sizes are; of equal ones by name."""
    if not size:
        return []
    median = float(np.median(list(size.values())))
    return sorted(size, key=lambda key: (round(abs(np.log(size[key] / median)), 6), key))


def _holding_out(splits: Splits, held: list[Group], train: list[Group]) -> Splits:
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
