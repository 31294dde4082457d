"""A run that names a file of cells and no run file: `pertstate train screen.h5ad --test_contexts X`."""

import re
from pathlib import Path
from typing import Any

from pertstate.configuration_state import StateConfig
from pertstate.data.columns import KEYS, FoundColumns, find_columns
from pertstate.data.in_memory import CellData, name_of, open_cells
from pertstate.data.manifest import STORE_FILE
from pertstate.families import FAMILIES
from pertstate.training.automatic import AUTO, OF_TRAINING, is_new_state
from pertstate.training.run_config import RunConfig


_DATA = re.compile(r".*\.(h5ad|h5|h5ad\.gz|zarr)", re.IGNORECASE)


def is_data(word: str) -> bool:
    """Whether the first word of a run names cells (a file, folder, store or glob) and not a run file."""
    path = Path(word.rstrip("/"))
    return bool(_DATA.fullmatch(path.name)) or path.is_dir() or any(sign in word for sign in "*?[")


def first_run(cells: str | dict[str, CellData], given: dict[str, Any]) -> dict[str, dict]:
    """
    The sections of a run on cells. Everything that may be decided by the package is `"auto"`.

    Args:
        cells (`str` or `dict`): a file, folder or glob of cells, or a cell store; or the cells of each dataset, which take the
            place of the names that the section says.
        given (`dict`): the flags, which win.
    """
    place = Path(cells.rstrip("/")) if isinstance(cells, str) else Path(next(iter(cells), "screen"))
    is_store = (place / STORE_FILE).is_file()
    stem = re.sub(r"[^\w.-]+", "-", re.sub(r"\.(h5ad|h5|zarr|gz|store)", "", place.name)).strip("-") or "screen"
    datasets = {stem: cells} if isinstance(cells, str) else dict.fromkeys(cells, "")
    family = str(given.get("model_type", StateConfig.model_type))
    model: dict[str, Any] = {}
    if is_new_state(given):
        model = {"residual": "anchor", "preset": AUTO, "set_size": AUTO}
    elif "pretrained" not in given and family in FAMILIES and FAMILIES[family].config.presets:
        model["preset"] = AUTO
    training: dict[str, Any] = {"output_dir": f"runs/{stem}", **dict.fromkeys(OF_TRAINING, AUTO)}
    if "num_train_epochs" in given:
        del training["max_steps"]
    data: dict[str, Any] = {"store": cells} if is_store else {"datasets": datasets}
    if not chooses_steps(given):
        data["validation"] = AUTO
    if not {"genes", "genes_file", "pretrained"} & {*given}:
        data["genes"] = AUTO
    return {"data": data, "model": model, "training": training, "stream": {}, "prepare": {}}


def chooses_steps(given: dict[str, Any]) -> bool:
    """Whether a run of these flags chooses its steps on training groups that are held out in turn, and needs no others."""
    is_anchored = is_new_state(given) and given.get("residual", "anchor") == "anchor"
    return is_anchored and not {"max_steps", "num_train_epochs"} & {*given}


def fill_columns(run: RunConfig):
    """
    Find the columns and the controls that a run on files does not name, as `pertstate info` does. A note of the run says which
    were found.

    Raises:
        ValueError: a column or a control cannot be found; what exists is listed.
        KeyError: there is no such column as the run names.
    """
    data = run.data
    open_ones = [name for name in (*KEYS, "control") if name not in run.given]
    if data.context is not None and "context_key" in open_ones:
        open_ones.remove("context_key")
    if data.store is not None or not open_ones:
        return
    cells = next(iter(data.files().values()))[0]
    named = {name: _single(getattr(data, name)) for name in KEYS if name in run.given}
    found = _look(cells, named, data.control if "control" in run.given else None, open_ones)
    for name in open_ones:
        setattr(data, name, found.control if name == "control" else found.keys[name])
    run.given |= {*open_ones}
    shown = [f"{name}: {getattr(data, name)}" for name in open_ones if getattr(data, name) is not None]
    run.notes.append(
        f"found in {Path(name_of(cells)).name} by their names: {', '.join(shown)}; flags of these names set others"
    )


def _look(cells: CellData, named: dict[str, Any], control: Any, open_ones: list[str]) -> FoundColumns:
    with open_cells(cells) as file:
        found = find_columns(file, control, **named)
        missing = found.missing_columns(file.obs_columns)
    problems = [problem for problem in missing if any(f"for {name};" in problem for name in open_ones)]
    if "control" in open_ones and not problems:
        problems += found.missing_control()
    if problems:
        raise ValueError(
            f"{name_of(cells)}: {'; '.join(problems)}; name it with a flag (--perturbation_key, --context_key, --control), or with --context "
            "where all cells are of one"
        )
    return found


def _single(key: Any) -> Any:
    """The first of several columns that are one key together."""
    return key[0] if isinstance(key, list) else key
