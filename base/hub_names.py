"""Which names mean a repository on the Hub."""

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_repository(name: str | os.PathLike) -> bool:
    """
    Whether a name means a repository on the Hub, `"user/name"`, and no file or folder here.

    A misspelt path is no repository: if the folder that it begins with is there, the name is taken as a path. The error
    then comes at once; asking the Hub takes minutes where there is no network.
    """
    path = Path(name)
    if str(name).count("/") != 1 or path.exists() or path.parent.is_dir():
        return False
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return True


def split_revision(name: str | os.PathLike) -> tuple[str, str | None]:
    """`"user/name"` and the revision of a name `"user/name@revision"`; None where it has none."""
    repository, _, revision = str(name).partition("@")
    return repository, revision or None
