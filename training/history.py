"""What a training logged, as files in the run's folder: a table, a picture, and the state of the Trainer."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from pertstate.base.files import whole_file
from pertstate.base.printable import get_logger
from pertstate.base.public import public
from pertstate.base.tables import write_csv
from pertstate.evaluation.plots import plot_history
from pertstate.training.staging import CURVES, HISTORY


logger = get_logger(__name__)


def history_of(state: TrainerState) -> pd.DataFrame:
    """One row for each step that was logged: its losses, and the figures of its evaluation; an absent one is NaN."""
    rows: dict[float, dict] = {}
    for entry in state.log_history:
        if "loss" in entry or "eval_loss" in entry:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(entry)
    table = pd.DataFrame(list(rows.values()))
    first = [name for name in ("step", "epoch", "loss", "eval_loss") if name in table]
    return table[first + [name for name in table if name not in first]]


def write_history(folder: Path, state: TrainerState):
    """
    Write `history.csv`, `trainer_state.json` and, if matplotlib is installed, `curves.png`. If the run logged nothing, no file is
    written.
    """
    table = history_of(state)
    if table.empty:
        return
    write_csv(table, folder / HISTORY)
    with whole_file(folder / TRAINER_STATE_NAME) as partial:
        partial.write_text(json.dumps(public(vars(state)), indent=1, default=str), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        logger.info(f"{CURVES} is not drawn: pictures need matplotlib, pip install 'pertstate[report]'")
        return
    plot_history(table, folder / CURVES)
