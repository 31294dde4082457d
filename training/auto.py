"""
The sizes of a run that leaves them to the package: `auto` in `model.preset`, `model.set_size`, and in `training.max_steps`,
`per_device_train_batch_size`, `learning_rate` and `early_stopping_patience`. The rule is [`chosen_sizes`], and nothing else.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.constants import Split
from pertstate.configuration_state import StateConfig


if TYPE_CHECKING:
    from pertstate.training.run_config import RunConfig

AUTO = "auto"
OF_MODEL = ("preset", "set_size")
OF_TRAINING = ("max_steps", "per_device_train_batch_size", "learning_rate", "early_stopping_patience")

# Epochs of a run, within these steps.
EPOCHS, FEWEST_STEPS, MOST_STEPS = 20, 400, 20_000
# Steps of an epoch that a batch leaves at least.
STEPS_PER_EPOCH = 4
# Evaluations without a better one after which a run stops.
PATIENCE = 5
LEARNING_RATES = {"tiny": 1e-3, "mini": 3e-4, "small": 2e-4}
LARGE_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class DataSize:
    """
    How much there is to train on.

    Args:
        cells (`int`): training cells, with the control cells that are trained on.
        group (`int`): cells of the median training group.
    """

    cells: int
    group: int

    @classmethod
    def of_groups(cls, groups: pd.DataFrame, control_sentences: bool) -> "DataSize":
        """That of a table of groups with their splits."""
        sizes = groups["stop"] - groups["start"]
        trained = groups["split"] == Split.TRAIN
        keys = [groups.loc[trained, name] for name in ("dataset", "context", "perturbation")]
        of_groups = sizes[trained].groupby(keys, observed=True).sum()
        controls = int(sizes[groups["split"] == Split.CONTROL].sum()) if control_sentences or not trained.any() else 0
        median = int(np.median(of_groups)) if len(of_groups) else controls
        return cls(int(sizes[trained].sum()) + controls, max(1, median))


def chosen_sizes(
    size: DataSize, device: str, family: type[PerturbationConfig], fixed: dict[str, Any], has_validation: bool
) -> dict[str, Any]:
    """
    The rule by which `auto` is decided.

    - `preset`: of the State model `mini` on a CPU; on an accelerator `mini` below 100,000 training cells, `small` below a
      million, `base` from there. Of other families `tiny` on a CPU, `published` on an accelerator.
    - `set_size`: the largest power of two that is at most half the median training group; at least 32, at most the preset's
      own (of presets of less than 64: 64).
    - `per_device_train_batch_size`: 8 sentences on a CPU; on an accelerator 8 below 20,000 training cells, 16 below 200,000,
      32 from there; but so few that an epoch has four steps.
    - `max_steps`: 20 epochs, at least 400 steps, at most 20,000.
    - `learning_rate`: 1e-3 for `tiny`, 3e-4 for `mini`, 2e-4 for `small`, 1e-4 for larger ones; that of the family, where it
      has one.
    - `early_stopping_patience`: 5 evaluations where there are validation data, else none.

    Args:
        size ([`DataSize`]): of the training data.
        device (`str`): `"cpu"`, `"cuda"`, `"mps"` ..
        family (`type[PerturbationConfig]`): gives its presets and its training defaults.
        fixed (`dict`): what the run sets of the above, by name; the others follow from it.
        has_validation (`bool`): whether there are validation data.

    Returns:
        A value for each of [`OF_MODEL`] and [`OF_TRAINING`], those of `fixed` as they are. A `preset` of None where the
        family has none.
    """
    chosen = dict(fixed)
    on_cpu = device == "cpu"
    if "preset" not in chosen:
        chosen["preset"] = _preset(size, on_cpu, family)
    preset = family.presets.get(chosen["preset"], {})
    if "set_size" not in chosen:
        most = max(64, preset.get("set_size", family.set_size))
        chosen["set_size"] = min(most, max(32, 2 ** int(math.log2(max(2, size.group / 2)))))
    sentences = max(1, size.cells // chosen["set_size"])
    if "per_device_train_batch_size" not in chosen:
        batch = 8 if on_cpu or size.cells < 20_000 else 16 if size.cells < 200_000 else 32
        chosen["per_device_train_batch_size"] = max(1, min(batch, sentences // STEPS_PER_EPOCH))
    if "max_steps" not in chosen:
        steps = math.ceil(EPOCHS * sentences / chosen["per_device_train_batch_size"])
        chosen["max_steps"] = min(MOST_STEPS, max(FEWEST_STEPS, steps))
    if "learning_rate" not in chosen:
        own = LEARNING_RATES.get(chosen["preset"] or "", LARGE_LEARNING_RATE)
        chosen["learning_rate"] = family.training_defaults.get("learning_rate", own)
    if "early_stopping_patience" not in chosen:
        chosen["early_stopping_patience"] = PATIENCE if has_validation else None
    return chosen


def _preset(size: DataSize, on_cpu: bool, family: type[PerturbationConfig]) -> str | None:
    if issubclass(family, StateConfig):
        return "mini" if on_cpu or size.cells < 100_000 else "small" if size.cells < 1_000_000 else "base"
    return next((name for name in (("tiny" if on_cpu else "published"),) if name in family.presets), None)


def autos_of(run: "RunConfig") -> list[str]:
    """The fields of a run that are `auto`, with their sections."""
    of_model = [f"model.{name}" for name in OF_MODEL if run.model.get(name) == AUTO]
    return of_model + [f"training.{name}" for name in OF_TRAINING if run.training.get(name) == AUTO]


def without_autos(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a section that are decided already."""
    return {name: value for name, value in fields.items() if value != AUTO}


def decide(run: "RunConfig", size: DataSize, device: str, family: type[PerturbationConfig], has_validation: bool):
    """Put what `auto` becomes into a run; a line of its notes says it. A run that has no `auto` stays as it is."""
    autos = autos_of(run)
    if not autos:
        return
    sections = {"model": run.model, "training": run.training}
    asked = {name: run.model[name] for name in OF_MODEL if name in run.model}
    asked |= {name: run.training[name] for name in OF_TRAINING if name in run.training}
    chosen = chosen_sizes(size, device, family, without_autos(asked), has_validation)
    said = []
    for field in autos:
        section, name = field.split(".")
        value = chosen[name]
        if value is None:
            del sections[section][name]
            continue
        sections[section][name] = value
        said.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    run.notes.append(
        f"auto: {', '.join(said)}, for {size.cells:,} training cells, {size.group:,} in the median group, on {device}"
    )
