"""What a cross-validation sets otherwise for each family."""

from pathlib import Path
from typing import Any

from pertstate.base.files import whole_file
from pertstate.base.messages import closest, some
from pertstate.base.outputs import claimed_file
from pertstate.data.bounded_yaml import load_yaml
from pertstate.families import FAMILIES
from pertstate.training.first_run import is_data
from pertstate.training.run_config import RunLoader, as_yaml, read_sections


SECTIONS = ("data", "model", "training")


def read_families(listed: str) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Families and, by section, the fields that they set otherwise.

    Args:
        listed (`str`): `A,B,..`, or a YAML file: for each family `model: {field: value}`, `training` and `data`, any of which may
            be left out.

    Raises:
        FileNotFoundError, ValueError: no such file, no family, or no section.
    """
    if not listed.endswith((".yaml", ".yml")):
        return check_families({name: {} for name in listed.split(",") if name})
    if not Path(listed).is_file():
        raise FileNotFoundError(f"--families {listed}: no such file (looked from {Path.cwd()})")
    content = load_yaml(listed, RunLoader) or {}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{listed}: expected `FAMILY: {{model: .., training: .., data: ..}}` for each family")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for family, sections in content.items():
        sections = {} if not sections or sections in ("null", "~") else sections
        if not isinstance(sections, dict) or not all(isinstance(fields, dict) for fields in sections.values()):
            raise ValueError(f"{listed}: {family}: expected sections with `field: value` lines")
        unknown = [name for name in sections if name not in SECTIONS]
        if unknown:
            raise ValueError(f"{listed}: {family}: expected the sections {', '.join(SECTIONS)}, found {some(unknown)}")
        found[str(family)] = {str(name): dict(fields) for name, fields in sections.items()}
    return check_families(found)


def check_families(families: dict[str, dict]) -> dict[str, dict]:
    """ValueError that names what is no family."""
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"--families {family}: no family of models; {closest(family, FAMILIES)}")
    return families


def words_of_family(
    words: list[str], own: str, family: str, changes: dict[str, dict[str, Any]], folder: Path
) -> list[str]:
    """
    What `pertstate train` takes for a family. Of a run file, another family than its own takes the data and the training, and of
    the model section `set_size` alone: the other fields are of the run's family. Its run file is written into the folder. Flags
    win over both.

    Args:
        words (`list[str]`): cells or a run file, and flags.
        own (`str`): the family of the run.
        family (`str`), changes (`dict`): see [`read_families`].
        folder (`Path`): where the run file goes, as `FAMILY.yaml`.

    Raises:
        ValueError: the folder holds runs of this family with other settings.
    """
    if family == own and not changes:
        return [*words, "--model_type", family]
    if is_data(words[0]):
        flags = [
            word
            for section, fields in changes.items()
            for name, value in fields.items()
            for word in (f"--{section}.{name}", as_yaml(value, flow=True))
        ]
        return [words[0], *flags, *words[1:], "--model_type", family]
    sections = read_sections(words[0])
    if family != own:
        sections["model"] = {name: value for name, value in sections["model"].items() if name == "set_size"}
    for section, fields in ({"model": {"model_type": family}} | changes).items():
        sections[section] |= fields
    sections["model"]["model_type"] = family
    text = as_yaml({name: fields for name, fields in sections.items() if fields})
    path = folder / f"{family}.yaml"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path} has other settings of {family} than now; name another folder, or begin anew with --overwrite"
        )
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        with claimed_file(path, overwrite=False), whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return [str(path), *words[1:]]
