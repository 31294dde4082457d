"""A run that trains on a stream."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.constants import Normalize, Split
from pertstate.data.sentences import SentenceDataset
from pertstate.data.stream_survey import StreamSurvey, survey_stream
from pertstate.data.streaming import SentenceStream, read_stream_state
from pertstate.data.streams import datasets_of, manifest_of, open_stream
from pertstate.processing import StateProcessor
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.run_config import RunConfig


def from_stream(
    run: RunConfig, training_arguments: Callable, resume: str | None
) -> tuple[StateTrainingArguments, StateProcessor, Callable, str]:
    """
    Arguments, processor, what makes the datasets of the splits from a config, and a description.

    Args:
        training_arguments (`Callable`): makes the arguments of a run, given whether it has validation data.
        resume (`str`, *optional*): checkpoint that is continued: its first look over the stream is not taken again.

    Raises:
        ValueError: fields of the run contradict one another; see also [`survey_stream`].
    """
    data, stream = run.data, run.stream
    manifest = manifest_of(stream)
    unused = ["datasets", "store", "hvg_on_all", "small_groups", "sentences_per_group", "sentence_cap"]
    unused += ["perturbation_key", "context_key", "batch_key"] if manifest is None else []
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    set_here = [name for name in unused if getattr(data, name) != defaults[name]]
    if set_here:
        raise ValueError(f"data: {set_here} are not for a stream; leave them out, or leave stream.path out")
    options = data.survey_options()
    if manifest is not None:
        data.check_store(manifest, run.given)
        options |= {
            name: manifest.reading[name] for name in ("control", "input", "gene_input", "combination_separator")
        }
        if options["normalize"] == Normalize.AUTO:
            options["normalize"] = manifest.normalize
        if options["target_sum"] is None and options["normalize"] == Normalize.COUNTS_TO_LOG1P:
            options["target_sum"] = manifest.target_sum
    splits = data.splits_of_stream(datasets_of(stream))
    held_out = {*splits.zeroshot.values(), *splits.contexts.values(), *splits.perturbations.values()}
    held_out |= {split for of in splits.fewshot.values() for split, names in of.items() if names}
    args = training_arguments(run, has_validation=Split.VAL in held_out)
    seed = args.seed if args.data_seed is None else args.data_seed
    source = open_stream(stream, data.contexts)
    if resume is not None:
        processor = StateProcessor.from_pretrained(resume)
        state = read_stream_state(resume, args.process_index, args.world_size)
        survey = StreamSurvey.from_state(state, processor, splits)
    else:
        survey = survey_stream(
            source,
            splits,
            seed=seed,
            progress=args.should_log and not args.disable_tqdm,
            **options,
            **stream.survey_options(),
        )
        if manifest is not None:
            # The model reads files like those that the store was made of, not its columns.
            for name in ("perturbation_key", "context_key", "batch_key"):
                setattr(survey.processor, name, manifest.reading[name])

    def datasets(config: PerturbationConfig) -> dict:
        if config.embeds_batches:
            unknown = sorted(set(survey.batch_names) - set(survey.processor.vocabulary.batches))
            if unknown:
                raise ValueError(
                    f"the stream has control cells of batches without training cells: {unknown[:10]}; a model with "
                    "batch_encoder or batch_token cannot place them: leave those options out"
                )
        made = {
            Split.TRAIN: SentenceStream(
                source,
                survey,
                config.set_size,
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
                made[split] = SentenceDataset(
                    cells,
                    survey.processor,
                    split,
                    config.set_size,
                    seed=seed,
                    control_matching=data.control_matching,
                    shuffle=False,
                )
        return made

    return args, survey.processor, datasets, _describe(survey, Path(stream.path))


def _describe(survey: StreamSurvey, path: Path) -> str:
    """What the run trains on, in a few lines."""
    sizes: dict[str, int] = {}
    for key, count in survey.counts.items():
        split = survey.split_of(*key) or Split.UNUSED
        sizes[split] = sizes.get(split, 0) + count
    vocabulary = survey.processor.vocabulary
    return "\n".join(
        [
            f"{path}: a stream; first look at {survey.cells} cells" + ("" if survey.complete else ", not all of it"),
            "splits: "
            + ", ".join(f"{name} {count}" for name, count in sorted(sizes.items(), key=lambda item: -item[1])),
            f"{len(survey.controls)} control cells to draw from; {len(vocabulary.perturbations)} single perturbations, "
            f"{len(vocabulary.contexts)} training contexts",
        ]
    )
