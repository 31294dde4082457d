"""Which weights of a checkpoint are trained further: low-rank adapters and chosen parts, or all but the backbone."""

from transformers.utils import is_peft_available

from pertstate.base.printable import get_logger
from pertstate.training.arguments import StateTrainingArguments


logger = get_logger(__name__)


def add_adapter(model, args: StateTrainingArguments, grown: list[str], revision: str | None):
    """
    Put low-rank adapters (LoRA, Hu et al. 2022: `W x + alpha / rank * B A x`, where B starts at 0) beside the linear
    layers that the family names, and make copies of chosen parts, which are trained whole. The rest is frozen.

    Args:
        model ([`PerturbationPreTrainedModel`]): a checkpoint, `name_or_path` being its name.
        args ([`StateTrainingArguments`]): `lora_rank` and the options beside it.
        grown (`list[str]`): tensors that got rows or columns for new names; their layers are trained whole.
        revision (`str`, *optional*): revision of the checkpoint, to be recorded.

    Returns:
        `peft.PeftModel`

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has no such part or no such layers, or new rows belong to no layer.
    """
    if not is_peft_available():
        raise ImportError(f"lora_rank={args.lora_rank} needs peft; pip install 'pertstate[lora]'")
    from peft import LoraConfig, get_peft_model

    rank = args.lora_rank
    if rank is None:
        raise ValueError("lora_rank: expected the rank of the adapters, found None; set it")
    alone = [name for name in grown if "." not in name]
    if alone:
        raise ValueError(
            f"{alone} got rows for new names, and belong to no layer that an adapter could hold; leave lora_rank out and "
            "train all of the model"
        )
    whole = model.submodules(args.train_fully or []) + [name.rpartition(".")[0] for name in grown]
    whole += model.parts_with_adapters()
    # A part inside another is trained with it.
    whole = sorted({name for name in whole if not any(name.startswith(f"{other}.") for other in whole)})
    inside = tuple(f"{name}." for name in whole)
    # peft takes every part whose name ends like one of these.
    meant = [name for name, _ in model.named_modules() if name in whole or name.startswith(inside)]
    unmeant = [name for name, _ in model.named_modules() if name.endswith(tuple(whole)) and name not in meant]
    if unmeant:
        raise ValueError(
            f"train_fully: {unmeant[0]!r} ends like one of {whole}, so peft would train it, too; name parts such that no other "
            "part's name ends like theirs"
        )
    targets = [name for name in model.lora_targets(args.lora_mlp) if name not in whole and not name.startswith(inside)]
    if not targets:
        raise ValueError(
            f"train_fully={whole} leaves no layer for adapters; leave lora_rank out, or train fewer parts whole"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if args.lora_alpha is None else args.lora_alpha,  # type: ignore[arg-type]  # any number serves
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=whole or None,
    )
    adapted = get_peft_model(model, config, revision=revision)
    trained, everything = adapted.get_nb_trainable_parameters()
    logger.info(
        f"adapters of rank {args.lora_rank} beside {len(targets)} layers"
        + (f", trained whole: {', '.join(whole)}" if whole else "")
        + f"; {trained:,} of {everything:,} parameters are trained"
    )
    return adapted


def freeze_backbone(model):
    """Freeze the backbone, and log what is left to train; errors as in [`FineTunablePreTrainedModel.freeze_backbone`]."""
    model.freeze_backbone()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"the backbone is frozen; {trained:,} of {model.num_parameters():,} parameters are trained")
