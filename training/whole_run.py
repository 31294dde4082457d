"""A run from its data to its checkpoint."""

import copy
import logging
from pathlib import Path

from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from pertstate.base.console import log_to_console
from pertstate.base.constants import Split
from pertstate.base.outputs import claimed_folder, whole_folder
from pertstate.base.printable import get_logger
from pertstate.evaluation.report_data import SCORES_FOLDER
from pertstate.evaluation.scores import SCORES, Scores, averages_as_figures
from pertstate.families import FAMILIES
from pertstate.hub.card import hardware_of, render_card
from pertstate.hub.provenance import Provenance
from pertstate.hub.publish import whole_checkpoint_folder
from pertstate.training.change_test import describe_tests, gather_tests
from pertstate.training.dry_run import dry_run
from pertstate.training.history import write_history
from pertstate.training.pretrained import Pretrained
from pertstate.training.recording import check_same_run, record_before, record_of
from pertstate.training.run import (
    build_config,
    check_processes,
    from_cells,
    further,
    new_model,
    training_arguments,
)
from pertstate.training.run_config import RunConfig
from pertstate.training.run_steps import set_steps
from pertstate.training.staging import clear_run
from pertstate.training.stream_run import from_stream
from pertstate.training.trainer import StateTrainer


logger = get_logger("pertstate.train")


def train_run(run: RunConfig, resume: str | None, quiet: bool = False) -> tuple[dict[str, float], Scores | None]:
    """
    Train, score and write a run whose folder is held, see [`run_folder`].

    Args:
        run ([`RunConfig`]): what is asked for.
        resume (`str`, *optional*): the checkpoint to continue from.
        quiet (`bool`): say only what goes wrong.

    Returns:
        the figures of the test split and its scores; empty and None where there is none.

    Raises:
        ValueError, KeyError, OSError, ImportError, FloatingPointError, StoppedError: see `pertstate.train.main`.
    """
    pretrained = Pretrained.of(run.model)
    if run.stream.path is None:
        run, args, processor, make_datasets, about = from_cells(run, pretrained)
    else:
        run, args, processor, make_datasets, about = from_stream(run, training_arguments, resume, pretrained)
    check_processes(args.world_size)
    log_to_console(logging.INFO if args.should_log and not quiet else logging.ERROR)
    if quiet:
        args.disable_tqdm = True  # the table of a notebook, too
    config = build_config(run, processor, pretrained)
    processor.set_size = config.set_size
    if config.reads_counts:
        processor.predict_log1p(config.library_size)
    datasets = make_datasets(config)
    for line in (*run.notes, *about.splitlines(), f"device: {hardware_of(args)}"):
        logger.info(line)
    if Split.VAL not in datasets and not FAMILIES[config.model_type].model.fitted:
        logger.info("no validation data: the last step is kept, there is no 'best' checkpoint")

    # The model. Every process starts from the same weights, whatever was drawn before.
    disable_progress_bar()  # that of writing files; training keeps its own
    fitted = FAMILIES[config.model_type].model.fitted

    def make_model():
        if pretrained is None:
            return new_model(run, copy.deepcopy(config), processor)
        return further(pretrained, config, processor, args)

    if args.dry_run:
        for line in dry_run(args, datasets, make_model, processor):
            logger.info(line)
        logger.info("dry run: nothing was written")
        return {}, None
    intervals = None
    if args.inner_folds and not fitted:
        intervals = set_steps(args, run, resume, datasets[Split.TRAIN], config.set_size, make_model)
    set_seed(args.seed)
    model = make_model()
    logger.info(f"{config.model_type}: {model.num_parameters():,} parameters")

    # Training, and the figures of the test split.
    provenance = Provenance.of_run(run, datasets[Split.TRAIN].notes) if args.should_save else None
    trainer = StateTrainer(
        model,
        args,
        datasets[Split.TRAIN],
        datasets.get(Split.VAL),
        processing_class=processor,
    )
    tests = gather_tests(datasets[Split.TRAIN], trainer.decodes, trainer.accelerator)
    if tests:
        logger.info(describe_tests(tests))
    before = None if pretrained is None else record_before(pretrained)
    trainer.means_before = None if before is None else before.means
    means = None if fitted else trainer.known_means()
    record = record_of(
        run, datasets[Split.TRAIN], fitted, provenance, pretrained, before, means, tests, intervals, args
    )
    trainer.record = record
    if args.should_save:
        trainer.card = render_card(run, config, processor, args=args, provenance=provenance, record=record)
        if resume is not None:
            check_same_run(resume, record)
    if args.resume_from_checkpoint:
        logger.info(f"resuming from {resume}" if resume else "nothing to resume from: starting anew")
    if args.overwrite and args.should_save:
        # Not earlier: until here the run may turn out not to be one.
        clear_run(Path(str(args.output_dir)))
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FloatingPointError:
        # How it diverged. (Of a training that was stopped, the checkpoint says it.)
        if args.should_save:
            write_history(Path(str(args.output_dir)), trainer.state)
        raise
    record.means = trainer.known_means()
    if Split.VAL in datasets and getattr(config, "confidence_token", False):
        record.calibration = trainer.calibrate(datasets[Split.VAL])
    metrics: dict[str, float] = {}
    scores = None
    if Split.TEST in datasets:
        metrics = trainer.evaluate(datasets[Split.TEST], metric_key_prefix=Split.TEST, loss_only=True)
        scores = trainer.test(datasets[Split.TEST])
        metrics |= averages_as_figures(scores, Split.TEST)

    # The checkpoint: the whole folder or nothing.
    if args.should_save:
        trainer.card = render_card(run, config, processor, metrics, trainer.state, args, provenance, record, scores)
        if scores is not None:
            place = Path(str(args.output_dir), SCORES_FOLDER)
            with claimed_folder(place, SCORES, overwrite=True), whole_folder(place, SCORES) as folder:
                scores.save(folder, args.keep_resamplings)
            for line in (*(f"note: {note}" for note in scores.notes), scores.verdict):
                logger.info(line)
        with whole_checkpoint_folder(str(args.output_dir)) as folder:
            trainer.save_model(str(folder), _internal_call=True)
            write_history(folder, trainer.state)
        logger.info(f"checkpoint: {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics, scores
