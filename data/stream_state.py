"""The files that the state of a stream is kept in, beside a checkpoint."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pertstate.base.bounded_text import LARGEST_TABLES, load_json
from pertstate.base.files import whole_file


STATE_NAME = "stream_state"


def write_stream_state(state: dict, folder: str | os.PathLike, rank: int = 0, world_size: int = 1):
    """Write a state. If that is cut short, the folder holds the old state, or none that [`read_stream_state`] reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values, arrays = _state_paths(folder, rank, world_size)
    text = json.dumps({name: value for name, value in state.items() if name != "arrays"}, ensure_ascii=False)
    # The file that was entered last is renamed first: the arrays, and then the values, without which no state is read.
    with whole_file(values) as new_values, whole_file(arrays) as new_arrays:
        save_file({name: np.ascontiguousarray(array) for name, array in state["arrays"].items()}, new_arrays)
        new_values.write_text(text, encoding="utf-8")
        values.unlink(missing_ok=True)


def read_stream_state(folder: str | os.PathLike, rank: int = 0, world_size: int = 1) -> dict:
    """
    A state for [`SentenceStream.load_state_dict`] and [`StreamSurvey.from_state`].

    Raises:
        FileNotFoundError: the folder holds no (whole) state of this rank.
        ValueError: its files are not whole.
    """
    values, arrays = _state_paths(Path(folder), rank, world_size)
    for path in (values, arrays):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected the state of rank {rank} of {world_size} in {folder}"
            )
    try:
        return load_json(values, LARGEST_TABLES) | {"arrays": load_file(arrays)}
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the stream's state is not whole ({error}); take an earlier checkpoint") from error


def _state_paths(folder: Path, rank: int, world_size: int) -> tuple[Path, Path]:
    name = STATE_NAME if world_size == 1 else f"{STATE_NAME}-{rank + 1:05d}-of-{world_size:05d}"
    return folder / f"{name}.json", folder / f"{name}.safetensors"
