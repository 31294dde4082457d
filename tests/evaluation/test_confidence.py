"""What the confidence of a model is worth."""

import json

import numpy as np
import pandas as pd
import pytest
from made_scores import made_scores
from scipy.stats import spearmanr

from pertstate.base.bounded_text import load_json
from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.evaluation.confidence import confidence_text, confidence_worth
from pertstate.evaluation.scores import SUMMARY


def table(confidence, energy, seen: str = "") -> pd.DataFrame:
    return pd.DataFrame({"method": "model", "seen": seen, "confidence": confidence, "energy": energy})


def test_the_rank_correlation_and_its_interval():
    generator = np.random.default_rng(0)
    energy = generator.gamma(2, size=40)
    expected = energy + generator.normal(0, 0.8, 40)
    worth = confidence_worth(table(expected, energy))
    assert worth.rank_correlation == pytest.approx(spearmanr(expected, energy).statistic)
    # Fisher's interval of a correlation, as Spearman's has it (Bonett and Wright 2000).
    rho = worth.rank_correlation
    error = np.sqrt((1 + rho**2 / 2) / 37)
    ends = np.tanh(np.arctanh(rho) + 1.96 * error * np.array([-1, 1]))
    np.testing.assert_allclose([worth.low, worth.high], ends, atol=0.07)
    assert (
        f"interval {worth.low:.2f} to {worth.high:.2f}, 40 groups): where the model expects a larger loss, its predictions are "
        "worse. It is not calibrated: there were no validation groups"
    ) in str(worth)
    assert "it misleads" in str(confidence_worth(table(-expected, energy)))
    assert "does not tell good from bad" in str(confidence_worth(table(generator.normal(size=40), energy)))


def test_groups_that_were_trained_on_do_not_count():
    rising = np.arange(6.0)
    both = pd.concat([table(rising, rising), table(-rising, rising, "trained on")])
    assert confidence_worth(both).rank_correlation == pytest.approx(1) and confidence_worth(both).groups == 6
    assert confidence_worth(table(rising, rising, "trained on")) is None
    assert confidence_worth(table(rising, rising).drop(columns="confidence")) is None
    assert confidence_worth(table(np.full(6, np.nan), rising)) is None


def test_too_few_groups_and_equal_figures_are_said():
    few = confidence_worth(table([1.0, 2, 3], [1.0, 2, 4]))
    assert (few.rank_correlation, few.low, few.high) == (pytest.approx(1), None, None)
    assert "is 1.00 over 3 groups, too few" in str(few)
    same = confidence_worth(table(np.ones(6), np.arange(6.0)))
    assert same.rank_correlation is None and "is not defined, as 6 groups do not differ" in str(same)


def test_what_the_calibration_is_worth_is_said_where_every_group_has_it():
    rows = table(np.arange(6.0), np.full(6, 0.5)).assign(expected_energy=[0.4, 0.6, 0.5, 0.5, 0.7, 0.5])
    worth = confidence_worth(rows)
    assert (worth.error, worth.energy) == (pytest.approx(0.4 / 6), pytest.approx(0.5))
    assert str(worth).endswith("the energy distance that it expects is off by 0.06667 on average, where 0.5 was found.")
    rows.loc[0, "expected_energy"] = np.nan
    assert confidence_worth(rows).error is None and "It is not calibrated" in str(confidence_worth(rows))


def test_an_output_says_what_to_expect_of_each_group():
    expected = {("c", "P"): 1.0, ("c", "Q"): 3.0, ("d", "P"): 9.0}
    line = ConfidenceCalibration(0.5, 1.0, 0.0, 4.0, 7)
    found = json.loads(confidence_text(expected, line))
    assert found["calibration"] == "energy distance from 7 validation groups"
    assert found["groups"]["c"] == {
        "P": {"expected_loss": 1.0, "expected_energy": 1.5},
        "Q": {"expected_loss": 3.0, "expected_energy": 3.5},
    }
    assert found["groups"]["d"]["P"] == {"expected_loss": 9.0, "expected_energy": 4.0}
    none = json.loads(confidence_text(expected, None))
    assert none["calibration"] == "not calibrated" and none["groups"]["d"] == {"P": {"expected_loss": 9.0}}


def test_saved_scores_hold_it(tmp_path):
    scores = made_scores()
    scores.save(tmp_path)
    assert load_json(tmp_path / SUMMARY, 1 << 20)["confidence"] == confidence_worth(scores.table).to_dict()
