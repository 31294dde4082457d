"""Cells of many small groups, read at once."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np


# Cells of small groups that are read together: a read of a file costs as much as some hundred cells.
TOGETHER = 512


def read_ahead(
    rows: Iterable[np.ndarray], read: Callable[[np.ndarray], np.ndarray], together: int = TOGETHER
) -> Iterator[np.ndarray]:
    """
    The cells of one group after another. Groups that are small are read together, those of more than `together` cells alone.

    Args:
        rows (iterable of `np.ndarray`): the rows of each group.
        read (`Callable`): gives the cells of some rows, `(rows, features)`.
        together (`int`): the largest number of cells that are read for several groups.

    Returns:
        Iterator of the cells of each group, `(rows, features)`, in the order of `rows`.
    """
    waiting: list[np.ndarray] = []
    for of_group in rows:
        if waiting and sum(map(len, waiting)) + len(of_group) > together:
            yield from _read(waiting, read)
            waiting = []
        waiting.append(of_group)
    yield from _read(waiting, read)


def _read(rows: list[np.ndarray], read: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    if not rows:
        return
    cells = read(np.concatenate(rows))
    if len(rows) == 1:
        yield cells
        return
    start = 0
    for of_group in rows:
        # A copy, so that the cells of a group are not kept by those of another one.
        yield cells[start : start + len(of_group)].copy()
        start += len(of_group)
