"""Services that a run reports to are checked before data are read."""

import sys
import types

import pytest
from transformers.integrations import integration_utils

from pertstate.cli import main as pertstate
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.reporting import check_reporting


@pytest.mark.parametrize("service", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_before_data_are_read(service, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(integration_utils, f"is_{service}_available", lambda: False)
    words = ["train", str(tmp_path / "gone.h5ad"), "--test_contexts", "x", "--report_to", service]
    assert pertstate([*words, "--output_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert f"error: report_to: {service} needs a package that is not installed" in said
    assert said.endswith(f"pip install {service}\n") and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_service_is_named(tmp_path):
    with pytest.raises(ValueError, match="found 'tensorbord'; did you mean 'tensorboard'"):
        StateTrainingArguments(output_dir=str(tmp_path), report_to=["tensorbord"])
    assert StateTrainingArguments(output_dir=str(tmp_path)).report_to == []


def test_wandb_needs_a_user_unless_it_is_offline(monkeypatch):
    wandb = types.ModuleType("wandb")
    logged_in: list[bool] = []
    wandb.login = lambda prompt=True: not prompt and bool(logged_in)
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="found no key; run `wandb login`, or set WANDB_MODE=offline"):
        check_reporting(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_reporting(["wandb"])
    monkeypatch.delenv("WANDB_MODE")
    logged_in.append(True)
    check_reporting(["wandb"])
