"""StateTrainer: a transformers Trainer that computes distributional losses over cell sentences."""

import logging
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalPrediction,
    HubStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from pertstate.base.constants import CELL_MASK, CONTROL_CELLS, GENE_LABELS, LABELS, Split
from pertstate.base.hub_errors import on_the_hub
from pertstate.data.cells import Cells
from pertstate.data.sentences import SentenceCollator, SentenceDataset
from pertstate.data.streaming import SentenceStream, read_stream_state
from pertstate.evaluation.metrics import (
    METRICS,
    AsPredicted,
    MeanChanges,
    average,
    score_group,
)
from pertstate.evaluation.prediction import check_perturbations, counted_elsewhere
from pertstate.families import objective_for
from pertstate.hub.publish import hide, reveal
from pertstate.hub.push import address_of, ensure_repository, push_checkpoint
from pertstate.processing import StateProcessor
from pertstate.training.fitting import gather_sums


logger = logging.getLogger(__name__)

STAGING = ".partial"


class _StreamLoader(DataLoader):
    """A loader that tells its stream of the epoch, as the Trainer tells the loader."""

    def set_epoch(self, epoch: int):
        self.dataset.set_epoch(epoch)


class StateTrainer(Trainer):
    r"""
    Trains a perturbation model on a [`SentenceDataset`] or a [`SentenceStream`].

    Beyond the `Trainer` of transformers it

    - computes the loss with the objective of the model's config, and logs each of its terms and cells per second;
    - scores (context, perturbation) groups in `evaluate`: Pearson of the mean change, MAE of the mean and energy
      distance, beside the same figures of no change and of the perturbation mean (learned from the training split);
    - stops with an error where a logged term is NaN or infinite;
    - writes checkpoints that are whole or do not exist, and pushes them so;
    - continues a stream where a checkpoint left it, without reading it from its start;
    - fits the families that need no gradients in one pass over the training cells, see [`StateTrainer.fit`].

    Args:
        model ([`PerturbationPreTrainedModel`], or a `peft.PeftModel` of one, of which adapters are saved), args ([`StateTrainingArguments`]), train_dataset ([`SentenceDataset`] or
            [`SentenceStream`]), eval_dataset ([`SentenceDataset`]), processing_class ([`StateProcessor`], saved beside the weights): as in `Trainer`.
        card (`str`, *optional*): text of the README.md that is saved beside the weights.

    Raises:
        ValueError: with `push_to_hub`, the Hub refuses the metadata of the card.
        PermissionError, OSError: with `push_to_hub`, there is no repository to push to, and none can be made.
    """

    def __init__(
        self,
        model,
        args,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        card: str | None = None,
        **kwargs,
    ):
        kwargs.setdefault("data_collator", SentenceCollator())
        if isinstance(train_dataset, SentenceStream) and args.dataloader_num_workers > 0:
            raise ValueError(
                f"dataloader_num_workers={args.dataloader_num_workers}: a stream is read by the process that trains, whose "
                "checkpoints hold its state; leave it at 0"
            )
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        # The objective is a mean over sentences; the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.objective = objective_for(model.config)
        # Not given to the base class, which looks for a tokenizer inside a processor.
        self.processor, self.card = processing_class, card
        self._mean_changes: MeanChanges | None = None
        self._staging, self._unseen = False, 0
        self._reset_terms()
        if args.push_to_hub and card is not None:
            # A licence that the Hub does not know is better said now than after the training.
            with on_the_hub(self.hub_model_id, "model"):
                ModelCard(card).validate()

    # Streams

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, SentenceStream):
            return super().get_train_dataloader()
        # As it is: accelerate would read a batch ahead of the state that is saved, and deal out a stream that each
        # process reads its own part of.
        return _StreamLoader(
            self.train_dataset,
            self.args.train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if self.model.fitted:
            if resume_from_checkpoint:
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r}: {self.model.config.model_type} is fitted in one "
                    "pass, which is not continued; leave it out"
                )
            return self.fit()
        if isinstance(self.train_dataset, SentenceStream) and resume_from_checkpoint:
            state = read_stream_state(resume_from_checkpoint, self.args.process_index, self.args.world_size)
            self.train_dataset.load_state_dict(state)
            self.args.ignore_data_skip = True  # the stream goes on where it stopped
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # Optimiser and learning rate

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One optimiser. Its groups are those of a model that has some: Adam treats each parameter by itself, so that one
        over several groups takes the steps that one for each group would.
        """
        groups = self.model.parameter_groups()
        if groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer([{"weight_decay": self.args.weight_decay, **group} for group in groups], **options)
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return (torch.optim.Adam if args.l2_weight_decay else optimizer), options

    @property
    def steps_per_epoch(self) -> int:
        """
        Optimiser steps of one pass over the training data. A stream has as many as if each of its training cells stood
        in a full sentence.

        Raises:
            ValueError: the first look at a stream did not see all of it.
        """
        args, data = self.args, self.train_dataset
        if isinstance(data, SentenceStream):
            if not data.survey.complete:
                raise ValueError(
                    f"the length of an epoch of the stream is not known: the first look at it ended after "
                    f"{data.survey.cells} cells; leave stream.fill_cells out, or do without schedules in epochs "
                    "(lr_decay_epochs: null)"
                )
            sentences = math.ceil(data.num_cells / data.set_size)
        else:
            sentences = len(data)
        of_batch = args.train_batch_size * args.world_size
        batches = sentences // of_batch if args.dataloader_drop_last else math.ceil(sentences / of_batch)
        return max(1, math.ceil(batches / args.gradient_accumulation_steps))

    @property
    def _epoch(self) -> float | None:
        if not isinstance(self.train_dataset, SentenceStream):
            return self.state.epoch or 0.0
        # The Trainer takes the whole of a training on a stream for one epoch.
        return self.state.global_step / self.steps_per_epoch if self.train_dataset.survey.complete else None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.lr_decay_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        # Counted in steps, so that it continues from a checkpoint where it was.
        steps = max(1, round(self.args.lr_decay_epochs * self.steps_per_epoch))
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, steps, self.args.lr_decay_factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Families without gradients

    def fit(self) -> TrainOutput:
        """
        Compute the weights of a `fitted` model from the training split: each training cell and each control cell of
        its dataset and context once, summed in float64, by several processes together. Arguments that shape steps and
        sentences (`max_steps`, `learning_rate`, control matching ..) play no part. With validation data and
        `eval_strategy` other than `"no"`, the fitted model is evaluated once.

        Returns:
            `TrainOutput`: `global_step` 0 and a `training_loss` of NaN, as no steps were taken; `metrics` has
            `fit_cells`, `fit_runtime` in seconds and `fit_cells_per_second`.

        Raises:
            ValueError: training cells have no control cells of their dataset and context, or see the model's `fit`.
        """
        start = time.perf_counter()
        sums = gather_sums(self.train_dataset, self.accelerator, self.args.should_log and not self.args.disable_tqdm)
        self.model.fit(sums.means(self.train_dataset.processor))
        # What the baselines of an evaluation know, too.
        self._mean_changes = MeanChanges(sums.changes(), self.model.config.nonnegative_output)
        runtime = time.perf_counter() - start
        metrics = {"fit_cells": sums.num_cells, "fit_runtime": round(runtime, 4)}
        metrics["fit_cells_per_second"] = round(sums.num_cells / runtime, 1)
        self.log(metrics)
        if self.eval_dataset is not None and self.args.eval_strategy != "no":
            self.evaluate()
        return TrainOutput(0, float("nan"), metrics)

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.objective.train(model.training)
        if model.training:
            self.objective.set_progress(self.state.global_step, self._epoch)
        terms = self.objective(outputs, inputs)
        if model.training:
            for name, value in terms.items():
                if name != "loss":
                    self._terms[name] = self._terms.get(name, 0.0) + value.detach()
            cells = inputs[CELL_MASK].sum() if CELL_MASK in inputs else inputs[CONTROL_CELLS].shape[:2].numel()
            self._cells = self._cells + cells
            self._batches += 1
        return (terms["loss"], outputs) if return_outputs else terms["loss"]

    def _reset_terms(self):
        self._terms: dict[str, torch.Tensor] = {}
        self._cells: torch.Tensor | int = 0
        self._batches, self._since = 0, time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._batches:
            sums = [torch.as_tensor(v, dtype=torch.float64) for v in (*self._terms.values(), self._cells)]
            device = self.args.device if self.args.device.type != "mps" else "cpu"
            local = torch.stack([v.to(device) for v in sums])
            total = self.accelerator.gather(local[None]).double()
            for name, value in zip(self._terms, total[:, :-1].mean(dim=0).tolist()):
                logs[name] = value / self._batches
            logs["cells_per_second"] = round(total[:, -1].sum().item() / (time.perf_counter() - self._since), 1)
            bad = [name for name in ("loss", *self._terms) if not torch.isfinite(torch.tensor(logs[name]))]
            if bad:
                raise FloatingPointError(
                    f"{', '.join(bad)} became NaN or infinite in the {self._batches} batches up to step "
                    f"{self.state.global_step}; lower learning_rate or max_grad_norm, and resume from the last "
                    "checkpoint"
                )
            self._reset_terms()
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if outputs.unseen is not None:
            self._unseen += int(self.accelerator.gather_for_metrics(outputs.unseen).sum())
        if prediction_loss_only:
            return loss.detach(), None, None
        if self.model.is_ceiling:
            return loss.detach(), outputs.gene_predictions.detach(), inputs[GENE_LABELS].detach()
        return loss.detach(), outputs.predictions.detach(), inputs[LABELS].detach()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.compute_metrics = (lambda p: self._score(p, dataset)) if isinstance(dataset, SentenceDataset) else None
        if isinstance(dataset, SentenceDataset):
            check_perturbations(self.model, dataset.perturbations, dataset.processor)
        start, self._unseen = time.perf_counter(), 0
        with counted_elsewhere():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self._unseen:
            logger.warning(
                f"{metric_key_prefix}: {self._unseen} of {len(dataset)} sentences are of a perturbation or context without "
                "training cells; what is predicted of such ones says the model's card"
            )
        # Cells per second are those of training.
        self._since += time.perf_counter() - start
        return metrics

    @property
    def mean_changes(self) -> MeanChanges:
        """What the baselines know: the mean change of each perturbation over the training split."""
        if self._mean_changes is None:
            cells = self.train_dataset.cells
            self._mean_changes = MeanChanges.fit(
                self._scored_values(cells, self.train_dataset.processor),
                cells.groups[cells.groups["split"].isin([Split.TRAIN, Split.CONTROL])],
                self.train_dataset.processor.control,
                clip=self.model.config.nonnegative_output or self.model.is_ceiling,
            )
        return self._mean_changes

    def _scored_values(self, cells: Cells, processor: StateProcessor):
        """What predictions are compared with: the features, or the genes where the features are given to the model."""
        return cells.genes if self.model.is_ceiling else AsPredicted(cells.features, processor)

    def _score(self, prediction: EvalPrediction, dataset: SentenceDataset) -> dict[str, float]:
        """Figures averaged over groups; every perturbed cell of the split stands in one sentence."""
        of_group: dict[int, list[int]] = {}
        for i in range(len(dataset)):
            of_group.setdefault(dataset.rows(i)[0], []).append(i)
        scores = []
        for index, sentences in of_group.items():
            rows = [dataset.rows(i) for i in sentences]
            group, features = dataset.groups[index], self._scored_values(dataset.cells, dataset.processor)
            scores.append(
                score_group(
                    np.concatenate([prediction.predictions[i, : len(r[1])] for i, r in zip(sentences, rows)]),
                    features[np.concatenate([targets for _, targets, _ in rows])],
                    # The baselines start from the very control cells that the model was given.
                    features[np.concatenate([controls for _, _, controls in rows])],
                    group.perturbation,
                    dataset.processor.split_combination(group.perturbation),
                    self.mean_changes,
                )
            )
        logged = {}
        for method, figures in average(scores).items():
            prefix = "" if method == "model" else method.replace(" ", "_") + "_"
            logged |= {f"{prefix}{metric}": figures[metric] for metric in METRICS}
        # The change of "no change" has no direction, so it has no correlation.
        return {name: value for name, value in logged.items() if value == value}

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights, config and code, or an adapter; processor, card and arguments; no pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        # At no moment may the folder load while something is missing: weights last, or (with more to come) hidden.
        if self._staging:
            model.save_pretrained(folder, state_dict=state_dict)
            hide(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")
        if not self._staging:
            model.save_pretrained(folder, state_dict=state_dict)
        # After the weights: peft writes a card of its own beside adapters.
        if self.card is not None:
            (folder / "README.md").write_text(self.card, encoding="utf-8")

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING) if self._staging else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer` does, but in a staging folder that is renamed when it is whole."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / STAGING / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            if isinstance(self.train_dataset, SentenceStream) and not self.args.save_only_model:
                self.train_dataset.save_state(staged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if self.state.best_global_step and (best == final or best.exists()):
                    self.state.best_model_checkpoint = str(best)
                    self.state.save_to_json(staged / "trainer_state.json")
                shutil.rmtree(final, ignore_errors=True)
                reveal(staged)
                os.replace(staged, final)
                if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
                    self._push_saved(final)
        finally:
            self._staging = False
            if self.args.should_save:
                shutil.rmtree(run_dir / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository `hub_model_id` (by default the name of the output folder) where it does not exist."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        with on_the_hub(name, "model"):
            self.hub_model_id = ensure_repository(HfApi(token=token or self.args.hub_token), name, private)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """
        Push the model as it is now with its code, processor and card, in one commit; see [`push_checkpoint`]. Every
        process calls it, the first one pushes.

        Args:
            commit_message (`str`), token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*):
                by default the arguments `hub_token`, `hub_revision` and `hub_private_repo`.

        Returns:
            `CommitInfo`, or None in other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            return self._push(folder, commit_message, token, revision)

    def _push(self, folder, message: str, token: str | None = None, revision: str | None = None) -> CommitInfo:
        commit = push_checkpoint(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            message=message,
        )
        logger.info(f"pushed: {address_of(commit)}")
        return commit

    def _push_saved(self, checkpoint: Path) -> None:
        """Push a checkpoint in the middle of a training, which goes on where the Hub is down; the last push does not."""
        if not self.is_world_process_zero():
            return
        try:
            self._push(checkpoint, f"Training in progress, step {self.state.global_step}")
        except OSError as error:
            logger.warning(f"{checkpoint.name} was not pushed, the training goes on: {error}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not here, where the checkpoint is still being written: [`StateTrainer._save_checkpoint`] pushes it whole."""
