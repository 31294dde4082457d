"""What a training says while it runs."""

import logging
import time
from types import SimpleNamespace

import pytest
from trainers import make_trainer, simulated_cells
from transformers.trainer_callback import TrainerControl, TrainerState

from pertstate.training.progress import SECONDS, TimedLog, duration


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("progress"))


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 s"), (-1, "0 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5399, "90 min"), (12600, "3.5 h")],
)
def test_times_are_said_in_words(seconds, words):
    assert duration(seconds) == words


def test_entries_come_every_few_seconds_whatever_a_step_takes(monkeypatch):
    """The steps at which a training is logged, whose steps take a hundredth of a second each by this clock."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    args = SimpleNamespace(logging_steps=None, logging_strategy="steps")
    state, timed, logged = TrainerState(max_steps=3000), TimedLog(), []
    timed.on_train_begin(args, state, TrainerControl())
    for step in range(1, 3001):
        now[0] += 0.01
        state.global_step, control = step, TrainerControl()
        timed.on_step_end(args, state, control)
        if control.should_log:
            logged.append(step)
            timed.on_log(args, state, control, logs={"loss": 1.0})
    # The first step, at most fifty times as many until the next, then as many as take five seconds, and the last.
    assert SECONDS == 5 and logged == [1, 51, 551, 1051, 1551, 2051, 2551, 3000]


def test_logging_steps_that_are_set_stay(screen, tmp_path, caplog):
    trainer = make_trainer(screen, tmp_path, logging_steps=3)
    with caplog.at_level(logging.INFO, logger="pertstate"):
        trainer.train()
    lines = [record.message for record in caplog.records if "  loss " in record.message]
    assert [line.partition("  ")[0] for line in lines] == ["step 3/6", "step 6/6"]


def test_lines_say_loss_speed_what_is_left_and_how_validation_compares(screen, tmp_path, caplog):
    trainer = make_trainer(screen, tmp_path, logging_steps=None, max_steps=8, eval_strategy="steps", eval_steps=4)
    with caplog.at_level(logging.INFO, logger="pertstate"):
        trainer.train()
    lines = [record.message for record in caplog.records]
    first = next(line for line in lines if line.startswith("step 1/8"))
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first.startswith(f"step 1/8  loss {entry['loss']:.4g}") and first.endswith(" cells/s")
    assert any("a step: 8 steps, and evaluations take about" in line for line in lines)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    said = next(line for line in lines if line.startswith("step 4/8  validation: "))
    assert said == (
        f"step 4/8  validation: loss {evaluated['eval_loss']:.4g}, Pearson {evaluated['eval_pearson']:.3g} (mean "
        f"{evaluated['eval_perturbation_mean_pearson']:.3g}), MAE {evaluated['eval_mae']:.3g} (mean "
        f"{evaluated['eval_perturbation_mean_mae']:.3g}), energy {evaluated['eval_energy']:.3g} (mean "
        f"{evaluated['eval_perturbation_mean_energy']:.3g})  (the best so far)"
    )
    assert any(line.startswith("8 steps in ") for line in lines)
