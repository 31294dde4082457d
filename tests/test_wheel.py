"""The built wheel: what it holds, and all that a user does with it in a folder that is not a clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from pertstate import __version__


ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# Beside modules. `py.typed` tells type checkers that the package has types.
DATA = ("py.typed", "configs/**/*.yaml", "model_cards/*.md", "families/*/card.md", "evaluation/page/*")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel. It is built from a copy, so that an earlier build leaves nothing in it, and this build leaves no files."""
    folder = tmp_path_factory.mktemp("wheel")
    others = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "dist", "runs", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=others)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, env=clean_environment())
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory) -> "User":
    """An environment of its own with the wheel. It takes the dependencies, and nothing else, from this environment."""
    folder = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    # Files .pth of the folders named in one are not read: an editable pertstate there stays unknown.
    own = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(own) + "\n")
    words = ["--python", folder / "venv", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, env=clean_environment())
    (folder / "elsewhere").mkdir()
    return User(folder)


class User:
    """Runs programs of the environment in `folder`, a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.programs = folder / "elsewhere", folder / "venv" / "bin"

    def run(self, program: str, *words) -> str:
        """What a program printed."""
        done = subprocess.run(
            [str(self.programs / program), *map(str, words)],
            cwd=self.folder,
            env=clean_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def clean_environment() -> dict[str, str]:
    """An environment of variables without a path to a clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def test_it_holds_the_package_and_nothing_else(wheel):
    assert {"app", "base", "cli", "data", "evaluation", "families", "hub", "legacy", "losses", "training"} == set(ROOMS)
    modules = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    data = [path for pattern in DATA for path in ROOT.glob(pattern)]
    assert {path.parent.name for path in data if path.name == "card.md"} == {
        path.parent.name for path in ROOT.glob("families/*/objective_*.py")
    }
    expected = {f"pertstate/{path.relative_to(ROOT)}" for path in (*modules, *data)}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        [licence] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert found == expected
    assert "pertstate/py.typed" in found and "pertstate/configs/demo.yaml" in found


def test_the_package_is_that_of_the_wheel(user):
    code = "import pertstate; print(pertstate.__file__); from importlib.metadata import version; print(version('pertstate'))"
    place, version = user.run("python", "-c", code).splitlines()
    assert Path(place).is_relative_to(user.programs.parent) and version == __version__


def test_the_command(user):
    assert user.run("pertstate", "--help").startswith("usage: pertstate")
    assert user.run("pertstate", "--version") == f"pertstate {__version__}\n"


def test_the_demonstration_and_the_six_lines(user):
    """Run the steps of `make demo` with the config of the package, and then the lines of the README on the result."""
    (user.folder / "demo").mkdir()
    user.run(
        *("python", "-c"),
        "from pertstate.data import simulate_screen; simulate_screen(seed=0).write_h5ad('demo/screen.h5ad')",
    )
    user.run("pertstate", "configs", "demo", "--output", "demo.yaml")
    user.run("pertstate", "train", "demo.yaml")
    words = ["--model", "demo/checkpoint", "--adata", "demo/screen.h5ad", "--context", "type_11"]
    user.run("pertstate", "predict", *words, "--output", "demo/predicted.h5ad")
    words = ["--predicted", "demo/predicted.h5ad", "--real", "demo/screen.h5ad", "--train", "demo/screen.h5ad"]
    user.run("pertstate", "evaluate", *words, "--output", "demo/scores.csv")
    table = pd.read_csv(user.folder / "demo" / "scores.csv")
    scores = table[table["context"] == "mean"].set_index("method")
    # The figures that `make demo` prints; another processor rounds sums otherwise.
    found = scores.loc["model", ["pearson", "mae", "energy"]].tolist()
    assert found == pytest.approx([0.7460, 0.2070, 0.7083], abs=0.01)
    assert scores.loc["model", "energy"] < scores.loc["perturbation mean", "energy"] < scores.loc["no change", "energy"]

    readme = MarkdownIt().parse((ROOT / "README.md").read_text())
    blocks = [token.content for token in readme if token.type == "fence"]
    [i] = [i for i, lines in enumerate(blocks) if lines.startswith("import anndata") and '"demo/checkpoint"' in lines]
    said, shown = user.run("python", "-c", blocks[i]), blocks[i + 1]
    assert re.sub(r"\s+", " ", said) == re.sub(r"\s+", " ", shown)
