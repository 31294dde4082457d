"""Files of a checkpoint as they are given to others: without the places of any machine."""

import json
import os
from pathlib import Path

from pertstate.base.checkpoint_files import read_json
from pertstate.base.public import public, public_text


def public_bytes(path: str | os.PathLike) -> bytes:
    """
    The content of a card or of a JSON file, with only the last part of each path, see [`public`]. A file without paths is
    returned unchanged.

    Raises:
        ValueError: a `.json` file is not a complete JSON file.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix != ".json":
        return public_text(content.decode("utf-8")).encode()
    found = read_json(path)
    changed = public(found)
    return content if changed == found else json.dumps(changed, indent=2).encode()
