"""Making the parts of a run from the sections of a [`RunConfig`]: data, sentences, arguments and model."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from pertstate.base.cell_source import GROUP_KEYS
from pertstate.base.cell_values import describe_reading
from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.constants import Split, Values
from pertstate.base.hub_names import is_repository
from pertstate.base.labels import looks_like_control
from pertstate.base.messages import closest, counted, some
from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.base.printable import get_logger, joined_lines
from pertstate.configuration_state import StateConfig
from pertstate.data.cells import Cells, choose, read_cells
from pertstate.data.in_memory import CellData
from pertstate.data.sentences import SentenceDataset
from pertstate.data.shared_arrays import SharedRoom
from pertstate.data.source import NamedSource
from pertstate.data.splits import Splits
from pertstate.data.store import StoreSource
from pertstate.data.stores import open_store
from pertstate.families import FAMILIES
from pertstate.families.scgpt.modeling_scgpt import ScGPTForPerturbation
from pertstate.legacy.scgpt import load_published, published_fields
from pertstate.processing import StateProcessor
from pertstate.training.arguments import EVALUATED, StateTrainingArguments
from pertstate.training.automatic import AUTO, OF_TRAINING, settled, with_defaults, without_autos
from pertstate.training.first_run import fill_columns, first_run, is_data
from pertstate.training.lora import add_adapter, freeze_backbone
from pertstate.training.pretrained import (
    NAMING,
    Pretrained,
    config_of,
    is_published,
)
from pertstate.training.reporting import check_reporting
from pertstate.training.run_config import RunConfig, as_declared, load_run_config, parse_flags, read_sections, run_of
from pertstate.training.validation import with_validation


logger = get_logger("pertstate.train")

DEFAULT_FAMILY = StateConfig.model_type

# Training arguments of a family that are ignored when the run sets the same thing itself.
_DECIDED_BY = {
    "lr_decay_epochs": "lr_scheduler_type",
    "lr_decay_factor": "lr_scheduler_type",
    "l2_weight_decay": "optim",
}


def read_run(argv: list[str]) -> RunConfig:
    """
    The run that the words after `pertstate train` describe: `CONFIG.yaml` first, or `--config CONFIG.yaml` anywhere, and
    flags; or cells first (`screen.h5ad`, a folder, a glob or a store), and flags.
    """
    flags = list(argv)
    if flags and not flags[0].startswith("--") and is_data(flags[0]):
        return _completed(_run_on(flags[0], list(parse_flags(flags[1:]))))
    return _completed(_read_file(flags))


def run_of_fields(cells: str | dict[str, CellData], fields: dict[str, Any]) -> RunConfig:
    """
    The run that [`fit`] describes.

    Args:
        cells (`str` or `dict`): a run file, or cells, as paths or objects.
        fields (`dict[str, Any]`): as flags.
    """
    pairs = list(fields.items())
    if isinstance(cells, str) and not is_data(cells):
        return _completed(run_of(read_sections(cells), cells, pairs, model_fields, training_fields()))
    return _completed(_run_on(cells, pairs))


def _run_on(cells: str | dict[str, CellData], pairs: list[tuple[str, Any]]) -> RunConfig:
    """A run on cells, without a run file."""
    for name, value in pairs:
        if name.rpartition(".")[2] == "report_to":
            asked = as_declared("training.report_to", str | list[str] | None, value)
            check_reporting([asked] if isinstance(asked, str) else asked or [])
    content = first_run(cells, {name.rpartition(".")[2]: value for name, value in pairs})
    run = run_of(content, str(cells) if isinstance(cells, str) else "the run", pairs, model_fields, training_fields())
    if isinstance(cells, dict):
        run.data.datasets = cast(dict, cells)
    fill_columns(run)
    return run


def _completed(run: RunConfig) -> RunConfig:
    """With what its family and the package decide."""
    defaults = config_class(run.model).training_defaults
    kept = {name: value for name, value in defaults.items() if _DECIDED_BY.get(name) not in run.training}
    run.training = {**kept, **run.training}
    if FAMILIES[config_class(run.model).model_type].model.fitted:
        # In one pass: it has no sizes and no steps.
        if run.training.get("cells_per_batch") is not None:
            raise ValueError(
                f"cells_per_batch={run.training['cells_per_batch']}: expected a model that is trained in batches, found "
                f"{config_class(run.model).model_type}, which is fitted in one pass over all cells; leave it out"
            )
        run.model, run.training = without_autos(run.model), without_autos(run.training)
    return with_defaults(run)


def _read_file(flags: list[str]) -> RunConfig:
    if flags and not flags[0].startswith("--"):
        flags.insert(0, "--config")
    positions = [i for i, word in enumerate(flags) if word == "--config" or word.startswith("--config=")]
    if len(positions) != 1:
        raise ValueError(f"expected one CONFIG.yaml, first or after --config; found {len(positions)}")
    word = flags.pop(positions[0])
    path = word.partition("=")[2] if "=" in word else flags.pop(positions[0]) if positions[0] < len(flags) else ""
    return load_run_config(path, flags, model_fields, training_fields())


def config_class(model: dict) -> type[PerturbationConfig]:
    """
    The config of the family that a model section names, or of the checkpoint that it names; of the State transition model
    where it names neither.
    """
    if model.get("pretrained") is not None and not is_published(model):
        return type(config_of(model))
    name = model.get("model_type", DEFAULT_FAMILY)
    if name not in FAMILIES:
        raise ValueError(f"model_type={name!r} is no family of models; {closest(name, FAMILIES)}")
    return FAMILIES[name].config


def model_fields(model: dict) -> dict[str, Any]:
    """What a model section may hold beside `preset`, and its types."""
    of_config = {field.name: field.type for field in dataclasses.fields(config_class(model))}
    return {**of_config, "set_size": int | Literal["auto"], "model_type": str, **dict.fromkeys(NAMING, str | None)}


def training_fields() -> dict[str, Any]:
    """What a training section may hold, and its types."""
    of_arguments = {field.name: field.type for field in dataclasses.fields(StateTrainingArguments) if field.init}
    return of_arguments | {name: of_arguments[name] | Literal["auto"] for name in OF_TRAINING}


def check_processes(world_size: int):
    """`accelerate launch --num_processes N` starts one process on CPUs, without a word; say it here.

    Raises:
        ValueError: several processes were asked for and one is running.
    """
    by_accelerate, several = "ACCELERATE_MIXED_PRECISION" in os.environ, "MASTER_PORT" in os.environ
    if by_accelerate and several and world_size == 1:
        raise ValueError(
            "accelerate was asked for several processes and started one, as it does on CPUs; run `accelerate launch "
            "--multi_gpu --num_processes N -m pertstate.train ... --use_cpu true` (N processes over gloo), or, where one "
            "process is meant, leave --num_processes out and unset MASTER_PORT"
        )


def load_data(run: RunConfig, pretrained: Pretrained | None) -> tuple[Cells, StateProcessor, Splits]:
    """The cells of the run: in memory, or where they are in its store."""
    source, groups, processor, splits = choose_data(run, pretrained)
    return read_cells(source, groups, processor), processor, splits


def choose_data(
    run: RunConfig, pretrained: Pretrained | None
) -> tuple[NamedSource, pd.DataFrame, StateProcessor, Splits]:
    """The source of the run's cells, their groups with their splits, and their processor. The cells are yet to be read."""
    data = run.data
    store = None if data.store is None else open_store(data.store)
    if store is not None:
        data.check_store(store.manifest, run.given)
    processor = None
    if pretrained is not None:
        processor = pretrained.processor_for(data, run.given, None if store is None else store.manifest.reading)
    source = (
        data.file_source(processor)
        if store is None
        else StoreSource(store, data.contexts, data.features(), data.dose_encoding)
    )
    if processor is not None:
        options: dict[str, Any] = {"processor": processor, "controls_only": data.controls_only}
    else:
        decided = data.decide_genes(len(source.genes))
        run.notes += [] if decided is None else [decided]
        options = data.fit_options()
    splits = data.resolve_splits(source.groups, source.reader)
    if data.validation == AUTO:
        splits, held = with_validation(
            splits, source.groups, source.reader, data.by_vector or source.reader.perturbation_features is not None
        )
        run.notes.append(held)
    return source, *choose(source, splits, **options), splits


