"""
Builds the site (`make docs`) from the files of docs/ and some of the root, with links of the site. mkdocs.yml names the class
`Docstrings`, which turns docstrings into Markdown when the reference is built.
"""

import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

import griffe

from pertstate.families import FAMILIES


ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "docs"
# Executed tutorials, which docs/tutorial.py writes: the page of each, and what it shows.
TUTORIALS = ROOT / "build" / "tutorials"
# Files of the root that are pages.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ZENSICAL = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"]
PATIENCE = 300
_FAMILIES = "<!-- The config, model and objective of each family come here: docs/build_site.py. -->"
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(([^()#\s]+)(#[^()\s]*)?\)")
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
# Sections of a docstring, and those of them that list names.
_SECTION = re.compile(r"^(Args|Inputs|Output|Returns|Raises|Example):\n((?:^(?: +.*)?\n)+)", re.MULTILINE)
_LISTS = ("Args", "Inputs", "Raises")
_ITEM = re.compile(r"^([\w.]+(?:, [\w.]+)*)((?: \(.*\))?(?: \[.*\])? ?:)")


# The pages


def prepare():
    """Write `build/docs`: the pages, and a copy of the package in a folder of its name, from which docstrings are read."""
    shutil.rmtree(TARGET, ignore_errors=True)
    package = TARGET / "package" / "pertstate"
    package.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, package)
    for room in ROOT.glob("*/__init__.py"):
        shutil.copytree(room.parent, package / room.parent.name, ignore=shutil.ignore_patterns("__pycache__"))
    sources = {path: path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    for path, page in {**sources, **{ROOT / name: page for name, page in PAGES.items()}}.items():
        text = path.read_text(encoding="utf-8")
        text = text.replace(_FAMILIES, "\n".join(map(_reference_of, FAMILIES.values())))
        written = TARGET / "pages" / page
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(with_links_of_the_site(text, path.relative_to(ROOT).as_posix(), page), encoding="utf-8")
    shutil.copytree(TUTORIALS, TARGET / "pages" / "tutorials")
    for path in ROOT.glob("docs/tutorials/*.py"):
        page = TARGET / "pages" / "tutorials" / f"{path.stem}.md"
        text = page.read_text(encoding="utf-8")
        page.write_text(
            with_links_of_the_site(text, f"docs/tutorials/{path.name}", f"tutorials/{page.name}"), encoding="utf-8"
        )


def copy_pictures():
    """Copy the pictures of the pages beside them."""
    for path in (ROOT / "docs").rglob("*.png"):
        written = TARGET / "pages" / path.relative_to(ROOT / "docs")
        written.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, written)


def with_links_of_the_site(markdown: str, source: str, page: str) -> str:
    """Links of the repository as links of the site. What is not on the site is named and not linked."""

    def link(match: re.Match) -> str:
        text, target, anchor = match.groups(default="")
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is None:
            return text
        if path.startswith("docs/tutorials/"):
            inside = re.sub(r"\.py$", ".md", inside)
        return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(link, markdown)


def _reference_of(family) -> str:
    """The section of a family in the reference."""
    objective = f"pertstate.families.{family.name}.objective_{family.name}.{family.prefix}Objective"
    names = [*(f"{module}.{name}" for name, module in family.places.items()), objective]
    blocks = [f"::: {name}\n    options: {{heading_level: 4}}\n" for name in names]
    return "\n".join([f"### `{family.model_type}`\n", *blocks])


# Docstrings


class Docstrings(griffe.Extension):
    """Docstrings as plain Markdown: sections are lists, and [`Name`] is a link if the reference has that name."""

    def on_package(self, *, pkg, **_):
        objects = list(_objects_of(pkg))
        pages = [path.read_text(encoding="utf-8") for path in (TARGET / "pages" / "reference").glob("*.md")]
        # Of several objects of one name, the one that the reference has.
        places = {
            path.rpartition(".")[2]: path for page in pages for path in re.findall(r"^::: (\S+)", page, re.MULTILINE)
        }
        for one in objects:
            places.setdefault(one.name, one.path)
            places.setdefault(one.path, one.path)
            if one.parent is not None and one.parent.is_class:
                places.setdefault(f"{one.parent.name}.{one.name}", one.path)
        for one in objects:
            if one.docstring is not None:
                one.docstring.value = as_markdown(one.docstring.value, places)


def _objects_of(parent):
    for one in parent.members.values():
        if not one.is_alias:
            yield one
            if one.is_module or one.is_class:
                yield from _objects_of(one)


def as_markdown(docstring: str, places: dict[str, str]) -> str:
    """The docstring with its sections as lists, and names of other objects as links."""

    def refer(match: re.Match) -> str:
        name = match[1]
        shown, path = f"<code>{escape(name)}</code>", places.get(name)
        return shown if path is None else f'<autoref optional identifier="{path}">{shown}</autoref>'

    text = _SECTION.sub(_section, docstring.strip() + "\n")
    # Code stays as it is.
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else _REFERENCE.sub(refer, part) for i, part in enumerate(parts))


def _section(match: re.Match) -> str:
    title, body = match[1], textwrap.dedent(match[2]).strip("\n")
    if title in _LISTS:
        lines = []
        for line in body.split("\n"):
            if line and line[0] not in " -`":
                item = _ITEM.match(line)
                line = f"- **{item[1]}**{item[2]}{line[item.end() :]}" if item else f"- {line}"
            lines.append(line)
        body = "\n".join(lines)
    return f"\n**{title}**\n\n{body}\n\n"


def build() -> int:
    """
    Have Zensical build the site, and return its exit status. It takes seconds, but now and then its threads wait for one another for
    ever (zensical/zensical, issue 113): after [`PATIENCE`] seconds it is stopped, and tried once more.
    """
    for _ in range(2):
        try:
            return subprocess.run(ZENSICAL, cwd=ROOT, timeout=PATIENCE).returncode
        except subprocess.TimeoutExpired:
            print(f"zensical did not end within {PATIENCE} s and was stopped", flush=True)
    return 1


if __name__ == "__main__":
    prepare()
    copy_pictures()
    sys.exit(build())
