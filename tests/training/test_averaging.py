"""The moving average of weights: its values, what is evaluated and saved, and a run that is continued."""

import pytest
import torch
from safetensors.torch import load_file
from trainers import make_trainer, simulated_cells
from transformers import TrainerCallback

from pertstate import StateForPerturbation


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("averaged"))


def average_of(start, found, decay):
    average = {name: weight.clone() for name, weight in start.items()}
    for step, weights in enumerate(found, 1):
        share = 1 - min(decay, step / (step + 9))
        for name, weight in weights.items():
            average[name] += share * (weight - average[name])
    return average


def run(screen, folder, **arguments):
    trainer = make_trainer(screen, folder, **arguments)
    weights = Weights()
    trainer.add_callback(weights)
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return trainer, weights, start


def test_the_model_ends_with_the_average_and_steps_go_on_from_the_weights(screen, tmp_path):
    plain, steps, _ = run(screen, tmp_path / "plain")
    plain.train()
    trainer, weights, start = run(screen, tmp_path / "averaged", average_decay=0.5)
    trainer.train()
    for one, other in zip(steps.found, weights.found):
        assert all(torch.equal(one[name], other[name]) for name in one)
    wanted = average_of(start, weights.found, 0.5)
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight, wanted[name], msg=name)
    assert any(not torch.equal(weight, weights.found[-1][name]) for name, weight in trainer.model.named_parameters())


def test_what_is_evaluated_and_saved_is_the_average(screen, tmp_path):
    settings = {
        "average_decay": 0.5,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    trainer, weights, start = run(screen, tmp_path, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for step, loss in zip((3, 6), losses):
        folder = tmp_path / f"checkpoint-{step}"
        saved = StateForPerturbation.from_pretrained(folder)
        wanted = average_of(start, weights.found[:step], 0.5)
        for name, weight in saved.named_parameters():
            torch.testing.assert_close(weight, wanted[name], msg=name)
        last = load_file(folder / "last_weights.safetensors")
        assert all(torch.equal(last[name], weight) for name, weight in weights.found[step - 1].items())
        other = make_trainer(screen, tmp_path / "other")
        other.model.load_state_dict(saved.state_dict())
        assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_that_is_continued_ends_with_the_same_bits(screen, tmp_path):
    settings = {"average_decay": 0.9, "save_strategy": "steps", "save_steps": 3}
    whole, *_ = run(screen, tmp_path, **settings)
    whole.train()
    again, *_ = run(screen, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(one, other), name


def test_the_best_checkpoint_is_kept_as_it_was_saved(screen, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer, *_ = run(
        screen, tmp_path, average_decay=0.5, load_best_model_at_end=True, metric_for_best_model="eval_loss", **settings
    )
    trainer.train()
    best = StateForPerturbation.from_pretrained(trainer.state.best_model_checkpoint)
    for (name, one), other in zip(trainer.model.named_parameters(), best.parameters()):
        assert torch.equal(one, other), name


def test_a_checkpoint_without_an_average_is_not_continued_with_one(screen, tmp_path):
    run(screen, tmp_path, save_strategy="steps", save_steps=3)[0].train()
    trainer, *_ = run(screen, tmp_path / "again", average_decay=0.5)
    with pytest.raises(
        ValueError, match="of a run that did not average its weights; continue it without average_decay"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(screen, tmp_path, decay):
    with pytest.raises(ValueError, match="average_decay must be at least 0 and below 1"):
        run(screen, tmp_path, average_decay=decay)
