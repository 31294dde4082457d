"""Models whose weights are shared out over processes (FSDP2)."""

import copy
import os
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel


def fsdp_is_asked() -> bool:
    """Whether `accelerate launch` was given a configuration of FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_fsdp(enabled: bool):
    """Accelerate has FSDP for several accelerators alone, and leaves it out elsewhere without a word; say it here.

    Raises:
        ValueError: it was asked for, and is not used.
    """
    if fsdp_is_asked() and not enabled:
        raise ValueError(
            "accelerate was asked for FSDP, which it has for two or more accelerators alone; use DDP instead (pertstate configs "
            "accelerate/ddp)"
        )


def check_shardable(model, averaged: bool, max_steps: int):
    """
    Raises:
        ValueError: FSDP cannot train this.
    """
    found = [
        *(["an adapter (lora_rank)"] if not isinstance(model, PerturbationPreTrainedModel) else []),
        *([f"{model.config.model_type}, which is fitted in one pass"] if model.fitted else []),
        *(["average_decay"] if averaged else []),
        *(["max_steps: 0"] if max_steps == 0 else []),
    ]
    if found:
        raise ValueError(
            f"FSDP shares out the weights of a model that is trained in steps; found {', '.join(found)}; use DDP instead "
            "(pertstate configs accelerate/ddp)"
        )


def make_shardable(model: PerturbationPreTrainedModel):
    """Let accelerate share out a model: it asks for the embeddings of tokens, which a model of cells has none of."""
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign,assignment,return-value]


@torch.no_grad()
def whole_copy(model: PerturbationPreTrainedModel) -> PerturbationPreTrainedModel:
    """
    A model of the same class with whole weights, on CPUs. All processes call it together, and each gets one.

    Args:
        model ([`PerturbationPreTrainedModel`]): with weights that are shared out.
    """
    # One by one, so that a device never holds more than its part and one whole weight.
    whole = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }
    # FSDP2 puts a class of its own before that of the model.
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    # What its weights are drawn from at first is given back, so that a checkpoint changes no step after it.
    with torch.random.fork_rng(devices=[]):
        made = plain(copy.deepcopy(model.config))
    made.load_state_dict(whole)
    return made.eval()
