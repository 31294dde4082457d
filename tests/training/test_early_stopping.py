"""A training ends once its evaluations get no better, and keeps the best step."""

import pandas as pd
import pytest
from trainers import make_trainer, simulated_cells
from transformers.trainer_callback import TrainerState

from pertstate.training import StateTrainingArguments
from pertstate.training.early_stopping import stale_evaluations
from pertstate.training.history import write_history


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("early"))


def of_losses(*values: float) -> TrainerState:
    return TrainerState(log_history=[{"eval_loss": value, "step": i} for i, value in enumerate(values)])


@pytest.mark.parametrize(
    "losses, greater, stale",
    [
        ((), False, 0),
        ((3.0, 2.0, 1.0), False, 0),
        ((3.0, 1.0, 2.0, 1.5), False, 2),
        ((3.0, 1.0, 1.0), False, 1),  # as good is no better
        ((3.0, 1.0, 2.0), True, 2),
    ],
)
def test_evaluations_are_counted_from_the_best(losses, greater, stale):
    assert stale_evaluations(of_losses(*losses), "eval_loss", greater) == stale


# With a learning rate that is far too high, no evaluation is better than that before the first step.
WORSE = {
    "learning_rate": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "save_strategy": "steps",
}
WORSE |= {"save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 40}


def test_it_ends_after_so_many_evaluations_and_goes_no_further_when_resumed(screen, tmp_path):
    options = {**WORSE, "early_stopping_patience": 3, "max_grad_norm": 0.0}
    trainer = make_trainer(screen, tmp_path, **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 and trainer.state.global_step == 2 * (len(losses) - 1) < 40
    again = make_trainer(screen, tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == trainer.state.global_step


def test_without_patience_it_takes_all_steps(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path, **{**WORSE, "max_steps": 10})
    trainer.train()
    assert trainer.state.global_step == 10


def test_it_needs_the_best_step_to_be_kept(tmp_path):
    with pytest.raises(
        ValueError, match="early_stopping_patience=3 keeps the best step and needs load_best_model_at_end"
    ):
        StateTrainingArguments(output_dir=str(tmp_path), use_cpu=True, early_stopping_patience=3)
    with pytest.raises(ValueError, match="early_stopping_patience"):
        StateTrainingArguments(output_dir=str(tmp_path), use_cpu=True, early_stopping_patience=0)


@pytest.mark.parametrize("metric, best", [("eval_mae", min), ("energy", min), ("eval_pearson", max)])
def test_the_best_step_is_that_of_the_best_figure(screen, tmp_path, metric, best):
    """The library takes every figure without "loss" in its name to be better where it is higher."""
    options = {**WORSE, "eval_on_start": False, "metric_for_best_model": metric, "max_steps": 10}
    trainer = make_trainer(screen, tmp_path, **options)
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    figures = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert len(set(figures)) > 1 and trainer.state.best_metric == best(figures)


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"metric_for_best_model": "eval_mae", "greater_is_better": True}, "of mae the lowest is best; leave"),
        ({"metric_for_best_model": "pearson", "greater_is_better": False}, "of pearson the highest is best; leave"),
        ({"metric_for_best_model": "eval_zeros"}, "the best zeros is that of the real cells, neither the highest nor"),
    ],
)
def test_a_wrong_direction_is_refused(tmp_path, fields, error):
    with pytest.raises(ValueError, match=error):
        StateTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)
    again = StateTrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_mse")
    assert StateTrainingArguments(**{**again.to_dict(), "use_cpu": True}).greater_is_better is False


def test_the_history_is_a_table_of_steps_a_picture_and_the_state(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path / "run", eval_strategy="steps", eval_steps=3)
    trainer.train()
    (tmp_path / "history").mkdir()
    write_history(tmp_path / "history", trainer.state)
    table = pd.read_csv(tmp_path / "history" / "history.csv", float_precision="round_trip")
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6] and dict(zip(table["step"], table["loss"])) == logged
    evaluated = {e["step"]: e["eval_energy"] for e in trainer.state.log_history if "eval_energy" in e}
    rows = table.dropna(subset="eval_energy")
    assert dict(zip(rows["step"], rows["eval_energy"])) == evaluated and list(evaluated) == [3, 6]
    assert TrainerState.load_from_json(str(tmp_path / "history" / "trainer_state.json")).global_step == 6
    assert (tmp_path / "history" / "curves.png").stat().st_size > 5000
    # Of a run that logged nothing there is nothing.
    (tmp_path / "nothing").mkdir()
    write_history(tmp_path / "nothing", TrainerState())
    assert list((tmp_path / "nothing").iterdir()) == []