def check_further(run: RunConfig):
    """
    Whether the options of training a checkpoint further fit the run.

    Raises:
        ValueError: they are set, and the run names no checkpoint.
    """
    if run.model.get("pretrained") is None or is_published(run.model):
        asked = [f"training.{name}" for name in ("lora_rank", "freeze_backbone") if run.training.get(name)]
        asked += ["data.controls_only"] if run.data.controls_only else []
        asked += ["model.pretrained_revision"] if run.model.get("pretrained_revision") is not None else []
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: only for training a checkpoint further; name one that this package wrote in "
                "model.pretrained"
            )
    elif (
        run.training.get("lora_rank") and run.training.get("push_to_hub") and not is_repository(run.model["pretrained"])
    ):
        raise ValueError(
            f"push_to_hub: others can use an adapter only if they can load its base model, but model.pretrained="
            f"{run.model['pretrained']!r} is a folder; push that and name the repository in model.pretrained, or leave "
            "push_to_hub out and push what pertstate merge makes"
        )


def build_config(run: RunConfig, processor: StateProcessor, pretrained: Pretrained | None) -> PerturbationConfig:
    """
    The model's config. Of a checkpoint: its own. Otherwise: the fields of the run, and the sizes that follow from the data
    and from published weights.
    """
    if pretrained is not None:
        return pretrained.config_for(run.model)
    fields = {name: value for name, value in run.model.items() if name not in ("model_type", *NAMING)}
    preset, family = fields.pop("preset", None), config_class(run.model)
    if is_published(run.model):
        fields |= published_fields(run.model["pretrained"], {**family.presets.get(preset, {}), **fields})
    sizes = {**family.sizes(processor), **family.fields_from_names(processor, fields)}
    for name in sizes:
        if name in fields:
            raise ValueError(f"model.{name} follows from the data ({sizes[name]}); leave it out")
    if processor.values == Values.EMBEDDING:
        fields.setdefault("nonnegative_output", False)
    return family.from_preset(preset, **sizes, **fields) if preset else family(**sizes, **fields)


def training_arguments(run: RunConfig, has_validation: bool) -> StateTrainingArguments:
    """
    The training section. With validation data the checkpoint with the lowest validation loss is kept, unless the section
    sets it otherwise; it is looked for twenty times in a run where nothing says how often.

    Raises:
        ValueError: a field needs validation data, and there are none.
    """
    fields = dict(run.training)
    if has_validation:
        fields.setdefault("eval_strategy", "steps")
        if fields["eval_strategy"] == "steps":
            fields.setdefault("eval_steps", fields.get("save_steps", EVALUATED))
            if fields.get("save_strategy", "steps") == "steps":
                fields.setdefault("save_steps", fields["eval_steps"])
        if fields["eval_strategy"] != "no" and "save_strategy" not in fields:
            fields.setdefault("load_best_model_at_end", True)
            fields.setdefault("metric_for_best_model", "eval_loss")
    else:
        idle = {"load_best_model_at_end": False, "eval_strategy": "no", "early_stopping_patience": None}
        asked = [name for name, value in idle.items() if fields.get(name, value) != value]
        if asked:
            found = "found none; hold some out with val_contexts, val_perturbations, a splits file or validation: auto"
            if run.data.validation == AUTO:
                found = (
                    "and validation: auto found no training groups that can be held out as the test groups are; name some "
                    "with val_contexts, val_perturbations or a splits file"
                )
            raise ValueError(
                f"training: {', '.join(asked)}: expected validation data, {found} (test data never choose a checkpoint), or leave "
                f"{'it' if len(asked) == 1 else 'them'} out"
            )
    if "num_train_epochs" in fields:
        fields.setdefault("max_steps", -1)
    return StateTrainingArguments(**fields)


def sentences(cells: Cells, processor: StateProcessor, run: RunConfig, args, set_size: int) -> dict:
    """Datasets of the splits that have cells: `train`, `val`, `test`."""
    seed = args.seed if args.data_seed is None else args.data_seed
    step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.cells_per_batch is not None:
        step = 1  # no sentence is left out: batches are as even as their cells allow
    present = set(cells.groups["split"].unique()) | ({Split.TRAIN} if run.data.controls_only else set())
    datasets = {}
    for split in (Split.TRAIN, Split.VAL, Split.TEST):
        if split in present:
            training = split == Split.TRAIN
            datasets[split] = SentenceDataset(
                cells,
                processor,
                split,
                set_size,
                seed=seed,
                shuffle=training,
                multiple_of=step if training else 1,
                **run.data.sentence_options(),
            )
    return datasets


def check_batches(config: PerturbationConfig, datasets: dict[str, SentenceDataset]):
    """
    A model that embeds or classifies batches knows only the batches of the training cells.

    Raises:
        ValueError: its control cells are of other batches; they are listed.
    """
    if not config.embeds_batches:
        return
    for split, dataset in datasets.items():
        rows = np.concatenate([np.asarray(group.controls) for group in dataset.groups])
        unknown = np.unique(dataset.cells.batch_names(rows[dataset.batch_ids(rows) < 0]))
        if len(unknown):
            raise ValueError(
                f"the {split} split has control cells of batches without training cells: {unknown.tolist()[:10]}; a model "
                "with batch_encoder or batch_token cannot place them: leave those options out, or (in training) set "
                "heldout_controls=false"
            )


