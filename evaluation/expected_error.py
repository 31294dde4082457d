"""The error that a run expects of its predictions, from training groups that it held out, and what that is worth."""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from pertstate.base.messages import counted
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.evaluation.confidence import worth_of_ranks
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.scoring import GroupResult


def expected_maes(results: list[GroupResult], intervals: ChangeIntervals) -> list[float]:
    """
    The MAE of the mean that is to be expected of each group as it is scored, by [`ChangeIntervals`].

    Args:
        results (`list[GroupResult]`): of groups that the model predicted.
        intervals ([`ChangeIntervals`]): of the scored features.
    """
    return [
        float(
            intervals.expected_mae(
                result.means["predicted"].astype(np.float64) - result.means["control"],
                result.numbers["real_cells"],
                result.numbers["control_cells"],
            )
        )
        for result in results
    ]


@dataclass
class ExpectedErrorWorth:
    """
    How near the MAE that a run expects is to the one that was found, over held-out groups.

    Args:
        rank_correlation (`float`, *optional*): Spearman's; None if it is not defined.
        low, high (`float`, *optional*): its 95 % interval by the bootstrap over groups; None with fewer than 5 groups.
        groups (`int`): how many groups it is taken over.
        error (`float`): the mean absolute difference of both.
        mae (`float`): the mean MAE that was found.
    """

    rank_correlation: float | None
    low: float | None
    high: float | None
    groups: int
    error: float
    mae: float

    def __str__(self) -> str:
        text = (
            f"Expected error: the MAE that the run expects, from training groups that it held out, is off by {self.error:.4g} on average, "
            f"where {self.mae:.4g} was found"
        )
        number = counted(self.groups, "group")
        if self.low is None or self.high is None:
            return f"{text} ({number})."
        text += f"; their rank correlation is {self.rank_correlation:.2f} (95 % interval {self.low:.2f} to {self.high:.2f}, {number})"
        if self.low > 0:
            return f"{text}: predictions are worse where it expects them to be."
        return f"{text}: it does not tell good from bad predictions, as far as these groups show."

    def to_dict(self) -> dict[str, float | None]:
        """The fields, for JSON."""
        return asdict(self)


def expected_error_worth(table: pd.DataFrame, seed: int = 0) -> ExpectedErrorWorth | None:
    """
    What the expected MAE is worth on the groups that were not trained on.

    Args:
        table (`pandas.DataFrame`): that of [`~pertstate.evaluation.Scores`].
        seed (`int`): of the resampling of groups.

    Returns:
        [`ExpectedErrorWorth`]; None if no error was expected, or no group was held out.
    """
    rows = held_out_errors(table)
    if rows is None:
        return None
    expected, found = (rows[name].to_numpy(dtype=np.float64) for name in ("expected_mae", "mae"))
    worth = worth_of_ranks(expected, found, seed)
    return ExpectedErrorWorth(*worth, len(rows), float(np.abs(expected - found).mean()), float(found.mean()))


def held_out_errors(table: pd.DataFrame) -> pd.DataFrame | None:
    """The rows of the model's groups that were not trained on and have an expected and a found MAE; None if there are none."""
    if "expected_mae" not in table:
        return None
    known = table["expected_mae"].notna() & table["mae"].notna()
    rows = table[(table["method"] == MODEL) & (table["seen"] == "") & known]
    return rows if len(rows) else None
