"""The folder of a Hub Space that shows the page of a model."""

import os
import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import yaml

from pertstate.base.hub_names import is_repository
from pertstate.base.outputs import Kind, claimed_folder, whole_folder
from pertstate.base.printable import printable
from pertstate.data.reading import AnnDataFile


# The release that a Space runs; the tests have looked at the page with it.
GRADIO = "6.31.0"
PYTHON = "3.11"
APP, REQUIREMENTS, CARD, CELLS, PACKAGE = "app.py", "requirements.txt", "README.md", "controls.h5ad", "pertstate"
SPACE = Kind("Space", (APP,), lambda name: name in (APP, REQUIREMENTS, CARD, CELLS, PACKAGE))
_ROOT = Path(__file__).parents[1]
# Folders of the package that hold no modules.
_DATA = ("configs", "model_cards")
_EXTRA = re.compile(r"""\bextra\s*==\s*['"]([^'"]+)['"]""")

_PROGRAM = '''"""The page of the model {model}. The package lies beside this file."""

import os

from pertstate.app import serve


# Spaces say in this variable where the page is asked for.
serve({model!r}, adata={adata!r}, revision={revision!r}, host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
'''
_ABOUT = """
# {title}

How cells respond to a perturbation, as the model [{model}](https://huggingface.co/{model}) predicts it: choose control cells and
a perturbation, look at the genes that change, download the predicted cells. The code of the package `pertstate` is in this Space.
"""


def write_space(
    output: str | os.PathLike,
    model: str,
    revision: str | None = None,
    adata: str | os.PathLike | None = None,
    title: str | None = None,
    overwrite: bool = False,
):
    """
    Write the folder of a Space, whole or not at all: the program, what it needs, a card, and the code of this package, so that no
    other package of its name is installed. Nothing is sent anywhere.

    Args:
        output: the folder.
        model (`str`): a model's repository on the Hub.
        revision (`str`, *optional*): its commit, tag or branch; by default the latest one whenever the Space starts.
        adata (*optional*): an `.h5ad` with control cells that everybody may use. It is copied, and so becomes public.
        title (`str`, *optional*): by default the name of the model.
        overwrite (`bool`): replace a Space that is there.

    Raises:
        ValueError: `model` is no name of a repository, or `adata` is damaged.
        FileExistsError, FileNotFoundError, InUseError: see [`claimed_folder`].
    """
    if not is_repository(model):
        raise ValueError(
            f"--model {model}: expected the name of a model on the Hub, USER/NAME, which a Space can load; push the checkpoint first "
            "(pertstate push)"
        )
    if adata is not None:
        if Path(adata).suffix != ".h5ad":
            raise ValueError(f"--adata {adata}: expected a name that ends in .h5ad")
        with AnnDataFile(adata):
            pass  # it is whole, and needs no other file
    title = printable(title or model.partition("/")[2])
    with claimed_folder(output, SPACE, overwrite), whole_folder(output, SPACE) as place:
        if adata is not None:
            shutil.copyfile(adata, place / CELLS)
        program = _PROGRAM.format(model=model, revision=revision, adata=None if adata is None else CELLS)
        (place / APP).write_text(program, encoding="utf-8")
        (place / REQUIREMENTS).write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        (place / CARD).write_text(_card(title, model), encoding="utf-8")
        copy_package(place / PACKAGE)


def requirements() -> list[str]:
    """What this package needs to serve the page, as lines of pip."""
    needed = []
    for line in requires(PACKAGE) or ():
        requirement, _, marker = line.partition(";")
        extra = _EXTRA.search(marker)
        if extra is None or extra[1] == "app":
            needed.append(requirement.strip())
    return sorted(needed)


def copy_package(target: Path):
    """Copy the code of this package, without the tests and all else that lies in a clone."""
    target.mkdir()
    for path in (*_ROOT.glob("*.py"), _ROOT / "py.typed", *_ROOT.glob("LICENSE")):
        shutil.copyfile(path, target / path.name)
    for room in (*(path.parent for path in _ROOT.glob("*/__init__.py")), *(_ROOT / name for name in _DATA)):
        shutil.copytree(room, target / room.name, ignore=shutil.ignore_patterns("__pycache__"))


def _card(title: str, model: str) -> str:
    settings = {
        "title": title,
        "emoji": "🧫",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": APP,
        "models": [model],
        "tags": ["biology", "single-cell", "perturbation"],
    }
    header = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{_ABOUT.format(title=title, model=model)}"
