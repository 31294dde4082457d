"""Writing a checkpoint folder so that it holds a whole checkpoint or none."""

import os
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path

from pertstate.base.files import PARTIAL
from pertstate.base.outputs import Kind, claimed_folder, whole_folder
from pertstate.base.vocabulary import PERTURBATION_FEATURES_FILE, VOCABULARY_FILE


# A folder loads as a model, or as an adapter, only with one of these files in it. So this file is removed first and written
# last.
MODEL_KEY, ADAPTER_KEY = "config.json", "adapter_config.json"
# The other files that are removed with their checkpoint. Files of code may stay: only code that a checkpoint names is run.
_OWN = (
    *("processor_config.json", VOCABULARY_FILE, PERTURBATION_FEATURES_FILE, "README.md", "training_args.json"),
    *("record.json", "record.safetensors", "history.csv", "curves.png", "trainer_state.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
)


def is_own(name: str) -> bool:
    """Whether a file of this name is a part of a checkpoint, and of nothing else."""
    return any(fnmatchcase(name, own) for own in (MODEL_KEY, ADAPTER_KEY, *_OWN))


CHECKPOINT = Kind("checkpoint", (ADAPTER_KEY, MODEL_KEY), is_own)


def _key_of(folder: str | os.PathLike, ending: str = "") -> str:
    return ADAPTER_KEY if Path(folder, ADAPTER_KEY + ending).exists() else MODEL_KEY


def hide(folder: str | os.PathLike):
    """Keep a folder from being loaded as a checkpoint while it is being written."""
    key = Path(folder, _key_of(folder))
    os.replace(key, key.with_name(key.name + PARTIAL))


def reveal(folder: str | os.PathLike):
    """Undo [`hide`] once the folder is whole."""
    key = Path(folder, _key_of(folder, PARTIAL))
    os.replace(key.with_name(key.name + PARTIAL), key)


def claimed_checkpoint(path: str | os.PathLike, overwrite: bool) -> AbstractContextManager[Path]:
    """Claim the folder `path` for a checkpoint, see [`claimed_folder`]."""
    return claimed_folder(path, CHECKPOINT, overwrite)


def whole_checkpoint_folder(path: str | os.PathLike) -> AbstractContextManager[Path]:
    """A folder to write, which becomes the checkpoint `path`, see [`whole_folder`]. Other files of `path` stay."""
    return whole_folder(path, CHECKPOINT)
