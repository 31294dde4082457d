"""Training with a bfloat16 copy of the weights: the losses, what is saved, and where it is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainers import make_trainer, simulated_cells

from pertstate.training.half_weights import HalfWeights


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("screen"))


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_inside_the_weights_are_rounded_and_outside_they_are_not():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    masters, half = [weight.detach().clone() for weight in layer.parameters()], HalfWeights(layer)
    x = torch.randn(7, 5).bfloat16()
    with half.applied():
        assert [weight.dtype for weight in layer.parameters()] == [torch.bfloat16] * 2
        assert torch.equal(layer.weight, masters[0].bfloat16())
        layer(x).sum().backward()
    assert all(torch.equal(weight, master) for weight, master in zip(layer.parameters(), masters))
    first = layer.weight.grad.clone()
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, x.float().sum(dim=0).expand(3, 5), rtol=1e-2, atol=1e-2)
    # A second batch adds to the gradient in float32; a changed weight is rounded anew.
    with torch.no_grad():
        layer.bias.fill_(1 + 2**-12)
    with half.applied():
        assert layer.bias.tolist() == [1.0] * 3
        layer(2**-12 * x).sum().backward()
    assert not torch.equal(layer.weight.grad, first)
    torch.testing.assert_close(layer.weight.grad, first * (1 + 2**-12), rtol=1e-5, atol=1e-5)


def test_an_error_inside_leaves_the_weights_and_the_gradient():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before, gradient = layer.weight.data, layer.weight.grad.clone()
    with pytest.raises(ZeroDivisionError), HalfWeights(layer).applied():
        raise ZeroDivisionError
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight.grad, gradient)


def test_it_trains_to_the_loss_of_float32_and_saves_float32(screen, tmp_path):
    losses = {}
    for name, options in {"single": {}, "mixed": {"bf16": True}, "half": {"bf16": True, "bf16_weights": True}}.items():
        trainer = make_trainer(
            screen,
            tmp_path / name,
            max_steps=60,
            learning_rate=2e-3,
            gradient_accumulation_steps=2,
            average_decay=0.9,
            **options,
        )
        trainer.train()
        losses[name] = np.mean(logged(trainer, "loss")[-10:])
        trainer.save_model(str(tmp_path / name / "out"))
        saved = load_file(tmp_path / name / "out" / "model.safetensors")
        assert {of.dtype for of in saved.values() if of.is_floating_point()} == {torch.float32}
        # Weights that bfloat16 could not hold.
        assert any(not torch.equal(of, of.bfloat16().float()) for of in saved.values())
        assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_energy"]))
    assert losses["half"] == pytest.approx(losses["single"], rel=0.01)
    assert losses["half"] == pytest.approx(losses["mixed"], rel=0.01)


def test_a_run_is_continued_exactly(screen, tmp_path):
    options = {"bf16": True, "bf16_weights": True, "save_total_limit": 3, "save_steps": 3, "max_steps": 6}
    whole = make_trainer(screen, tmp_path / "whole", save_strategy="steps", **options)
    whole.train()
    parts = make_trainer(screen, tmp_path / "parts", **options)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(parts, "loss") == logged(whole, "loss")


def test_it_needs_bf16(screen, tmp_path):
    with pytest.raises(
        ValueError, match="bf16_weights: expected bf16: true and one process with one device, found bf16=False"
    ):
        make_trainer(screen, tmp_path, bf16_weights=True)
