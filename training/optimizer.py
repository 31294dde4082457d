"""The optimiser of a model, where the Trainer's own would not be the right one."""

import torch
from transformers import Trainer

from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.training.arguments import StateTrainingArguments


def optimizer_of(
    model: PerturbationPreTrainedModel, args: StateTrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict] | None:
    """
    The class and the options of the optimiser, as `Trainer` takes them; None where those of `Trainer` serve.

    A model with parameter groups has one optimiser over all of them. Adam treats each parameter by itself, so this takes
    the same steps as one optimiser for each group.
    """
    groups = model.parameter_groups()
    if groups is None and not args.l2_weight_decay:
        return None
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if groups is not None:
        options["params"] = [{"weight_decay": args.weight_decay, **group} for group in groups]
    return (torch.optim.Adam if args.l2_weight_decay else optimizer), options
