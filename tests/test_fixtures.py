"""Checkpoints that earlier versions wrote load as they did then, and predict the same numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from alone import Alone
from make_fixtures import CASES, FIXTURES, of_real_cells, predict, read_cells
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from pertstate import StateProcessor
from pertstate.families import FAMILIES


FOLDERS = sorted(path.name for path in FIXTURES.iterdir())


def assert_as_written(found: dict[str, torch.Tensor], folder: Path):
    expected = load_file(folder / "expected.safetensors")
    found = {name: found[name] for name in expected}
    torch.testing.assert_close(of_real_cells(found), of_real_cells(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::pertstate.base.modeling_layers.UnseenWarning")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_of_an_earlier_version_predicts_as_it_did(name):
    folder = FIXTURES / name
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is FAMILIES[model.config.model_type].model and type(processor) is StateProcessor
    assert not model.training
    assert_as_written(predict(model, processor, *read_cells(folder)), folder)


def test_every_family_has_a_checkpoint_of_an_earlier_version():
    kept = {AutoConfig.from_pretrained(FIXTURES / name).model_type for name in FOLDERS}
    assert kept == set(FAMILIES), "run tests/make_fixtures.py once for a new family, and commit what it wrote"
    assert set(FOLDERS) == set(CASES)


def test_the_checkpoints_are_small_and_hold_no_code():
    for name in FOLDERS:
        files = list((FIXTURES / name).iterdir())
        assert sum(path.stat().st_size for path in files) < 60_000, name
        assert {path.suffix for path in files} == {".json", ".safetensors"}, name


@pytest.mark.parametrize("name", ["state-features", "state-scvi"])
def test_an_old_checkpoint_predicts_with_the_code_of_today_beside_it(name, tmp_path, alone: Alone):
    """A later version pushes it again: old weights with today's code, loaded without the package."""
    shutil.copytree(FIXTURES / name, tmp_path / "old")
    for loaded in (AutoModel.from_pretrained(FIXTURES / name), AutoProcessor.from_pretrained(FIXTURES / name)):
        loaded.save_pretrained(tmp_path / "new")
    for code in (tmp_path / "new").glob("*.py"):
        shutil.copy(code, tmp_path / "old")
    script = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
folder, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = {name: value for name, value in load_file(f"{folder}/expected.safetensors").items() if name[:7] == "inputs."}
with torch.no_grad():
    outputs = model(**{name[7:]: value for name, value in inputs.items()})
encoded = processor.encode(["control", "pert_1"])
save_file({f"outputs.{name}": value.clone() for name, value in outputs.items()} | inputs, output)
print(type(model).__module__.split(".")[0], *encoded)
"""
    expected = "perturbation_features" if name == "state-features" else "perturbation_ids"
    assert alone.run(script, tmp_path / "old", tmp_path / "out.safetensors").split() == [
        "transformers_modules",
        expected,
    ]
    assert_as_written(load_file(tmp_path / "out.safetensors"), FIXTURES / name)
