"""What the confidence of a model is worth."""

import numpy as np
import pandas as pd
import pytest
from made_scores import made_scores
from scipy.stats import spearmanr

from pertstate.base.bounded_text import load_json
from pertstate.evaluation.confidence import confidence_worth
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
    assert str(worth).endswith(f"interval {worth.low:.2f} to {worth.high:.2f}, 40 groups): where the model expects a "
                               "larger loss, its predictions are worse.")  # fmt: skip
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


def test_saved_scores_hold_it(tmp_path):
    scores = made_scores()
    scores.save(tmp_path)
    assert load_json(tmp_path / SUMMARY, 1 << 20)["confidence"] == confidence_worth(scores.table).to_dict()
