"""CONTRIBUTING.md adds a family step by step; following it literally gives a family that trains, loads and predicts."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from zipfile import ZipFile

import anndata as ad
import numpy as np
import pytest

from pertstate.data import simulate_screen


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A block after a paragraph that begins with the path of its file.
FILES = dict(re.findall(r"^`(\w+/[\w/.]+)`(?:(?!\n\n).)*\n\n```\w+\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
# Lines to be added to an existing block of code: they are indented and stand in a block of their own.
LINES = re.findall(r"^```\n((?: {4}[^\n]+\n)+)```$", PAGE, flags=re.MULTILINE)

# Trains, loads and predicts with the copy, then runs the tests of the page, all in one process.
SCRIPT = """
import sys
from pathlib import Path
import anndata as ad
import pytest
import torch
torch.set_num_threads(1)
folder, copy = Path(sys.argv[1]), Path(sys.argv[2])
import pertstate.train
assert Path(pertstate.__file__).resolve() == (copy / "__init__.py").resolve(), pertstate.__file__
metrics = pertstate.train.main([
    str(copy / "configs" / "shift.yaml"), "--datasets", str(folder / "screen.h5ad"), "--test_contexts", "type_3",
    "--output_dir", str(folder / "run"), "--max_steps", "30", "--learning_rate", "1e-2", "--set_size", "8",
    "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no",
])
assert metrics["test_energy"] < metrics["test_no_change_energy"], metrics
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(folder / "run").eval(), AutoProcessor.from_pretrained(folder / "run")
assert type(model) is pertstate.ShiftForPerturbation
sentences = processor(ad.read_h5ad(folder / "screen.h5ad"), perturbation="pert_1", context="type_3")
with torch.inference_mode():
    processor.decode(model(**sentences), sentences).write_h5ad(folder / "expected.h5ad")

sys.path.insert(0, str(copy / "tests"))
import make_fixtures
make_fixtures.main()
import os
os.chdir(copy)
tests = ["families/test_shift.py", "test_init.py", "test_fixtures.py", "base/test_modeling_finetuning.py"]
chosen = ["-k", "shift or every_family or checkers", *(f"tests/{test}" for test in tests)]
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", *chosen]))
"""


def test_the_page_names_every_file_of_a_family():
    names = ("__init__.py", "configuration_shift.py", "modeling_shift.py", "objective_shift.py", "card.md")
    assert sorted(FILES) == sorted(
        [*(f"families/shift/{name}" for name in names), "tests/families/test_shift.py", "configs/shift.yaml"]
    )
    assert [re.split(r"\W", lines.strip(' "'))[0] for lines in LINES] == ["Family", "from", "state"]


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a copy of the package in which the steps of the page were done, and what its run and tests printed."""
    folder = tmp_path_factory.mktemp("contributing")
    copy = folder / "site" / "pertstate"
    kept = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "demo", "runs", "*.egg-info", "shared")
    shutil.copytree(ROOT, copy, ignore=kept)
    for name, text in FILES.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text, encoding="utf-8")
    blocks = {
        "families/__init__.py": "\n_FAMILIES = (\n",
        "__init__.py": "\nif TYPE_CHECKING:\n",
        "tests/base/test_modeling_finetuning.py": "\nCASES = {\n",
    }
    for lines, (name, opening) in zip(LINES, blocks.items(), strict=True):
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(opening) == 1, name
        (copy / name).write_text(text.replace(opening, opening + lines), encoding="utf-8")
    screen = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=16, seed=1)
    screen.write_h5ad(folder / "screen.h5ad")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(copy)],
        env={**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_the_page_gives_a_family_that_passes_the_tests_of_all(followed):
    _, printed = followed
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed >= 20 and "failed" not in printed, printed


@pytest.mark.slow
def test_the_build_packs_the_family(followed, tmp_path):
    folder, _ = followed
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=folder / "site" / "pertstate", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    added = {f"pertstate/{name}" for name in FILES if name.startswith(("families/", "configs/"))}
    assert added < set(ZipFile(wheel).namelist())


@pytest.mark.slow
def test_its_checkpoint_predicts_the_same_bits_without_the_package(followed, alone):
    folder, _ = followed
    script = """
import sys
import anndata as ad, torch
from transformers import AutoModel, AutoProcessor
folder, screen, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
sentences = processor(ad.read_h5ad(screen), perturbation="pert_1", context="type_3")
with torch.inference_mode():
    processor.decode(model(**sentences), sentences).write_h5ad(output)
print(type(model).__module__.split(".")[0], type(model).__name__)
"""
    printed = alone.run(script, folder / "run", folder / "screen.h5ad", folder / "alone.h5ad")
    assert printed.split() == ["transformers_modules", "ShiftForPerturbation"]
    expected, found = (ad.read_h5ad(folder / f"{name}.h5ad").X for name in ("expected", "alone"))
    assert np.array_equal(found, expected) and np.abs(expected).max() > 0
