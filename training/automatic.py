"""What a run decides by itself: the sizes of the model, of sentences and of batches, and the number of steps."""

import math
from dataclasses import replace

import numpy as np
import torch

from pertstate.configuration_state import StateConfig
from pertstate.families import FAMILIES
from pertstate.training.run_config import RunConfig


AUTO = "auto"
# The training arguments that may be `auto`, beside `preset` and `set_size` of the model.
OF_TRAINING = ("max_steps", "per_device_train_batch_size", "early_stopping_patience")
# Training arguments of a model that starts from an anchor; a run may set others.
ANCHORED = {"learning_rate": 3e-4, "lr_scheduler_type": "linear", "average_decay": 0.98}
# Held-out sets of training groups that choose the number of steps.
INNER_FOLDS = 2
# With an accelerator, each preset is used up to so many training cells.
_ENOUGH = {"mini": 100_000, "small": 2_000_000, "base": math.inf}
_MOST_CELLS = 128  # of an automatic sentence
_FEWEST_CELLS = 32
_EPOCHS = 20
_FEWEST_STEPS, _MOST_STEPS = 400, 4000
# Sentences of a batch: without an accelerator, and with one up to so many training cells.
_BATCH, _BATCHES = 8, {8: 20_000, 16: 200_000, 32: math.inf}
# Evaluations without a better one that end a run with validation data.
PATIENCE = 5


def with_defaults(run: RunConfig) -> RunConfig:
    """
    The run of a new State model without a model section, or with `model_type` and `set_size` alone in it, or of one that asks for an
    anchor or `preset: auto`, with the defaults that are known before the data are: it starts from an anchor (`residual: anchor`), with the arguments of [`ANCHORED`].
    Unless the run sets them, `preset`, `set_size` and `max_steps` are `"auto"`. Another run stays as it is.
    """
    asked = (
        not run.model.keys() - {"model_type", "set_size"}
        or run.model.get("preset") == AUTO
        or run.model.get("residual") == "anchor"
    )
    if not (is_new_state(run.model) and asked):
        return run
    model = {"residual": "anchor", **run.model}
    training = dict(run.training)
    if model["residual"] == "anchor":
        training = {**ANCHORED, **training}
        if any(training.get(name) for name in ("fsdp", "deepspeed")):
            training["average_decay"] = run.training.get("average_decay")
    if not {"preset", "hidden_size"} & set(model):
        model["preset"] = AUTO
    if model.get("preset") == AUTO:
        model.setdefault("set_size", AUTO)
    if "num_train_epochs" not in training:
        training.setdefault("max_steps", AUTO)
    return replace(run, model=model, training=training)


def without_autos(fields: dict) -> dict:
    """The fields of a section that are not `"auto"`."""
    return {name: value for name, value in fields.items() if value != AUTO}


def is_new_state(model: dict) -> bool:
    """Whether a model section is that of a State model that starts from no checkpoint."""
    return model.get("pretrained") is None and model.get("model_type", StateConfig.model_type) == StateConfig.model_type


def settled(run: RunConfig, cells: np.ndarray | None, has_validation: bool) -> tuple[RunConfig, str | None]:
    """
    Replace each `"auto"` of a run by a value that follows from its data. Returns the run and the decisions as a sentence; None
    instead of the sentence if nothing was left to decide.

    - `preset`: `mini` without an accelerator; with one, `mini` up to 100,000 training cells, `small` up to 2,000,000, `base`
      beyond. Of other families than State `tiny` without an accelerator, `published` with one
    - `per_device_train_batch_size`: 8 sentences without an accelerator; with one 8 up to 20,000 training cells, 16 up to 200,000,
      32 beyond; but at most half of the sentences of an epoch
    - `early_stopping_patience`: 5 evaluations where there are validation data, else none
    - `set_size`: the power of 2 below half of the median training group, from 32 to 128
    - `max_steps`: 20 epochs, from 400 to 4,000 steps. A model with an anchor and without validation data chooses among these
      on held-out training groups (`inner_folds: 2`), unless the run sets `inner_folds`

    A stream counts as larger than every bound.

    Args:
        run ([`RunConfig`]): with `"auto"` where a value is to be decided.
        cells (`np.ndarray` of shape `(groups,)`, *optional*): the number of cells of each training group; None for a stream.
        has_validation (`bool`): the run holds out validation data.

    Raises:
        ValueError: `auto` is asked for where it has no meaning.
    """
    model, training, said = dict(run.model), dict(run.training), []
    accelerator = torch.accelerator.is_available() and not training.get("use_cpu")
    total, group = (math.inf, math.inf) if cells is None else (int(cells.sum()), float(np.median(cells)))
    family = FAMILIES[model.get("model_type", StateConfig.model_type)].config
    if model.get("preset") == AUTO:
        if model.get("pretrained") is not None or not family.presets:
            raise ValueError(f"preset: {AUTO} is for a new model of a family that has presets; leave it out")
        enough = next(name for name, most in _ENOUGH.items() if total <= most) if is_new_state(model) else "published"
        model["preset"] = enough if accelerator else "mini" if is_new_state(model) else "tiny"
        said.append(f"preset {model['preset']}")
    if model.get("set_size") == AUTO:
        half = min(_MOST_CELLS, max(_FEWEST_CELLS, group / 2))
        model["set_size"] = 2 ** int(math.log2(half))
        said.append(f"sentences of {model['set_size']} cells")
    of_set = model.get("set_size") or family.presets.get(str(model.get("preset")), {}).get("set_size", family.set_size)
    if training.get("per_device_train_batch_size") == AUTO:
        batch = next(batch for batch, most in _BATCHES.items() if total <= most) if accelerator else _BATCH
        training["per_device_train_batch_size"] = int(max(1, min(batch, total // of_set // 2)))
        said.append(f"batches of {training['per_device_train_batch_size']} sentences")
    if training.get("early_stopping_patience") == AUTO:
        del training["early_stopping_patience"]
        if has_validation:
            training["early_stopping_patience"] = PATIENCE
            said.append(f"early stopping after {PATIENCE} evaluations without a better one")
    if training.get("max_steps") == AUTO:
        of_batch = of_set * training.get("per_device_train_batch_size", 8)
        if isinstance(training.get("cells_per_batch"), int):
            of_batch = training["cells_per_batch"]
        step = of_batch * training.get("gradient_accumulation_steps", 1)
        training["max_steps"] = math.ceil(min(_MOST_STEPS, max(_FEWEST_STEPS, _EPOCHS * total / step)))
        if model.get("residual") == "anchor" and not has_validation and cells is not None:
            training.setdefault("inner_folds", INNER_FOLDS)
        said.append(
            f"up to {training['max_steps']} steps" if training.get("inner_folds") else f"{training['max_steps']} steps"
        )
    if not said:
        return run, None
    found = "a stream" if cells is None else f"{total:,} training cells, {group:g} in the median group"
    words = f"{', '.join(said)}: chosen for {found}, and {'an accelerator' if accelerator else 'CPUs'}"
    return replace(run, model=model, training=training), words
