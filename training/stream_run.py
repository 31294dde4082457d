"""A run that trains on a stream."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.constants import Normalize, Split
from pertstate.base.messages import counted
from pertstate.base.printable import joined_lines
from pertstate.data.arguments import DataArguments, StreamArguments
from pertstate.data.coexpression import COEXPRESSION
from pertstate.data.manifest import Manifest
from pertstate.data.sentences import SentenceDataset
from pertstate.data.splits import Splits
from pertstate.data.stream_reading import CellStream
from pertstate.data.stream_state import read_stream_state
from pertstate.data.stream_survey import StreamSurvey, survey_stream
from pertstate.data.streaming import SentenceStream
from pertstate.data.streams import datasets_of, manifest_of, open_stream
from pertstate.data.training_sentences import TrainingSentences
from pertstate.processing import StateProcessor
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.automatic import settled
from pertstate.training.pretrained import Pretrained
from pertstate.training.run_config import RunConfig


# Fields of the data section that a stream has no use for.
_UNUSED = (
    "datasets",
    "store",
    "validation",
    "hvg_on_all",
    "controls_only",
    "small_groups",
    "sentences_per_group",
    "sentence_cap",
)
# The columns of labels, which a stream names itself.
_LABEL_KEYS = ("perturbation_key", "context_key", "batch_key", "dose_key")


def from_stream(
    run: RunConfig, training_arguments: Callable, resume: str | None, pretrained: Pretrained | None = None
) -> tuple[RunConfig, StateTrainingArguments, StateProcessor, Callable, str]:
    """
    The run with what is decided for a stream, its arguments, processor, what makes the datasets of the splits from a config, and a description.

    Args:
        training_arguments (`Callable`): makes the arguments of a run; it is told whether the run has validation data.
        resume (`str`, *optional*): checkpoint that is continued: its first look over the stream is not taken again.
        pretrained ([`Pretrained`], *optional*): checkpoint that is trained further.

    Raises:
        ValueError: fields of the run contradict one another; see also [`survey_stream`].
    """
    data, stream = run.data, run.stream
    manifest = manifest_of(stream)
    check_fields(data, manifest)
    if manifest is not None:
        data.check_store(manifest, run.given)
    splits = data.splits_of_stream(datasets_of(stream), reader_of(data, stream, manifest))
    has_validation = holds_out(splits, Split.VAL)
    run, said = settled(run, None, has_validation)
    args = training_arguments(run, has_validation)
    source = open_stream(stream, data.contexts, dict.fromkeys([*(data.exclude or ()), *(data.include or ())]))
    if resume is None:
        survey = first_look(run, args, source, splits, manifest, pretrained)
    else:
        processor = StateProcessor.from_pretrained(resume)
        state = read_stream_state(resume, args.process_index, args.world_size)
        survey = StreamSurvey.from_state(state, processor, splits)

    def datasets(config: PerturbationConfig) -> dict[str, TrainingSentences]:
        check_batches(config, survey)
        return sentences(run, args, source, survey, config.set_size)

    about = describe(survey, Path(str(stream.path)))
    return run, args, survey.processor, datasets, about if said is None else f"{about}\n{said}"


def check_fields(data: DataArguments, manifest: Manifest | None):
    """
    Raises:
        ValueError: fields are set that a stream has no use for; they are listed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    unused = [*_UNUSED, *(_LABEL_KEYS if manifest is None else ())]
    set_here = [name for name in unused if getattr(data, name) != defaults[name]]
    if data.perturbation_features == COEXPRESSION:
        raise ValueError(
            "data.perturbation_features=coexpression: expected files or a store, found a stream; give a file of vectors, or "
            "prepare a store of it (pertstate prepare)"
        )
    if set_here:
        raise ValueError(f"data: {set_here} are not for a stream; leave them out, or leave stream.path out")


def reader_of(data: DataArguments, stream: StreamArguments, manifest: Manifest | None) -> StateProcessor:
    """Reads the names of perturbations as the stream's labels are read."""
    if manifest is not None:
        return StateProcessor(**manifest.reading)
    return StateProcessor(**{**data.reading, "dose_key": (stream.columns or {}).get("dose")})


