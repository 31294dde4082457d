"""Code that travels with a checkpoint: a class copies its modules into the folder that it saves."""

import os
import re
import sys
from pathlib import Path
from typing import ClassVar

from transformers.utils import PushToHubMixin

from .files import share


# `from ..base.modeling_layers import MLP`: the dots, the folders, and the module that is imported from.
_RELATIVE_IMPORT = re.compile(r"^([ \t]*from )(\.+)((?:\w+\.)*)(\w+)(?= import )", re.MULTILINE)


def travelling_files(module: str) -> dict[str, Path]:
    """
    The files of this package that a module needs, by their base names. The module's own file comes first.

    Raises:
        ValueError: two of the files have the same base name, so they cannot lie in one folder.
    """
    files: dict[str, Path] = {}
    waiting = [Path(str(sys.modules[module].__file__))]
    while waiting:
        path = waiting.pop().resolve()
        known = files.setdefault(path.name, path)
        if known != path:
            raise ValueError(f"{known} and {path} travel together and have the same name; rename one of them")
        for _, dots, folders, name in _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8")):
            needed = path.parents[len(dots) - 1].joinpath(*folders.split("."), f"{name}.py")
            if needed.name not in files or files[needed.name] != needed.resolve():
                waiting.append(needed)
    return files


def flattened(source: str) -> str:
    """The source of a module, with its relative imports rewritten for modules that all lie in one folder."""
    return _RELATIVE_IMPORT.sub(r"\1.\4", source)


def is_installed(module: str) -> bool:
    """Whether a module is one of this package, and not a copy that travelled with a checkpoint."""
    return module.partition(".")[0] == "pertstate"


class Travelling(PushToHubMixin):
    """
    A class that saves its own code beside its files, so that the folder loads where this package is absent. transformers
    would copy the modules that lie beside the module of the class. Ours lie in several folders, so we copy them flat.
    """

    # The Auto class that loads it. `auto_map` in the JSON file names this class.
    loaded_by: ClassVar[str]
    # Names, or endings of names, of the files that are written before transformers writes its own.
    _written_first: ClassVar[tuple[str, ...]] = (".py",)

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        """
        Does nothing. transformers calls it for a class that it loaded from a folder's code, so that its own copying runs
        at the next save; [`Travelling.save_pretrained`] copies the code already.
        """

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers, and the code of this class with it."""
        os.makedirs(save_directory, exist_ok=True)
        if kwargs.get("is_main_process", True):
            self._save_code(Path(save_directory))
        found = super().save_pretrained(save_directory, *args, **kwargs)
        share(save_directory)
        return found

    def _save_code(self, folder: Path):
        module, settings = type(self).__module__, self._settings()
        settings.auto_map = {
            **(vars(settings).get("auto_map") or {}),
            self.loaded_by: f"{module.rpartition('.')[2]}.{type(self).__name__}",
        }
        for name, path in travelling_files(module).items():
            (folder / name).write_text(flattened(path.read_text(encoding="utf-8")), encoding="utf-8")

    def _settings(self):
        """The object that is written as JSON: it holds `auto_map`."""
        return self

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """
        When each file was last written. transformers asks this before it writes its own files, and pushes those that have
        changed since. The files that this package writes before that are not listed, and so are always pushed.
        """
        stamps = super()._get_files_timestamps(working_dir)
        return {name: stamp for name, stamp in stamps.items() if not name.endswith(self._written_first)}


__all__ = ["Travelling", "flattened", "is_installed", "travelling_files"]
