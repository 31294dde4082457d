"""
Train a perturbation model: `pertstate train CONFIG.yaml [--any_field value ...]`.

Many devices: `accelerate launch -m pertstate.train CONFIG.yaml ..`, or, in a clone, `accelerate launch train.py CONFIG.yaml ..`.
"""

import sys


if __name__ == "__main__":
    # The command says what goes wrong in one line, and imports this module by its name.
    from pertstate.cli import main as command

    raise SystemExit(command(["train", *sys.argv[1:]]))

import copy
import logging
from pathlib import Path

from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from pertstate.base.console import log_to_console, show
from pertstate.base.constants import Split
from pertstate.base.printable import get_logger
from pertstate.evaluation.scores import averages_as_figures
from pertstate.families import FAMILIES
from pertstate.hub.card import render_card
from pertstate.hub.provenance import Provenance
from pertstate.hub.publish import whole_checkpoint_folder
from pertstate.training.change_test import describe_tests, gather_tests
from pertstate.training.pretrained import Pretrained
from pertstate.training.recording import check_same_run, record_of
from pertstate.training.run import (
    build_config,
    check_further,
    check_processes,
    from_cells,
    further,
    new_model,
    read_run,
    training_arguments,
)
from pertstate.training.run_config import RunConfig
from pertstate.training.run_folder import run_folder
from pertstate.training.run_help import help_of_train
from pertstate.training.run_steps import set_steps
from pertstate.training.staging import clear_run
from pertstate.training.stream_run import from_stream
from pertstate.training.trainer import StateTrainer


logger = get_logger("pertstate.train")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """
    Run a training.

    Args:
        argv (`list[str]`, *optional*): the words after `pertstate train`; by default those of the process.

    Returns:
        The figures of the test split; empty where there is none.

    Raises:
        ValueError, KeyError, OSError, ImportError: the run cannot be; the message says what to do.
        FloatingPointError: the training diverged.
        StoppedError: a signal stopped it, see [`Stop`].
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & {*argv}:
        show(help_of_train(argv))
        raise SystemExit(0 if argv else 2)

    # What is asked for, and the data: a contradiction is found before anything is computed.
    run = read_run(argv)
    check_further(run)
    with run_folder(run) as resume:
        return _train(run, resume)


def _train(run: RunConfig, resume: str | None) -> dict[str, float]:
    pretrained = Pretrained.of(run.model)
    if run.stream.path is None:
        run, args, processor, make_datasets, about = from_cells(run, pretrained)
    else:
        run, args, processor, make_datasets, about = from_stream(run, training_arguments, resume, pretrained)
    check_processes(args.world_size)
    log_to_console(logging.INFO if args.should_log else logging.ERROR)
    config = build_config(run, processor, pretrained)
    processor.set_size = config.set_size
    if config.reads_counts:
        processor.predict_log1p(config.library_size)
    datasets = make_datasets(config)
    for line in about.splitlines():
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

    if args.inner_folds and not fitted:
        set_steps(args, run, resume, datasets[Split.TRAIN], config.set_size, make_model)
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
    means = None if fitted else trainer.learned_means()
    record = record_of(run, datasets[Split.TRAIN], fitted, provenance, pretrained, means, tests)
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
    trainer.train(resume_from_checkpoint=resume)
    record.means = trainer.learned_means()
    metrics, scores = {}, None
    if Split.TEST in datasets:
        metrics = trainer.evaluate(datasets[Split.TEST], metric_key_prefix=Split.TEST, loss_only=True)
        scores = trainer.test(datasets[Split.TEST])
        metrics |= averages_as_figures(scores, Split.TEST)

    # The checkpoint: the whole folder or nothing.
    if args.should_save:
        trainer.card = render_card(run, config, processor, metrics, trainer.state, args, provenance, record, scores)
        if scores is not None:
            scores.save(Path(str(args.output_dir), "scores"))
            for line in (*(f"note: {note}" for note in scores.notes), scores.verdict):
                logger.info(line)
        with whole_checkpoint_folder(str(args.output_dir)) as folder:
            trainer.save_model(str(folder), _internal_call=True)
        logger.info(f"checkpoint: {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics
