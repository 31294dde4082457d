"""The record of a run: made before its first step, from what it reads and what it starts from."""

from typing import TYPE_CHECKING

from pertstate.base.checkpoint_files import hub_arguments
from pertstate.base.hub_names import is_repository
from pertstate.base.public import last_part, public
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.group_means import GroupMeans
from pertstate.data.record import Ancestor, RunRecord, source_of
from pertstate.data.training_sentences import TrainingSentences
from pertstate.hub.provenance import Provenance
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.pretrained import Pretrained


if TYPE_CHECKING:
    from pertstate.training.run_config import RunConfig

# What may differ between a run and the one that continues it: its folder, its length, and what it logs.
_FREE = (
    *(
        "output_dir",
        "resume_from_checkpoint",
        "overwrite",
        "dry_run",
        "keep_resamplings",
        "max_steps",
        "num_train_epochs",
        "save_steps",
        "save_total_limit",
    ),
    *(
        "save_strategy",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "report_to",
        "run_name",
        "disable_tqdm",
    ),
    *(
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_revision",
        "license",
        "data_license",
    ),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "per_device_eval_batch_size"),
    *(
        "eval_steps",
        "eval_strategy",
        "eval_on_start",
        "early_stopping_patience",
        "load_best_model_at_end",
        "metric_for_best_model",
        "use_cpu",
    ),
    *(
        "bf16",
        "fp16",
        "tf32",
        "torch_compile",
        "torch_compile_mode",
        "torch_compile_backend",
        "log_level",
        "logging_dir",
    ),
)


# These count for each process. What all processes together take for a step is what must stay the same.
_OF_EACH_PROCESS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# The data themselves are told by their hashes.
_HASHED = ("datasets", "store", "splits", "files")


def settings_of(run: "RunConfig", args: StateTrainingArguments | None) -> dict:
    """
    What of a run's sections shapes its result.

    Args:
        run (`RunConfig`): the sections.
        args ([`StateTrainingArguments`], *optional*): of a model that takes steps: how many processes share one.
    """
    data = {
        f"data.{name}": getattr(run.data, name)
        for name in sorted(run.given)
        if hasattr(run.data, name) and name not in _HASHED
    }
    free = {*_FREE, *_OF_EACH_PROCESS}
    training = {f"training.{name}": value for name, value in run.training.items() if name not in free}
    if args is not None:
        batches = args.world_size * args.gradient_accumulation_steps
        if args.cells_per_batch is None:
            training["training.sentences_per_step"] = batches * args.train_batch_size
        else:
            training["training.batches_per_step"] = batches
    model = {f"model.{name}": value for name, value in run.model.items()}
    return public({**data, **model, **training})


def record_of(
    run: "RunConfig",
    data: TrainingSentences,
    fitted: bool,
    provenance: Provenance | None,
    pretrained: Pretrained | None,
    before: RunRecord | None,
    means: GroupMeans | None,
    change_tests: dict[str, float],
    intervals: ChangeIntervals | None,
    args: StateTrainingArguments,
) -> RunRecord:
    """
    What a run learns from.

    Args:
        run (`RunConfig`): its sections.
        data ([`TrainingSentences`]): its training split, which knows the other splits' groups too.
        fitted (`bool`): the model is fitted in one pass, in which only controls of training groups take part.
        provenance ([`Provenance`], *optional*): the files, of the process that hashed them.
        pretrained ([`Pretrained`], *optional*), before ([`RunRecord`], *optional*): the checkpoint that it starts from, and its record.
        means ([`GroupMeans`], *optional*): of the training groups, and of those of that checkpoint.
        change_tests (`dict[str, float]`): adjusted p-values of the perturbations, see
            [`~pertstate.training.change_test.change_tests`].
        intervals ([`ChangeIntervals`], *optional*): of predicted mean changes.
        args ([`StateTrainingArguments`]): how it trains.
    """
    groups = data.recorded_groups()
    trained = {(group.dataset, group.context) for group in groups if group.split == "train"}
    learned = sorted(trained) if fitted else data.learned_controls()
    hashes, whole = data.hashes() or (None, True)
    return RunRecord(
        control=data.processor.control,
        groups=groups,
        learned_controls=learned,
        sources=[] if provenance is None else [source_of(source) for source in provenance.sources],
        settings=settings_of(run, None if fitted else args),
        notes=list(data.notes),
        chosen_on_all=run.data.hvg_on_all and isinstance(run.data.genes, int),
        ancestors=[] if pretrained is None else ancestors_of(pretrained, before),
        means=means,
        hashes=hashes,
        whole=whole,
        change_tests={**({} if before is None else before.change_tests), **change_tests},
        intervals=intervals,
    )


def check_same_run(checkpoint: str, record: RunRecord):
    """
    Raises:
        ValueError: the checkpoint that is continued is of another run; the error says what differs.
    """
    before = RunRecord.load(checkpoint)
    if before is not None and (difference := before.difference(record)) is not None:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is of another run: {difference}; continue it with what it was begun with, or "
            "train anew in another output_dir (or with --overwrite)"
        )


def ancestors_of(pretrained: Pretrained, record: RunRecord | None) -> list[Ancestor]:
    """The checkpoint that a run starts from, which has this record, and those before it."""
    name = pretrained.name if is_repository(pretrained.name) else last_part(pretrained.name)
    return [Ancestor(name, None)] if record is None else record.as_ancestors(name)


def record_before(pretrained: Pretrained) -> RunRecord | None:
    """The record of the checkpoint that a run starts from, where it has one."""
    return RunRecord.load(pretrained.name, hub_arguments({"revision": pretrained.revision}))
