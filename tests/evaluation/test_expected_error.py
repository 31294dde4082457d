"""What the error that a run expects is worth."""

import numpy as np
import pytest
from made_scores import made_scores

from pertstate.evaluation.expected_error import expected_error_worth
from pertstate.evaluation.metrics import MODEL
from pertstate.evaluation.report_data import expectation


def test_expected_errors_are_shown_and_judged_where_there_is_no_confidence():
    scores = made_scores()
    assert expectation(scores.table).expected == "confidence"
    silent = scores.table.assign(confidence=np.nan)
    assert expectation(silent) is None
    of_model = (silent["method"] == MODEL).to_numpy()
    known = silent.assign(expected_mae=np.where(of_model, 3 - 2 * silent["mae"], np.nan))
    shown = expectation(known)
    assert (shown.expected, shown.found) == ("expected_mae", "mae") and shown.rank_correlation == pytest.approx(-1)
    # Groups that were trained on are not shown.
    assert len(shown.rows) == (of_model & (silent["seen"] == "")).sum() < of_model.sum()
    worth = expected_error_worth(known)
    assert worth.groups == len(shown.rows) and worth.mae == pytest.approx(shown.rows["mae"].mean())
    assert worth.error == pytest.approx((3 - 3 * shown.rows["mae"]).abs().mean())
    assert "it does not tell good from bad predictions" in str(worth)
    rising = expected_error_worth(known.assign(expected_mae=2 * known["mae"]))
    assert "is 1.00 (95 % interval 1.00 to 1.00, 5 groups): predictions are worse where it expects them" in str(rising)
    two = shown.rows.head(2)
    assert str(expected_error_worth(two)).endswith("was found (2 groups).")
    assert expected_error_worth(silent) is None and expected_error_worth(known.assign(seen="trained on")) is None
