"""The public face: names that are loaded when they are first used, and that checkers and editors see as well."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import pertstate
from pertstate.families import public_classes


def names_for_checkers() -> dict[str, str]:
    """The module of each name that the block of `__init__.py` for checkers imports."""
    tree = ast.parse(Path(pertstate.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names:
            # `as` the same name is how a checker tells a public name from what a module only uses.
            assert alias.asname == alias.name, alias.name
            names[alias.name] = node.module
    return names


def test_every_public_name_can_be_had():
    for name in pertstate.__all__:
        assert getattr(pertstate, name) is not None
    for name, module in pertstate._PLACES.items():
        value = getattr(pertstate, name)
        assert value is getattr(import_module(module), name)
        # Each name comes from the module that defines it, not from one that only imports it.
        assert value.__module__ == module, name


def test_checkers_see_the_same_names():
    seen, of_families = names_for_checkers(), dict(public_classes())
    assert seen.items() <= pertstate._PLACES.items()
    # Adding a family needs a folder and a line. Its names here are only for editors, and are optional.
    assert set(pertstate._PLACES) - set(seen) <= set(of_families)
    assert set(pertstate.__all__) == {*pertstate._PLACES, "FAMILIES", "__version__", "objective_for"}
    assert len(pertstate.__all__) == len(set(pertstate.__all__))


def test_every_family_has_its_config_and_model_there():
    assert set(dict(public_classes())) <= set(pertstate.__all__)


def test_names_are_listed_and_unknown_ones_refused():
    assert set(pertstate.__all__) <= set(dir(pertstate))
    with pytest.raises(AttributeError, match="module 'pertstate' has no attribute 'StateForPerturbance'"):
        _ = pertstate.StateForPerturbance
    with pytest.raises(ImportError, match="cannot import name 'StateForPerturbance'"):
        from pertstate import StateForPerturbance  # noqa: F401


def test_the_package_says_that_it_is_typed():
    assert (Path(pertstate.__file__).parent / "py.typed").is_file()
