"""The layout of the package: what stands at the root, which room may import which, and what travels with a checkpoint."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import pertstate
from pertstate.base.travelling import travelling_files
from pertstate.families import FAMILIES
from pertstate.processing import StateProcessor


ROOT = Path(pertstate.__file__).resolve().parent
ROOMS = ("app", "base", "cli", "data", "evaluation", "families", "hub", "legacy", "losses", "training")
AT_ROOT = {"__init__", "_version", "configuration_state", "modeling_state", "processing", "train"}

# What the modules of each room, and those at the root, import of the package. A family's config and model travel with
# checkpoints and have a row of their own.
CARD = {"_version", "configuration_state", "modeling_state", "processing"}
MAY_IMPORT = {
    "base": {"base"},
    "travelling": {"base", "configuration_state"},
    "configuration_state": {"base"},
    "modeling_state": {"base", "configuration_state"},
    "processing": {"base"},
    "losses": {"base", "losses"},
    "families": {"base", "losses", "families", "configuration_state", "modeling_state"},
    "data": {"base", "data", "_version", "processing"},
    "evaluation": {"base", "data", "evaluation", "losses", "_version", "processing"},
    "hub": {"base", "families", "data", "evaluation", "hub", *CARD},
    "legacy": {"base", "families", "losses", "data", "hub", "legacy", *CARD},
    "training": {"base", "families", "losses", "data", "evaluation", "hub", "legacy", "training", *CARD},
    # The page of a model: it asks what evaluation and the Hub know, and no room but the commands needs it.
    "app": {"base", "data", "evaluation", "hub", "app"},
    # Run as a program, it hands over to the command.
    "train": {"base", "families", "losses", "data", "evaluation", "hub", "legacy", "training", "cli", *CARD},
    "cli": {*ROOMS, *CARD, "train"},
    "_version": set(),
    "__init__": {"_version", "families"},
}


def modules() -> list[Path]:
    """The Python files of the package."""
    return sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """The dotted name of each module that a file imports, in any place, but not what only a type checker sees."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                waiting += node.orelse
                continue
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0):
                yield str(node.module)
            case ast.ImportFrom():
                folder = ("pertstate", *path.relative_to(ROOT).parts)[: -node.level]
                yield ".".join((*folder, str(node.module)))
        waiting += ast.iter_child_nodes(node)


def own_imports(path: Path) -> set[str]:
    """The rooms, and the modules at the root, that a file imports; `""` is the package itself."""
    return {name.split(".")[1] if "." in name else "" for name in imports(path) if name.split(".")[0] == "pertstate"}


def row_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "families" and parts[-1].startswith(("configuration_", "modeling_")):
        return "travelling"
    return parts[0]


def test_the_root_is_the_card():
    assert {path.stem for path in ROOT.glob("*.py")} == AT_ROOT
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_what_its_room_may(path):
    row = row_of(path)
    own = own_imports(path)
    if row == "travelling":
        # A model may import only its own family.
        families = {name for name in imports(path) if name.startswith("pertstate.families.")}
        assert all(name.startswith(f"pertstate.families.{path.parent.name}.") for name in families)
        own -= {"families"}
    assert own <= MAY_IMPORT[row]


def test_imports_are_found_where_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "base").mkdir()
    path = tmp_path / "base" / "module.py"
    path.write_text(
        "import os, pertstate.hub.push as push\n"
        "from ..processing import StateProcessor\n"
        "from .files import whole_file\n"
        "if TYPE_CHECKING:\n    import pertstate.cli\n"
        "else:\n    import pertstate.legacy\n"
        "def f():\n    from pertstate.data import prepare\n"
    )
    assert own_imports(path) == {"hub", "processing", "base", "legacy", "data"}
    assert set(imports(path)) >= {"os", "pertstate.processing", "pertstate.base.files"}


# Each class that travels, and the rows of the table above to which its files may belong.
TRAVELLERS = [
    (c, {"base", "travelling", *CARD - {"processing"}}) for f in FAMILIES.values() for c in (f.config, f.model)
]
TRAVELLERS += [(StateProcessor, {"base", "processing"})]
# huggingface_hub is the part of transformers that checks the fields of configs.
EVERYBODY_HAS = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers", *sys.stdlib_module_names}


@pytest.mark.parametrize("of_class, rows", TRAVELLERS, ids=[of_class.__name__ for of_class, _ in TRAVELLERS])
def test_code_travels_on_what_every_user_of_checkpoints_has(of_class, rows):
    may = EVERYBODY_HAS | ({"anndata", "pandas", "scipy"} if of_class is StateProcessor else set())
    for path in travelling_files(of_class.__module__).values():
        assert row_of(path) in rows, path
        # Before it loads the file, transformers asks for all its imports, except those that a `try` guards.
        assert set(get_imports(path)) <= may, path


def test_gradio_is_asked_for_by_the_app_alone():
    found = {name_of(path) for path in modules() if any(name.split(".")[0] == "gradio" for name in imports(path))}
    assert found == {"app/page.py", "app/serving.py"}


def test_travelling_files_have_names_of_their_own():
    """The files of all families and the processor have different names, so that any of them can lie in one folder."""
    files: dict[str, Path] = {}
    for of_class, _ in TRAVELLERS:
        for name, path in travelling_files(of_class.__module__).items():
            assert files.setdefault(name, path) == path
    assert {"configuration_state.py", "modeling_cpa.py", "processing.py", "files.py"} <= set(files)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_module_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_every_room_is_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {"pertstate", *(f"pertstate.{room}" for room in ROOMS)} <= set(shipped)


# Where text leaves the program. Names from data may hold what steers a terminal, so only these modules may write.
WRITERS = {
    "print": {"base/console.py"},
    "stdout.write": {"base/console.py"},
    "stderr.write": {"base/console.py"},
    "basicConfig": {"base/console.py"},
    "StreamHandler": {"base/console.py"},
    "getLogger": {"base/console.py", "base/printable.py"},
    "logging.get_logger": set(),
    "to_csv": {"base/tables.py"},
    "to_string": {"base/tables.py"},
    "csv.writer": {"base/tables.py"},
    "DictWriter": {"base/tables.py"},
}


def called(path: Path) -> set[str]:
    """The names of the functions that a file calls: the last part of the name, and the last two parts with a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id=name)):
                found.add(name)
            case ast.Call(func=ast.Attribute(attr=name, value=ast.Name(id=of) | ast.Attribute(attr=of))):
                found |= {name, f"{of}.{name}"}
            case ast.Call(func=ast.Attribute(attr=name)):
                found.add(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_text_leaves_the_program_in_one_place(path):
    calls = called(path)
    assert [name for name, rooms in WRITERS.items() if name in calls and name_of(path) not in rooms] == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_links_are_followed_as_the_system_follows_them(path):
    # Path.resolve raises a RuntimeError of links that lead in a circle, which no command turns into a line. It takes no arguments, or
    # `strict`. The package's own files and benchmarks are no input.
    own = name_of(path) == "base/travelling.py" or name_of(path).startswith("benchmarks/")
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    resolving = [
        call for call in calls if not call.args and isinstance(call.func, ast.Attribute) and call.func.attr == "resolve"
    ]
    assert own or not resolving, "write os.path.realpath"