def holds_out(splits: Splits, split: str) -> bool:
    """Whether any cells are held out for a split."""
    whole = {*splits.zeroshot.values(), *splits.contexts.values(), *splits.perturbations.values()}
    return split in whole or any(of.get(split) for of in splits.fewshot.values())


def first_look(
    run: RunConfig,
    args: StateTrainingArguments,
    source: CellStream,
    splits: Splits,
    manifest: Manifest | None,
    pretrained: Pretrained | None,
) -> StreamSurvey:
    """The first look over the stream; a store is read as its files were."""
    data = run.data
    options: dict[str, Any] = {name: getattr(data, name) for name in ("normalize", "target_sum")}
    if pretrained is not None:
        prepared = None if manifest is None else manifest.reading
        options = {"processor": pretrained.processor_for(data, run.given, prepared)}
    elif manifest is not None:
        # The model reads files like those that the store was made of, and not the columns of the store.
        options |= manifest.reading
        if data.normalize == Normalize.AUTO:
            options["normalize"] = manifest.normalize
        if data.target_sum is None and options["normalize"] == Normalize.COUNTS_TO_LOG1P:
            options["target_sum"] = manifest.target_sum
    else:
        options |= {name: value for name, value in data.reading.items() if name not in _LABEL_KEYS}
    if pretrained is None:
        options |= {"genes": data.chosen_genes(), "perturbation_features": data.features()}
        options["dose_encoding"] = data.dose_encoding
    return survey_stream(
        source,
        splits,
        control_matching=data.control_matching,
        seed=seed_of(args),
        progress=args.should_log and not args.disable_tqdm,
        **options,
        **run.stream.survey_options(),
    )


def seed_of(args: StateTrainingArguments) -> int:
    """The seed of the data."""
    return args.seed if args.data_seed is None else args.data_seed


def sentences(
    run: RunConfig, args: StateTrainingArguments, source: CellStream, survey: StreamSurvey, set_size: int
) -> dict[str, TrainingSentences]:
    """Datasets of the splits that have cells: `train`, the stream, and `val` and `test` of the cells that it sampled."""
    data, stream, seed = run.data, run.stream, seed_of(args)
    datasets: dict[str, TrainingSentences] = {
        Split.TRAIN: SentenceStream(
            source,
            survey,
            set_size,
            seed=seed,
            control_sentences=data.control_sentences,
            heldout_controls=data.heldout_controls,
            buffer_cells=stream.buffer_cells,
            shuffle_sentences=stream.shuffle_sentences,
            rank=args.process_index,
            world_size=args.world_size,
            endless=True,
        )
    }
    for split in (Split.VAL, Split.TEST):
        cells = survey.to_cells(split)
        if cells is not None:
            datasets[split] = SentenceDataset(
                cells,
                survey.processor,
                split,
                set_size,
                seed=seed,
                control_matching=data.control_matching,
                shuffle=False,
            )
    return datasets


def check_batches(config: PerturbationConfig, survey: StreamSurvey):
    """A model that embeds or classifies batches knows those of the training cells alone.

    Raises:
        ValueError: the stream has control cells of other batches; they are listed.
    """
    unknown = sorted(set(survey.batch_names) - set(survey.processor.vocabulary.batches))
    if config.embeds_batches and unknown:
        raise ValueError(
            f"the stream has control cells of batches without training cells: {unknown[:10]}; a model with batch_encoder "
            "or batch_token cannot place them: leave those options out"
        )


def describe(survey: StreamSurvey, path: Path) -> str:
    """What the run trains on, in a few lines."""
    sizes: dict[str, int] = {}
    for key, count in survey.counts.items():
        split = survey.split_of(*key) or Split.UNUSED
        sizes[split] = sizes.get(split, 0) + count
    vocabulary = survey.processor.vocabulary
    counts = ", ".join(f"{name} {count}" for name, count in sorted(sizes.items(), key=lambda item: -item[1]))
    return joined_lines(
        [
            f"{path}: a stream; first look at {counted(survey.cells, 'cell')}"
            + ("" if survey.complete else ", not all of it"),
            f"splits: {counts}",
            f"{counted(len(survey.controls), 'control cell')} to draw from; "
            f"{counted(len(vocabulary.perturbations), 'single perturbation')}, "
            f"{counted(len(vocabulary.contexts), 'training context')}",
        ]
    )
