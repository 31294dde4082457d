"""Code that travels with a checkpoint: the modules of a class, copied flat beside what it saves."""

import os
import re
import sys
from pathlib import Path
from typing import ClassVar


# `from ..base.modeling_layers import MLP`: the dots, the folders, and the module that is imported from.
_RELATIVE_IMPORT = re.compile(r"^([ \t]*from )(\.+)((?:\w+\.)*)(\w+)(?= import )", re.MULTILINE)


def travelling_files(module: str) -> dict[str, Path]:
    """
    The files that a module needs of its package, itself first, by their base names.

    Raises:
        ValueError: two of them have one base name, so that they cannot lie in one folder.
    """
    files: dict[str, Path] = {}
    waiting = [Path(str(sys.modules[module].__file__))]
    while waiting:
        path = waiting.pop().resolve()
        known = files.setdefault(path.name, path)
        if known != path:
            raise ValueError(f"{known} and {path} travel together and have one name; rename one of them")
        for _, dots, folders, name in _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8")):
            needed = path.parents[len(dots) - 1].joinpath(*folders.split("."), f"{name}.py")
            if needed.name not in files or files[needed.name] != needed.resolve():
                waiting.append(needed)
    return files


def flattened(source: str) -> str:
    """The source of a module, its relative imports those of modules in one folder."""
    return _RELATIVE_IMPORT.sub(r"\1.\4", source)


class Travelling:
    """
    Of a class whose code is saved beside what it saves, so that the folder loads where this package is absent. transformers
    copies the files that lie beside the module of a class; ours lie in several folders, and are copied flat.
    """

    # The Auto class that loads it, which the `auto_map` of its JSON file names.
    loaded_by: ClassVar[str]

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        """Transformers calls this of code that it loaded from a folder, to copy it by itself at the next save."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers, with this class's code."""
        os.makedirs(save_directory, exist_ok=True)
        if kwargs.get("is_main_process", True):
            self._save_code(Path(save_directory))
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _save_code(self, folder: Path):
        module, settings = type(self).__module__, self._settings()
        settings.auto_map = {
            **(getattr(settings, "auto_map", None) or {}),
            self.loaded_by: f"{module.rpartition('.')[2]}.{type(self).__name__}",
        }
        for name, path in travelling_files(module).items():
            (folder / name).write_text(flattened(path.read_text(encoding="utf-8")), encoding="utf-8")

    def _settings(self):
        """What is written as JSON."""
        return self

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """Of the files that a push leaves out as they were there before it; the code was written just now."""
        stamps = super()._get_files_timestamps(working_dir)
        return {name: stamp for name, stamp in stamps.items() if not name.endswith(".py")}


__all__ = ["Travelling", "flattened", "travelling_files"]
