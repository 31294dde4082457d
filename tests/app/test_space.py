"""The folder of a Hub Space, and the commands, where gradio need not be installed."""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from app_models import write_model
from packaging.requirements import Requirement

from pertstate.app import serve, space
from pertstate.app.serving import HOST, MOST_UPLOADED
from pertstate.app.space import GRADIO, requirements, write_space
from pertstate.cli import main


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def installed(monkeypatch):
    """The package is installed as pyproject.toml says, whatever the environment of the tests was made from."""
    lines = list(PROJECT["dependencies"])
    lines += [f'{line}; extra == "{extra}"' for extra, of in PROJECT["optional-dependencies"].items() for line in of]
    monkeypatch.setattr(space, "requires", lambda name: lines)


@pytest.fixture
def cells(tmp_path) -> Path:
    (tmp_path / "made").mkdir()
    write_model(tmp_path / "made")
    return tmp_path / "made" / "screen.h5ad"


def test_a_space_holds_all_that_it_needs(installed, cells, tmp_path, capsys):
    words = ["space", str(tmp_path / "out"), "--model", "ada/kang", "--revision", "v1", "--adata", str(cells)]
    assert main([*words, "--title", "Kang's cells: \u202eall"]) == 0
    assert "upload it with: hf upload --repo-type space" in capsys.readouterr().out
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "app.py", "controls.h5ad", "pertstate", "requirements.txt")
    }
    assert (out / "controls.h5ad").read_bytes() == cells.read_bytes()
    _, header, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    said = yaml.safe_load(header)
    assert said["sdk"] == "gradio" and said["app_file"] == "app.py" and said["models"] == ["ada/kang"]
    assert said["title"] == "Kang's cells: \\u202eall" and "(https://huggingface.co/ada/kang)" in text
    [app] = [line for line in PROJECT["optional-dependencies"]["app"] if line.startswith("gradio")]
    assert said["sdk_version"] == GRADIO and Requirement(app).specifier.contains(GRADIO)
    lines = (out / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(lines) and set(lines) == {
        line.split(";")[0].strip() for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["app"])
    }
    # Nobody else's package of this name is installed, and ours is there whole.
    assert not [line for line in lines if line.startswith("pertstate")]
    package = {path.relative_to(out / "pertstate").as_posix() for path in (out / "pertstate").rglob("*")}
    assert {"__init__.py", "py.typed", "app/page.py", "families/cpa/card.md", "evaluation/page/report.html"} <= package
    assert not [name for name in package if name.startswith(("tests", "docs", ".")) or "__pycache__" in name]
    assert main(words) == 1 and "--overwrite" in capsys.readouterr().err
    assert main([*words[:4], "--overwrite"]) == 0 and not (out / "controls.h5ad").exists()


def test_the_program_of_a_space_serves_the_model(installed, tmp_path, monkeypatch):
    write_space(tmp_path / "out", "ada/kang")
    asked = []
    monkeypatch.setattr("pertstate.app.serve", lambda *args, **options: asked.append((args, options)))
    for name in (None, "0.0.0.0"):
        monkeypatch.setenv("GRADIO_SERVER_NAME", name) if name else monkeypatch.delenv("GRADIO_SERVER_NAME", False)
        exec(compile((tmp_path / "out" / "app.py").read_text(encoding="utf-8"), "app.py", "exec"), {})
    settings = {"adata": None, "revision": None}
    assert asked == [(("ada/kang",), {**settings, "host": host}) for host in ("127.0.0.1", "0.0.0.0")]


def test_what_a_space_cannot_show_is_refused(installed, tmp_path):
    for model in (str(tmp_path), "kang", "../x", "a/b/c"):
        with pytest.raises(ValueError, match="expected the name of a model on the Hub, USER/NAME"):
            write_space(tmp_path / "out", model)
    (tmp_path / "x.h5ad").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as .h5ad"):
        write_space(tmp_path / "out", "ada/kang", adata=tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="expected a name that ends in .h5ad"):
        write_space(tmp_path / "out", "ada/kang", adata=tmp_path / "x.zarr")
    assert not (tmp_path / "out").exists()


def test_what_the_installed_package_asks_for_is_known():
    try:
        needed = requirements()
    except PackageNotFoundError:
        pytest.fail("the package is not installed")
    assert {"torch", "anndata"} <= {Requirement(line).name for line in needed}
    assert not {"ruff", "mypy"} & {Requirement(line).name for line in needed}


def test_without_gradio_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(tmp_path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pertstate app: error: the app needs gradio and plotly: pip install 'pertstate[app]'")


def test_the_flags_are_those_of_the_function(monkeypatch):
    asked = []
    monkeypatch.setattr("pertstate.app.serving.serve", lambda *args: asked.append(args))
    assert main(["app", "ada/kang"]) == 0
    assert (
        main(["app", "m", "--adata", "x", "--revision", "r", "--host", "::1", "--port", "1", "--max-upload", "2"]) == 0
    )
    assert asked == [("ada/kang", None, None, HOST, None, MOST_UPLOADED, None), ("m", "x", "r", "::1", 1, 2, None)]
    assert HOST == "127.0.0.1"
    with pytest.raises(ValueError, match="at least 1 MB"):
        serve("x", most_uploaded=0)
    with pytest.raises(ValueError, match="port 80000: expected 1 to 65535"):
        serve("x", port=80000)
