"""The tutorials: each of them runs, its links lead to files, and its page shows what it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import tutorial  # noqa: E402


TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    """Where `make docs` has executed it as it is, it is not executed again."""
    pages = ROOT / "build" / "tutorials"
    done = subprocess.run(
        ["make", "-C", ROOT, f"build/tutorials/{path.stem}.md"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [cell for cell in nbformat.read(pages / f"{path.stem}.ipynb", 4).cells if cell.cell_type == "code"]
    assert cells and all(cell.execution_count for cell in cells)
    page = (pages / f"{path.stem}.md").read_text(encoding="utf-8")
    # What a page shows stands beside it. One line of text is not a traceback.
    assert all((pages / name).stat().st_size for name in re.findall(r"!\[\w+\]\(([^)]+)\)", page))
    assert "Traceback" not in page
    assert all((pages / name).stat().st_size > 100_000 for name in re.findall(r'src="([^"]+\.html)"', page))


@pytest.mark.slow
def test_a_failing_cell_or_command_fails_the_tutorial(tmp_path):
    for name, line in (("python", "# %%\n1 / 0\n"), ("shell", '# %% language="bash"\n# pertstate info absent.h5ad\n')):
        (tmp_path / f"{name}.py").write_text(line)
        with pytest.raises(CellExecutionError, match="ZeroDivisionError|CalledProcessError"):
            tutorial.execute(tmp_path / f"{name}.py", tmp_path)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_links_of_a_tutorial_lead_to_files(path):
    cells = jupytext.read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_a_page_has_outputs_and_pictures_and_no_hidden_cells():
    png = "iVBORw0KGgo="
    notebook = new_notebook(
        metadata={"language_info": {"name": "python"}},
        cells=[
            new_markdown_cell("# Title"),
            new_code_cell(
                "secret = 1", metadata={"tags": ["hidden"]}, outputs=[new_output("stream", text="hidden text")]
            ),
            new_code_cell("noise()", metadata={"tags": ["quiet"]}, outputs=[new_output("stream", text="loud text")]),
            new_code_cell(
                "table", outputs=[new_output("execute_result", {"text/html": "<style scoped>\na\n</style>\n<b>1</b>"})]
            ),
            new_code_cell("plot()", outputs=[new_output("display_data", {"image/png": png})]),
        ],
    )
    page, pictures = tutorial.page_of(notebook, "some")
    assert page.startswith("# Title") and "```python\nnoise()\n```" in page and "<b>1</b>" in page
    assert not any(word in page for word in ("secret", "hidden text", "loud text", "style"))
    assert list(pictures) == ["some_files/some_3_0.png"] and "](some_files/some_3_0.png)" in page
    assert pictures["some_files/some_3_0.png"].startswith(b"\x89PNG")


def test_main_writes_notebook_page_and_what_it_shows(tmp_path, monkeypatch):
    source = tmp_path / "short.py"
    source.write_text("# %% [markdown]\n# # Short\n")

    def execute(source, folder):
        (folder / "report.html").write_text("a page")
        (folder / "cells.h5ad").write_text("data")
        return jupytext.read(source)

    monkeypatch.setattr(tutorial, "execute", execute)
    tutorial.main(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "short.ipynb", "short.md"]
    assert (tmp_path / "out" / "short.md").read_text().startswith("# Short")
