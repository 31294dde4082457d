"""A checkpoint that is replaced while it is read is read again, or told: never half of one and half of the other."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from finetuning_runs import make_folder, run
from safetensors.torch import load_file, save_file

from pertstate.base import outputs
from pertstate.cli import main as pertstate
from pertstate.hub import checkpoints
from pertstate.hub.checkpoints import load_adapter, load_whole
from pertstate.hub.publish import whole_checkpoint_folder
from pertstate.hub.unchanged import check_unchanged, read_unchanged, state_of
from pertstate.training.pretrained import Pretrained


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("unchanged"))
    run(folder, "adapter", "second", {}, {"pretrained": str(folder / "base")}, lora_rank=2)
    for name, file in (("base", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        shutil.copytree(folder / name, folder / f"new {name}")
        path = folder / f"new {name}" / file
        save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def replace(place: Path, new: Path):
    """As a training's last write does."""
    with whole_checkpoint_folder(place) as partial:
        for path in new.iterdir():
            if path.is_file():
                shutil.copyfile(path, partial / path.name)


@pytest.fixture
def replaced(monkeypatch):
    """Has a folder replaced between the reading of the processor and of the weights, so often."""
    left = []
    real = checkpoints.StateProcessor.from_pretrained

    def read(name, **kwargs):
        found = real(name, **kwargs)
        if left:
            replace(*left.pop())
        return found

    monkeypatch.setattr(checkpoints.StateProcessor, "from_pretrained", read)
    return left


@pytest.mark.parametrize("swaps", [True, False])
def test_a_model_that_is_replaced_once_is_read_again(folder, replaced, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(outputs, "_swap", lambda *_: False)
    expected = load_whole(str(folder / "new base"))[0].state_dict()
    replaced.append((folder / "base", folder / "new base"))
    found = load_whole(str(folder / "base"))[0].state_dict()
    assert replaced == [] and all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_that_is_replaced_once_is_read_again(folder, replaced):
    expected = load_adapter(str(folder / "new adapter"))[0].state_dict()
    replaced.append((folder / "adapter", folder / "new adapter"))
    found = load_adapter(str(folder / "adapter"))[0].state_dict()
    assert replaced == [] and all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_that_is_replaced_again_and_again_is_told(folder, replaced, tmp_path, capsys):
    replaced += [(folder / "base", folder / "new base")] * 100
    words = [
        "predict",
        "--quiet",
        "--model",
        folder / "base",
        "--adata",
        folder / "first.h5ad",
        "--perturbation",
        "pert_1",
    ]
    assert pertstate([*map(str, words), "--output", str(tmp_path / "out.h5ad")]) == 1
    said = capsys.readouterr().err
    assert "base is being replaced again and again while it is read" in said and said.count("\n") == 1
    assert not (tmp_path / "out.h5ad").exists()


def test_a_training_from_a_model_that_is_replaced_meanwhile_is_told(folder):
    section = {"pretrained": str(folder / "base")}
    pretrained = Pretrained.of(section)
    pretrained.model_for(pretrained.config_for(section), pretrained.processor)
    replace(folder / "base", folder / "new base")
    with pytest.raises(ValueError, match="base was replaced while it was read; run the command again"):
        pretrained.model_for(pretrained.config_for(section), pretrained.processor)


def test_what_belongs_to_no_checkpoint_may_change(folder):
    before = state_of(folder / "base")
    (folder / "base" / "notes.txt").write_text("mine")
    (folder / "base" / "checkpoint-3").mkdir()
    check_unchanged(folder / "base", before)
    os.utime(folder / "base" / "config.json", ns=(1, 1))
    with pytest.raises(ValueError, match="was replaced while it was read"):
        check_unchanged(folder / "base", before)


def test_errors_of_reading_are_its_own_where_nothing_changed(folder):
    def wrong():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read_unchanged(folder / "base", wrong)
    with pytest.raises(KeyError, match="mine"):
        read_unchanged("someone/model", wrong)
    tries = []

    def wrong_once():
        tries.append(1)
        if len(tries) == 1:
            replace(folder / "base", folder / "new base")
            raise ValueError("half of each")
        return "whole"

    assert read_unchanged(folder / "base", wrong_once) == "whole"
