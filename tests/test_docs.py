"""The Markdown files are true: their names import, their links lead to files, their runs parse, their pages are ours."""

import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt

from pertstate._version import __version__
from pertstate.training.run import read_run


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import build_site  # noqa: E402


PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/*.md"), *ROOT.glob("families/*/card.md")]
)
TEXTS = sorted(
    path
    for pattern in ("*", "docs/**/*", "model_cards/*", "families/**/*", "hub/*", "cli/*", "configs/*", ".github/**/*")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix in {"", ".md", ".py", ".toml", ".yaml", ".yml", ".cff", ".txt"}
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tokens_of(path: Path) -> list:
    """Every token of a page, with those within lines."""
    text = path.read_text(encoding="utf-8")
    return [t for token in MarkdownIt().enable("table").parse(text) for t in (token, *(token.children or []))]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name):
                raise
            continue
        for part in parts[i:]:
            if part not in dir(found):
                return False
            found = getattr(found, part)
        return True
    return False


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_dotted_names_exist():
    assert exists("pertstate.train.main") and exists("pertstate.StateTrainer.compute_loss")
    assert not exists("pertstate.trian") and not exists("pertstate.hub.stores.push_store")
    missing = {}
    for path in PAGES:
        # The family that CONTRIBUTING adds is not in the package.
        names = set(re.findall(r"\bpertstate(?:\.[A-Za-z_]\w*)+", path.read_text(encoding="utf-8")))
        names -= {name for name in names if "shift" in name.lower()}
        if gone := sorted(name for name in names if not exists(name)):
            missing[name_of(path)] = gone
    assert missing == {}


def test_links_and_paths_lead_to_files():
    missing = {}
    for path in [page for page in PAGES if "model_cards" not in page.parts]:
        links = [t.attrs["href"] for t in tokens_of(path) if t.type == "link_open"]
        local = [unquote(link.partition("#")[0]) for link in links if not re.match(r"\w+:", link)]
        gone = [link for link in local if link and not (path.parent / link).exists()]
        # Code such as `base/modeling_layers.py`, read from the root.
        codes = [t.content for t in tokens_of(path) if t.type == "code_inline"]
        files = [c for c in codes if re.fullmatch(r"(\.?\w+/)+[\w.*-]+\.(py|md|yaml|yml|toml)", c) and "shift" not in c]
        gone += [c for c in files if not list(ROOT.glob(c))]
        if gone:
            missing[name_of(path)] = gone
    assert missing == {}


def test_every_guide_can_be_reached_from_the_readme():
    links = {t.attrs["href"].partition("#")[0] for t in tokens_of(ROOT / "README.md") if t.type == "link_open"}
    guides = {name_of(path) for path in ROOT.glob("docs/*.md")} - {"docs/families_table.md"}
    assert guides <= links


def test_no_address_of_this_name_may_be_somebody_elses():
    """No address holds our name unless a build sets it: such a page may be anybody's."""
    found = {name_of(p): re.findall(r"https?://\S*pertstate\S*", p.read_text(encoding="utf-8")) for p in TEXTS}
    assert len(found) > 100
    assert {name: urls for name, urls in found.items() if urls} == {}


def test_every_page_is_on_the_site():
    def pages(entries):
        for entry in entries:
            for value in [entry] if isinstance(entry, str) else entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    nav = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    written |= {f"tutorials/{path.stem}.md" for path in ROOT.glob("docs/tutorials/*.py")}
    assert nav == written | set(build_site.PAGES.values())


def test_links_become_those_of_the_site():
    text = "[a](docs/data.md#sentences) [`b`](configs/demo.yaml) [c](https://x.org/d.md) [e](CONTRIBUTING.md)"
    found = build_site.with_links_of_the_site(text, "README.md", "index.md")
    assert found == "[a](data.md#sentences) `b` [c](https://x.org/d.md) [e](contributing.md)"
    assert (
        build_site.with_links_of_the_site("[a](../data.md)", "docs/reference/x.md", "reference/x.md")
        == "[a](../data.md)"
    )
    tutorial = "docs/tutorials/sharing.py", "tutorials/sharing.md"
    assert (
        build_site.with_links_of_the_site("[a](own_screen.py) [b](../data.md)", *tutorial)
        == "[a](own_screen.md) [b](../data.md)"
    )
    assert build_site.with_links_of_the_site("[a](../README.md)", "docs/x.md", "x.md") == "[a](index.md)"


def test_docstrings_become_markdown():
    docstring = """
    What [`Known`] and [`Other`] do.

    Args:
        cells (`torch.Tensor` of shape `(B, S)`, *optional*) [old_name]:
            Cells: log1p.

            - `"a"`: one

    Returns:
        `int`: how many.

    Raises:
        ValueError, KeyError: wrong.

    Example:
    ```python
    >>> ["[`Known`]"]
    ```
    """
    assert build_site.as_markdown(textwrap.dedent(docstring), {"Known": "package.Known"}) == (
        'What <autoref optional identifier="package.Known"><code>Known</code></autoref> and <code>Other</code> do.\n\n'
        "\n**Args**\n\n- **cells** (`torch.Tensor` of shape `(B, S)`, *optional*) [old_name]:\n    Cells: log1p.\n\n"
        '    - `"a"`: one\n\n'
        "\n**Returns**\n\n`int`: how many.\n\n"
        "\n**Raises**\n\n- **ValueError, KeyError**: wrong.\n\n"
        'Example:\n```python\n>>> ["[`Known`]"]\n```\n'
    )


WORKFLOWS = sorted(ROOT.glob(".github/**/*.yml"))


def test_workflows_run_targets_that_exist():
    assert len(WORKFLOWS) == 5
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    content = {path.stem: yaml.safe_load(path.read_text()) for path in WORKFLOWS}
    steps = [step for job in content["ci"]["jobs"].values() for step in job["steps"]]
    made = [word for step in steps for word in re.findall(r"^make (.+)", step.get("run", ""))]
    assert made == ["lint", "docs", "test TESTS=", "demo"] and {command.split()[0] for command in made} <= targets
    assert content["ci"]["jobs"]["test"]["strategy"]["matrix"]["python-version"] == ["3.11", "3.12", "3.13"]
    # YAML reads the key `on` as true.
    assert content["publish"][True] == {"push": {"tags": ["v*"]}}


def test_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and "url" not in citation and "repository-code" not in citation


RUNS = [
    (name_of(path), token.content)
    for path in PAGES
    for token in tokens_of(path)
    if token.type == "fence" and token.info == "yaml" and "shift" not in token.content
]


@pytest.mark.parametrize(("page", "text"), RUNS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(RUNS)])
def test_runs_have_fields_that_exist(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = yaml.safe_load(text)
    # Checkpoints and files of a reader are not at hand.
    run.setdefault("data", {}).setdefault("datasets", "screen.h5ad")
    if "stream" in run:
        del run["data"]["datasets"]
    run.get("model", {}).pop("pretrained", None)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    assert read_run([str(path)])


def test_a_builder_that_never_ends_is_stopped_and_tried_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build_site, "PATIENCE", 2)
    # It ends where the file is there, and makes it first.
    once = f"import os, time; os.path.exists({str(tmp_path / 'x')!r}) or (open({str(tmp_path / 'x')!r}, 'w'), time.sleep(60))"
    monkeypatch.setattr(build_site, "ZENSICAL", [sys.executable, "-S", "-c", once])
    assert build_site.build() == 0
    assert capsys.readouterr().out == "zensical did not end within 2 s and was stopped\n"
    monkeypatch.setattr(build_site, "ZENSICAL", [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert build_site.build() == 1
