"""The Sinkhorn divergence is that of geomloss, which only its users need to install."""

import sys

import pytest
import torch

from pertstate import StateConfig, objective_for
from pertstate.losses import SinkhornLoss


def config(loss: str) -> StateConfig:
    return StateConfig.from_preset("tiny", input_dim=3, num_perturbations=1, loss=loss)


def test_the_value_of_two_points():
    value = SinkhornLoss(blur=0.05)(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), None)
    torch.testing.assert_close(value, torch.tensor([1.5]), atol=1e-4, rtol=0)


def test_without_geomloss_other_losses_work_and_this_one_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "geomloss", None)
    objective_for(config("energy"))
    for loss in ("sinkhorn", "combined"):
        with pytest.raises(ImportError, match=r"needs geomloss: pip install 'pertstate\[sinkhorn\]'"):
            objective_for(config(loss))
