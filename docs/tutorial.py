"""
Executes a tutorial of docs/tutorials/ and writes it as a notebook and as a page of the site (`make docs`):

    python docs/tutorial.py docs/tutorials/first_model.py build/tutorials

writes `first_model.ipynb`, `first_model.md`, and the pictures and HTML files that it shows. A tutorial is a Python file in the percent
format of Jupytext; `jupytext --to notebook FILE` makes an empty notebook of it.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config


ROOT = Path(__file__).parents[1]
# What a user's shell has and a test's may lack; and one thread, as models of this size are faster on one.
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PERTSTATE_ROOT": str(ROOT),
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
SECONDS = 600


def execute(source: Path, folder: Path) -> NotebookNode:
    """
    Execute a tutorial.

    Args:
        source (`Path`): the Python file.
        folder (`Path`): the folder that it works in.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(source)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=SECONDS, resources=resources, kernel_name="python3", coalesce_streams=True
    )
    return client.execute(env={**os.environ, **ENVIRONMENT})


def page_of(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """
    The Markdown of an executed tutorial, and its pictures by name. Cells with the tag `hidden` are left out, and so are outputs of cells
    with the tag `quiet`.
    """
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = ("hidden",)
    config.TagRemovePreprocessor.remove_all_outputs_tags = ("quiet",)
    config.ExtractOutputPreprocessor.enabled = True
    exporter = MarkdownExporter(config=config)
    markdown, resources = exporter.from_notebook_node(
        notebook, {"unique_key": name, "output_files_dir": f"{name}_files"}
    )
    # Styles of tables are those of the site.
    markdown = re.sub(r"<style scoped>.*?</style>\n", "", markdown, flags=re.DOTALL)
    return markdown, resources["outputs"]


def main(source: Path, target: Path):
    """Execute a tutorial, and write its notebook, its page and what the page shows to the folder `target`."""
    name = source.stem
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(source, Path(folder))
        markdown, pictures = page_of(notebook, name)
        for file in Path(folder).glob("*.html"):
            shutil.copy(file, target / file.name)
    for path, content in pictures.items():
        (target / path).parent.mkdir(exist_ok=True)
        (target / path).write_bytes(content)
    (target / f"{name}.md").write_text(markdown, encoding="utf-8")
    nbformat.write(notebook, target / f"{name}.ipynb")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
