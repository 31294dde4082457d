"""StateTrainer: a transformers Trainer that computes distributional losses over cell sentences."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from pertstate.base.checkpoint_files import check_finite_weights
from pertstate.base.constants import GENE_LABELS, LABELS, Split
from pertstate.base.files import share, whole_file
from pertstate.base.messages import counted
from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.base.printable import get_logger
from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.data.group_means import GroupMeans
from pertstate.data.record import RunRecord
from pertstate.data.sentences import SentenceCollator, SentenceDataset
from pertstate.data.training_sentences import TrainingSentences
from pertstate.evaluation.assembly import samples_of, scores_of
from pertstate.evaluation.baselines import NO_CHANGE, Baselines
from pertstate.evaluation.group_scores import (
    LOGGED,
    GroupScores,
    baselines_of,
    groups_of,
    real_cells_of,
)
from pertstate.evaluation.metrics import METRICS, MODEL
from pertstate.evaluation.predicted_groups import predicted_groups
from pertstate.evaluation.prediction import check_perturbations, counted_elsewhere
from pertstate.evaluation.scores import Scores, averages_as_figures
from pertstate.evaluation.scoring import score_groups
from pertstate.families import objective_for
from pertstate.hub.publish import hide
from pertstate.hub.training_push import TrainingPush
from pertstate.losses.objective import Objective
from pertstate.training.anchoring import control_tables, fit_added, fit_anchor
from pertstate.training.arguments import StateTrainingArguments
from pertstate.training.averaging import WeightAverage
from pertstate.training.early_stopping import EarlyStopping
from pertstate.training.fitting import fit_model, gather_means, gather_sums
from pertstate.training.half_weights import HalfWeights
from pertstate.training.loss_terms import LossTerms
from pertstate.training.optimizer import optimizer_of
from pertstate.training.placing import Placing
from pertstate.training.progress import Progress, TimedLog
from pertstate.training.sharding import check_fsdp, check_shardable, make_shardable, whole_copy
from pertstate.training.staging import Continued, is_staged, last_whole_checkpoint, whole_checkpoint
from pertstate.training.stopping import Stop


logger = get_logger(__name__)


class StateTrainer(Trainer):
    r"""
    Trains a perturbation model on a [`SentenceDataset`] or a [`SentenceStream`].

    Beyond the `Trainer` of transformers it

    - computes the loss with the objective of the model's config, and logs each of its terms and cells per second;
    - logs every few seconds, where `logging_steps` is not set, and says how long the training will take;
    - ends where evaluations get no better, with `early_stopping_patience`;
    - scores (context, perturbation) groups in `evaluate`: Pearson of the mean change, MAE of the mean and energy
      distance, beside the same figures of no change and of the perturbation mean (learned from the training split);
    - stops with an error where a logged term is NaN or infinite;
    - writes checkpoints that are whole or do not exist, and pushes them so; continues from whole ones alone;
    - stops at SIGINT or SIGTERM after the running step, with a checkpoint of it, see [`Stop`];
    - starts a model with `residual="anchor"` from what the training cells show, see [`~pertstate.base.modeling_anchor.Anchor`];
    - evaluates and saves an average of the weights, where `average_decay` asks for one;
    - continues a stream where a checkpoint left it, without reading it from its start;
    - fits the families that need no gradients in one pass over the training cells, see [`StateTrainer.fit`].

    Args:
        model ([`PerturbationPreTrainedModel`]): what is trained; or a `peft.PeftModel` of one, of which the adapter is
            saved.
        args ([`StateTrainingArguments`]): as in `Trainer`.
        train_dataset ([`SentenceDataset`] or [`SentenceStream`], *optional*): not needed to evaluate the loss alone.
        eval_dataset ([`SentenceDataset`], *optional*): as in `Trainer`.
        processing_class ([`StateProcessor`], *optional*): saved beside the weights.
        card (`str`, *optional*): text of the README.md that is saved beside the weights.
        record ([`RunRecord`], *optional*): what the run learns from, saved beside the weights.
        stop ([`Stop`], *optional*): what a signal does.
        kwargs: further arguments of `Trainer`.

    Raises:
        ValueError: with `push_to_hub`, the Hub refuses the metadata of the card.
        PermissionError, OSError: with `push_to_hub`, there is no repository to push to, and none can be made.
    """

    model: PerturbationPreTrainedModel
    args: StateTrainingArguments
    train_dataset: TrainingSentences
    objective: Objective

    def __init__(
        self,
        model,
        args,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        card: str | None = None,
        record: RunRecord | None = None,
        stop: Stop | None = None,
        **kwargs,
    ):
        self.push = TrainingPush(args)
        if args.push_to_hub:
            self.push.check(card)
        kwargs.setdefault("data_collator", SentenceCollator(places=model.packs_cells and args.n_gpu <= 1))
        kwargs.setdefault("preprocess_logits_for_metrics", self._scored)
        if kwargs.get("optimizers", (None, None))[0] is None:
            kwargs.setdefault("optimizer_cls_and_kwargs", optimizer_of(model, args))
        self.continued, self.stop = Continued(), Stop() if stop is None else stop
        averaged = args.average_decay is not None and not model.fitted
        self.average = WeightAverage(model, args.average_decay) if averaged else None
        patience = args.early_stopping_patience
        self.early_stopping = None if patience is None else EarlyStopping(patience)
        own = [self.average, self.continued, TimedLog(), self.early_stopping, self.push, self.stop]
        # The last one ends the training: all else has been done then.
        kwargs["callbacks"] = [
            *(kwargs.get("callbacks") or []),
            *(callback for callback in own if callback is not None),
        ]
        with self.push.alone():
            super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        # In a notebook the library's table stays.
        if self.pop_callback(ProgressCallback) is not None or self.pop_callback(PrinterCallback) is not None:
            self.add_callback(Progress())
        self.label_names = [GENE_LABELS if model.is_ceiling else LABELS]
        # The objective is a mean over sentences; the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.objective = objective_for(model.config)
        self.terms = LossTerms(self.accelerator)
        # First, so that the callbacks that print or report a log are given the terms.
        self.callback_handler.callbacks.insert(0, self.terms)
        # Not given to the base class, which looks for a tokenizer inside a processor.
        self.processor, self.card = processing_class, card
        # Those that are saved: while a checkpoint is written, `args` are a copy.
        self._asked = args
        self._means: GroupMeans | None = None
        # Of the checkpoint that is trained further: what its baselines knew.
        self.means_before: GroupMeans | None = None
        self.record = record
        self._unseen = 0
        self.placing = Placing(args)
        self.half_weights = HalfWeights(model) if args.bf16_weights and not model.fitted else None
        # With FSDP, the trained model with whole weights.
        self._whole: PerturbationPreTrainedModel | None = None
        check_fsdp(self.is_fsdp_enabled)
        if self.is_fsdp_enabled:
            check_shardable(model, self.average is not None, args.max_steps)
            make_shardable(model)

    # Training

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        if self.model.fitted:
            if resume_from_checkpoint:
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r}: {self.model.config.model_type} is fitted in one "
                    "pass, which is not continued; leave it out"
                )
            return self.fit()
        folder = resume_from_checkpoint or None
        if folder is True:
            folder = last_whole_checkpoint(str(self.args.output_dir))
            if folder is None:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no checkpoint; leave it out")
        self._whole = None
        self.continued.start(folder, bool(self.args.load_best_model_at_end))
        if self.average is not None:
            self.average.continue_from(folder)
        # The library would remove the last checkpoint at the end where it keeps one and another is the best; a run that has
        # none cannot be resumed. It need not make room, as `whole_checkpoint` does.
        asked, self.args = self.args, copy.copy(self.args)
        self.args.save_total_limit = None
        self._set_anchor()
        if self.args.max_steps == 0:
            self.args = asked
            return TrainOutput(0, float("nan"), {})
        if folder is not None and self.train_dataset.load_state(folder):
            self.args.ignore_data_skip = True
        try:
            with self.stop.listening():
                output = super().train(folder, trial, ignore_keys_for_eval)
                self.stop.after_the_last_step(self.args, self.state)
        finally:
            self.args = asked
            if self.average is not None:
                loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
                self.average.finish(keep=not loaded)
        if self.is_fsdp_enabled:
            self._whole = whole_copy(self.accelerator.unwrap_model(self.model))
        if self.continued.step == self.state.global_step:
            # The time and the loss of no step.
            self.state.log_history.pop()
        return output

    def set_initial_training_values(self, args, dataloader):
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        finished = self.continued.step is not None and 0 < max_steps <= self.continued.step
        if finished:
            logger.info(f"all {max_steps} steps are done: no weight changes, what is missing is finished")
        elif self.early_stopping is not None and self.continued.state is not None:
            finished = self.early_stopping.has_come(args, self.continued.state)
            if finished:
                logger.info(f"the training had ended early, at step {self.continued.step}: what is missing is finished")
        # No epoch is begun, where the library would take one step more.
        return (0 if finished else epochs, *others, max_steps)

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
        progress = self.args.should_log and not self.args.disable_tqdm
        sums, metrics = fit_model(self.model, self.train_dataset, self.accelerator, progress)
        if not self.decodes:
            # What the baselines of an evaluation know, too.
            self._means = GroupMeans.of_sums(sums)
        self.log(metrics)
        if self.eval_dataset is not None and self.args.eval_strategy != "no":
            self.evaluate()
        return TrainOutput(0, float("nan"), metrics)

    def _set_anchor(self):
        """
        Give the anchor of a new model what the training cells show. That of a checkpoint stays as it is, but for perturbations
        that were added to its vocabulary.
        """
        anchor, processor = self.model.fitted_anchor, self.train_dataset.processor
        processor.control_expression = anchor is not None and anchor.corrects
        if anchor is None:
            return
        is_new = not any(table.any() for table in anchor.buffers())
        added = [] if is_new or anchor.by_features else self.model.added_perturbations
        if not is_new and not added:
            return
        means = gather_means(self.train_dataset, False, self.accelerator) if self.decodes else self.learned_means()
        if means is None:
            means = GroupMeans.of_sums(gather_sums(self.train_dataset, self.accelerator, progress=False))
        if added:
            fit_added(anchor, means, processor, added)
            return
        fit_anchor(anchor, means, processor)
        cells = self.train_dataset.training_cells()
        if processor.control_expression and cells is not None:
            anchor.set(**control_tables(means, cells, processor, self.accelerator))

    def get_train_dataloader(self) -> DataLoader:
        self.placing.place(self.train_dataset)
        if self.train_dataset is not None and self.args.cells_per_batch == "auto":
            cells = self.args.cells_of_batch(self.train_dataset.set_size)
            logger.info(f"cells_per_batch: batches of up to {counted(cells, 'cell')} on each device")
        loader = None if self.train_dataset is None else self.train_dataset.loader(self.args, self.data_collator)
        return super().get_train_dataloader() if loader is None else loader

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch; errors as in [`TrainingSentences.steps_per_epoch`]."""
        return self.train_dataset.steps_per_epoch(self.args)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.lr_decay_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(self.args.schedule_steps or num_training_steps, optimizer)
        # Counted in steps, so that it continues from a checkpoint where it was.
        steps = max(1, round(self.args.lr_decay_epochs * self.steps_per_epoch))
        optimizer = self.create_optimizer() if optimizer is None else optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, steps, self.args.lr_decay_factor)
        self.lr_scheduler = schedule  # type: ignore[assignment]  # `Trainer` takes any schedule
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None):
        with nullcontext() if self.half_weights is None else self.half_weights.applied():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        judged, batch = (outputs, inputs) if model.training else self._own_sentences(outputs, inputs)
        self.objective.train(model.training)
        if model.training:
            self.objective.set_progress(self.state.global_step, self.train_dataset.epoch_of(self.args, self.state))
        terms = self.objective(judged, batch)
        if model.training:
            self.terms.add(terms, inputs)
        elif outputs.unseen is not None:
            self._unseen += int(self.accelerator.gather_for_metrics(outputs.unseen).sum())
        return (terms["loss"], outputs) if return_outputs else terms["loss"]

    def _own_sentences(self, outputs, inputs):
        """
        Outputs and inputs of the sentences that count. Accelerate fills up the last batch of several processes with sentences of the
        first, and leaves their figures out when it gathers. A process that has no others keeps one, whose loss is left out too.
        """
        state, number = self.accelerator.gradient_state, len(outputs.predictions)
        own = state.remainder - self.args.process_index * number
        if not state.end_of_dataloader or state.remainder <= 0 or own >= number:
            return outputs, inputs
        own = max(own, 1)
        return outputs.first(own), {name: value[:own] for name, value in inputs.items()}

    # Evaluation

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", loss_only: bool = False
    ) -> dict[str, float]:
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        self._unseen = 0
        self.placing.share(dataset)
        averaged = nullcontext() if self.average is None else self.average.applied()
        with self.terms.paused(), counted_elsewhere(), averaged, self._evaluating(dataset):
            self.compute_metrics = None
            if isinstance(dataset, SentenceDataset):
                check_perturbations(self.model, dataset.perturbations, dataset.processor)
                if not (self.args.prediction_loss_only or loss_only):
                    scores: Any = GroupScores(dataset, self.baselines(LOGGED), self.decodes)
                    self.compute_metrics = scores
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self._unseen:
            logger.warning(
                f"{metric_key_prefix}: {self._unseen} of {len(dataset)} sentences are of a perturbation or context without "
                "training cells; the model card says how these are predicted"
            )
        return metrics

    @contextmanager
    def _evaluating(self, dataset) -> Iterator[None]:
        """Evaluate batch by batch, and with `cells_per_batch` as many sentences at once as surely fit."""
        asked, self.args = self.args, copy.copy(self.args)
        self.args.batch_eval_metrics = True
        if isinstance(dataset, SentenceDataset) and asked.cells_per_batch is not None:
            cells = asked.cells_of_batch(dataset.set_size)
            self.args.per_device_eval_batch_size = max(1, cells // int(dataset.sizes().max()))
        try:
            yield
        finally:
            self.args = asked

    @property
    def decodes(self) -> bool:
        """Whether what is scored are the genes that the model decodes, and not its predicted features."""
        return self.model.config.gene_dim is not None

    def baselines(self, methods: tuple[str, ...] | None = None) -> Baselines:
        """What the baselines know, see [`known_means`]. All processes call it together."""
        clip = self.model.config.nonnegative_output or self.decodes
        return baselines_of(self.known_means(), self.train_dataset.processor, clip, methods)

    def known_means(self) -> GroupMeans | None:
        """The means of the training groups, and of those of the checkpoint that is trained further, where it has them in these units."""
        own, before = self.learned_means(), self.means_before
        if own is None or before is None:
            return own or before
        return own.joined(before) if own.is_like(before) else own

    def learned_means(self) -> GroupMeans | None:
        """The means of the training groups, in the units of predictions; None where only control cells are trained on."""
        if self._means is None:
            self._means = gather_means(self.train_dataset, self.decodes, self.accelerator)
        return self._means

    def _scored(self, outputs, labels):
        """Of a model's outputs, the predicted cells, or the genes that are decoded from them."""
        return outputs[int(self.decodes)] if isinstance(outputs, tuple) else outputs

    def test(self, dataset: SentenceDataset, split: str = Split.TEST, prefix: str = Split.TEST) -> Scores:
        """
        Score the model on the groups of a split, beside all baselines: the figures of the model card, and of `pertstate
        evaluate --model`. Every process calls it; each scores some of the groups.

        Args:
            dataset ([`SentenceDataset`]): of the split.
            split (`str`), prefix (`str`): which groups, and what the logged figures begin with.
        """
        processor, cells, seed = dataset.processor, dataset.cells, 0
        groups = groups_of(cells, split)
        real, baselines = real_cells_of(cells, processor, self.decodes), self.baselines()
        model = self._unsharded()
        rank, processes = self.args.process_index, self.args.world_size
        own = groups[rank::processes]
        found, kept = predicted_groups(model, processor, real, own, seed), samples_of(len(groups))
        results = list(score_groups(real, found, processor.control, baselines, seed, samples=kept, order=own))
        gathered = sorted(gather_object(results), key=lambda result: result.group)
        features = processor.vocabulary.genes or processor.output_names(len(gathered[0].means["observed"]))
        scores = scores_of(
            gathered,
            features,
            self.record,
            "the model",
            seed=seed,
            is_ceiling=self.model.is_ceiling,
            intervals=None if self.record is None else self.record.intervals,
        )
        self.log(averages_as_figures(scores, prefix))
        return scores

    def calibrate(self, dataset: SentenceDataset) -> ConfidenceCalibration | None:
        """
        The calibration of the model's confidence on the validation groups, see [`ConfidenceCalibration`]; None if the model has no
        confidence, or there are too few groups. Every process calls it; each scores some of the groups.

        Args:
            dataset ([`SentenceDataset`]): of the validation split.
        """
        model, processor = self.accelerator.unwrap_model(self.model), dataset.processor
        groups = groups_of(dataset.cells, Split.VAL)
        own = groups[self.args.process_index :: self.args.world_size]
        real, baselines = real_cells_of(dataset.cells, processor, self.decodes), self.baselines((NO_CHANGE,))
        predicted = predicted_groups(model, processor, real, own)
        results = score_groups(real, predicted, processor.control, baselines, draws=0, order=own)
        found = gather_object(
            [
                (result.group, result.confidence, float(result.figures[MODEL][0, METRICS.index("energy")]))
                for result in results
                if result.confidence is not None
            ]
        )
        return ConfidenceCalibration.of_groups(*([of[i] for of in sorted(found)] for i in (1, 2)))

    # Saving

    def _unsharded(self) -> PerturbationPreTrainedModel:
        """The model with whole weights. With FSDP, all processes call it together until the training has ended."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return model
        whole: Any = whole_copy(model) if self._whole is None else self._whole
        return whole.to(self.args.device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # The library writes parts alone, from which the training continues; this is what others load.
        self._save(output_dir, whole=self._unsharded())

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict | None = None,
        whole: PerturbationPreTrainedModel | None = None,
    ) -> None:
        """Weights, config and code, or an adapter; processor, card and arguments; no pickle. ValueError for weights of NaN."""
        # Private, as `save_model`, which gathers the weights of all kinds of training, writes a pickle by itself.
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model) if whole is None else whole
        if state_dict is None:
            check_finite_weights(model, folder)
        # At no moment may the folder load while something is missing: weights last, or (with more to come) hidden.
        if is_staged(folder):
            model.save_pretrained(folder, state_dict=state_dict)
            share(folder)  # an adapter is saved by peft
            hide(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        if self.record is not None:
            self.record.save(folder)
        (folder / "training_args.json").write_text(self._asked.to_json_string(), encoding="utf-8")
        self._write_card(folder)
        if not is_staged(folder):
            model.save_pretrained(folder, state_dict=state_dict)
            share(folder)  # an adapter is saved by peft
        # Once more: peft writes into the card of an adapter.
        self._write_card(folder)

    def _write_card(self, folder: Path):
        if self.card is not None:
            with whole_file(folder / "README.md") as partial:
                partial.write_text(self.card, encoding="utf-8")

    def _save_checkpoint(self, model, trial) -> None:
        # Private, as no public method stands around all that is written of a checkpoint.
        averaged = nullcontext() if self.average is None else self.average.applied()
        with averaged, whole_checkpoint(self, self._asked.save_total_limit, resumable=self.stop.asked) as folder:
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                self.train_dataset.save_state(folder)
                if self.average is not None and self.args.should_save:
                    self.average.save_last(folder)

    def push_to_hub(  # type: ignore[override]  # it always waits, and its card is not made here
        self,
        commit_message: str | None = "End of training",
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
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            return self.push.push(folder, commit_message, token, revision, private)
