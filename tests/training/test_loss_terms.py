"""No figure that is NaN or infinite is reported."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from pertstate.training.loss_terms import LossTerms


def log(logs: dict) -> tuple[dict, dict]:
    """The figures that later callbacks and the history get."""
    state = SimpleNamespace(global_step=7, log_history=[dict(logs)])
    LossTerms(Accelerator(cpu=True)).on_log(None, state, None, logs=logs)
    return logs, state.log_history[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["train_loss", "eval_loss", "eval_energy", "test_mae", "learning_rate"])
def test_a_loss_that_is_not_finite_ends_the_run(name, value):
    with pytest.raises(FloatingPointError, match=f"{name} became NaN or infinite by step 7; lower learning_rate"):
        log({"epoch": 0.5, name: value})


def test_a_gradient_without_a_norm_is_left_out():
    for value in (float("nan"), float("inf")):
        assert log({"epoch": 0.5, "grad_norm": value}) == ({"epoch": 0.5}, {"epoch": 0.5})
    assert log({"grad_norm": 0.5, "epoch": 1}) == ({"grad_norm": 0.5, "epoch": 1}, {"grad_norm": 0.5, "epoch": 1})
