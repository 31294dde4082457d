"""Numbers that a model can compute with: finite, and of a size that single precision holds, sums and ratios included."""

from collections.abc import Callable, Sequence

import numpy as np


# Models compute in float32. A larger number is infinite there.
LARGEST = float(np.finfo(np.float32).max)
# Doses, totals of cells and what these are scaled to lie within 1/REACH and REACH: no unit that is in use is near, and
# their ratios are numbers of float32.
REACH = 1e30


def are_finite(values: np.ndarray) -> bool:
    """Whether all numbers are finite in float32. Takes no memory beside the values."""
    if values.size == 0 or values.dtype.kind not in "f":
        return True
    return -LARGEST <= float(values.min()) and float(values.max()) <= LARGEST  # False for NaN


def wrong(values: np.ndarray) -> np.ndarray:
    """Which numbers are NaN, infinite, or infinite in float32."""
    with np.errstate(over="ignore"):
        return ~np.isfinite(np.asarray(values, dtype=np.float32))


def within_reach(value) -> bool:
    """Whether a value is a number above 0 that lies within [`REACH`]."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and 1 / REACH <= float(value) <= REACH


def check_totals(totals: np.ndarray, source: str, where: Callable[[int], str]):
    """
    Check what cells sum to, `(cells,)`: 0, or a number within [`REACH`].

    Args:
        source (`str`): where the values are, for the error.
        where (`Callable`): names a cell by its place among the totals.

    Raises:
        ValueError: one does not; the error names the cell.
    """
    bad = ~((totals == 0) | ((1 / REACH <= totals) & (totals <= REACH)))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{source}: {where(at)} sums to {totals[at]:g} ({int(bad.sum())} such cells read); expected the counts of a cell, "
            "at most a few millions: leave such cells out"
        )


def check_predicted(values: np.ndarray, features: Sequence[str], where: Callable[[int], str]):
    """
    Check predictions `(cells, features)` before they are written or given out.

    Args:
        features (sequence of `str`): names of the columns.
        where (`Callable`): says which cell a row is.

    Raises:
        FloatingPointError: a value is NaN or infinite; the error names the cell and the feature.
    """
    if are_finite(values):
        return
    bad = wrong(values)
    row, column = np.argwhere(bad)[0]
    raise FloatingPointError(
        f"the model predicts {values[row, column]} for {features[column]!r} of {where(int(row))} ({int(bad.sum())} of "
        f"{bad.size} values are no finite numbers), and nothing is written; look at the values, doses and features of these "
        "cells, which are larger than those of training, or use another checkpoint"
    )


__all__ = ["LARGEST", "REACH", "are_finite", "check_predicted", "check_totals", "within_reach", "wrong"]