def describe(groups: pd.DataFrame, processor: StateProcessor, splits: Splits, run: RunConfig) -> str:
    """What the run trains on, in a few lines."""
    sizes = groups["stop"] - groups["start"]
    counts = sizes.groupby(groups["split"]).sum().sort_values(ascending=False)
    vocabulary = processor.vocabulary
    read = describe_reading(processor.normalize, processor.values, processor.target_sum)
    lines = [
        f"{counted(int(sizes.sum()), 'cell')} x {counted(processor.feature_dim, 'feature')} from {processor.input} ({read})",
        "splits: " + ", ".join(f"{name} {counts[name]}" for name in counts.index if counts[name]),
        f"{counted(len(vocabulary.perturbations), 'single perturbation')}, "
        + counted(len(vocabulary.contexts), "training context")
        + (f", {counted(len(vocabulary.batches), 'batch')}" if vocabulary.batches else ""),
    ]
    alike = [name for name in vocabulary.perturbations if looks_like_control(name)]
    if alike:
        lines.append(f"these perturbations look like controls: {some(alike)}; if they are, list them in control: [..]")
    if processor.perturbation_features is not None:
        features = processor.perturbation_features
        lines.append(f"perturbations as vectors of {features.dim} numbers, from a table of {len(features)}")
    whole = pd.MultiIndex.from_tuples(splits.zeroshot, names=["dataset", "context"]) if splits.zeroshot else None
    for split in (Split.TEST, Split.VAL):
        held = groups[groups["split"] == split]
        places = pd.MultiIndex.from_frame(held[["dataset", "context"]].astype(str))
        held = held if whole is None else held[~places.isin(whole)]
        names = list(
            dict.fromkeys(f"{context} / {name}" for context, name in zip(held["context"], held["perturbation"]))
        )
        if names:
            lines.append(f"held-out groups: {len(names)} ({split}): {some(names)}")
    if splits.zeroshot:
        contexts = ", ".join(f"{d}.{c} ({split})" for (d, c), split in splits.zeroshot.items())
        fitted = FAMILIES[config_class(run.model).model_type].model.fitted
        used = "are" if run.data.control_sentences and run.data.heldout_controls and not fitted else "are not"
        lines.append(f"held-out contexts: {contexts}; their control cells {used} among the training sentences")
    return joined_lines(lines)


def from_cells(
    run: RunConfig, pretrained: Pretrained | None
) -> tuple[RunConfig, StateTrainingArguments, StateProcessor, Callable, str]:
    """
    The run with what its data decide, its arguments, processor, what makes the datasets of the splits from a config, and a
    description.
    """
    source, groups, processor, splits = choose_data(run, pretrained)
    has_validation = bool((groups["split"] == Split.VAL).any())
    training = groups[groups["split"] == Split.TRAIN]
    sizes = (training["stop"] - training["start"]).groupby([training[key] for key in GROUP_KEYS[:3]]).sum().to_numpy()
    settled_run, said = settled(run, sizes, has_validation)
    args = training_arguments(settled_run, has_validation)

    def datasets(config: PerturbationConfig) -> dict:
        cells = read_cells(source, groups, processor, SharedRoom())
        made = sentences(cells, processor, settled_run, args, config.set_size)
        check_batches(config, made)
        return made

    about = describe(groups, processor, splits, settled_run)
    return settled_run, args, processor, datasets, about if said is None else f"{about}\n{said}"


def further(
    pretrained: Pretrained, config: PerturbationConfig, processor: StateProcessor, args: StateTrainingArguments
):
    """The checkpoint's model with the names of the data; the arguments say how much of it is trained."""
    model, change = pretrained.model_for(config, processor)
    for line in (f"starting from {pretrained.name}", *str(change).splitlines()):
        logger.info(line)
    if args.freeze_backbone:
        freeze_backbone(model)
    return model if args.lora_rank is None else add_adapter(model, args, change.grown, pretrained.revision)


def new_model(run: RunConfig, config: PerturbationConfig, processor: StateProcessor) -> PerturbationPreTrainedModel:
    """A new model of the family, with the weights that the run's published folder has."""
    model = FAMILIES[config.model_type].model(config)
    if isinstance(model, ScGPTForPerturbation) and is_published(run.model):
        for line in str(load_published(model, processor.vocabulary.genes, run.model["pretrained"])).splitlines():
            logger.info(line)
    return model
