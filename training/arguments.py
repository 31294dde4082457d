"""Training arguments: those of transformers, with the defaults that this kind of model is trained with."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from pertstate.base.messages import given
from pertstate.base.public import public
from pertstate.training.reporting import check_reporting


# By default an evaluation comes after each such share of all steps.
EVALUATED = 0.05

_FINITE_NUMBER = (lambda value: 0 <= value < math.inf, "at least 0 and finite")
_POSITIVE = (lambda value: 0 < value < math.inf, "above 0 and finite")
_SHARE = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_COUNT = (lambda value: 0 <= value < math.inf, "at least 0")
_SEED = (lambda value: 0 <= value < 2**32, "at least 0 and below 2^32")
_SIZE = (lambda value: value >= 1, "at least 1")
# A number of steps, or a share of all steps.
_STEPS = (
    lambda value: 0 < value < 1 or (value >= 1 and value == value // 1),
    "a number of steps, or a share of all below 1",
)
# The range of each number. NaN is in no range.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), _FINITE_NUMBER),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _SHARE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _SIZE),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "eval_accumulation_steps"), _SIZE),
    "early_stopping_patience": _SIZE,
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), _STEPS),
    **dict.fromkeys(("warmup_steps", "eval_delay", "dataloader_num_workers", "inner_folds"), _COUNT),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "average_decay": _SHARE,
    "schedule_steps": _SIZE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 where num_train_epochs is set"),
}
# Arguments of the library that would do nothing here, or something wrong, and why.
_IN_HALF = "with bf16: true, evaluations compute in half precision as training does"
_NO_KERNELS = "the library's kernels are for models of text"
WITHOUT_MEANING = {
    "label_smoothing_factor": "targets are cells, not classes",
    "neftune_noise_alpha": "there are no embeddings of tokens",
    "include_num_input_tokens_seen": "there are no tokens",
    "train_sampling_strategy": "the data set draws the sentences, from its seed and the epoch",
    "length_column_name": "the data set draws the sentences; cells_per_batch makes batches of even size",
    "auto_find_batch_size": "a run keeps its batch; --dry_run says what memory it takes, and cells_per_batch makes it even",
    "use_liger_kernel": _NO_KERNELS,
    "liger_kernel_config": _NO_KERNELS,
    "use_cache": "no model here predicts step by step",
    "remove_unused_columns": "all of a batch is read",
    "fp16_full_eval": _IN_HALF,
    "bf16_full_eval": _IN_HALF,
    "parallelism_config": "devices share out sentences, as ddp, fsdp or deepspeed do",
    "do_predict": "the test groups are scored at the end of a run that holds some out",
    "debug": "a loss or a gradient that is not finite is an error",
}


@dataclass
class StateTrainingArguments(TrainingArguments):
    r"""
    [`transformers.TrainingArguments`] with other defaults; every field of it can be set.

    - Adam, learning rate 1e-4, constant, gradient norm clipped at 10, no weight decay (as published models)
    - batches of 8 sentences
    - every loss is logged as it is, NaN too
    - nothing is reported to outside services unless `report_to` asks for it

    It has some fields of its own:

    - `lr_decay_epochs`, `lr_decay_factor`: multiply the learning rate by the factor every so many epochs
    - `cells_per_batch`: take as many sentences into a batch as have at most so many cells, instead of
      `per_device_train_batch_size`. `"auto"` is as many cells as so many full sentences have
    - `cells_on_device`: keep the cells of the run on the device, where batches are made of them, see [`CellsOnDevice`]. `"auto"`
      keeps as many as fit on a GPU, and none on a CPU
    - `bf16_weights`: with `bf16`, compute training steps with a bfloat16 copy of the weights, see [`HalfWeights`]
    - `schedule_steps`: the learning rate schedule runs over so many steps, however many are taken
    - `inner_folds`: choose the number of steps, `max_steps` being the largest, on so many sets of training groups that are held
      out in turn before the training itself, see [`choose_steps`]
    - `average_decay`: evaluate and save the moving average of the weights, see [`WeightAverage`]
    - `l2_weight_decay`: make `weight_decay` a part of the gradient, as in Adam, and not a step of its own, as in AdamW
    - `early_stopping_patience`: stop after so many evaluations without a better `metric_for_best_model`
    - `keep_resamplings`: write the resamplings of the scores, too, by which `crossval` pools runs
    - `dry_run`: take a few steps, say what the run needs, and write nothing, see [`dry_run`]
    - `overwrite`: replace the run that `output_dir` holds, its checkpoints at the start, its model at the end
    - `license` (of the weights), `data_license`: go into the model card

    Two ways to train a checkpoint further (`model.pretrained`):

    - `lora_rank`: train low-rank adapters of this rank and nothing else; the run writes an adapter. What the adapters add is
      scaled by `lora_alpha` (default: the rank) over the rank. `lora_dropout` is their dropout. `lora_mlp` also puts them
      beside the backbone's feed-forward layers. `train_fully` names parts of the model that are trained whole
    - `freeze_backbone`: train all but the backbone

    Raises:
        ImportError: `report_to` names a service whose package is missing.
        ValueError: a number is out of its range, `report_to` names an unknown service, an option has no effect or does not fit the optimiser, `license` is no
            identifier, or `hub_strategy` would push states of the optimiser.
    """

    output_dir: str | None = field(default="runs/pertstate", metadata={"help": "Where the checkpoint is written."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Gradients are clipped to this norm."})
    max_steps: int = field(
        default=1000, metadata={"help": "Optimiser steps, by default 1000, or -1 where num_train_epochs is set."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sentences of a batch on each device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Sentences of an evaluation batch."})
    # The dataset shuffles by itself, from its seed and the epoch alone.
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Order of sentences."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave out columns that the model does not read."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of a batch that are targets."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Keep batches in pinned memory, by default where there is an accelerator."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})
    # The library takes no None here.
    logging_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Steps from one log entry to the next, by default those of about five seconds."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters that a step did not use."}
    )
    report_to: str | list[str] | None = field(
        default="none",
        metadata={"help": "Services to report to: tensorboard, wandb, trackio, ..; their packages are checked first."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    lr_decay_epochs: float | None = field(
        default=None, metadata={"help": "Multiply the learning rate by lr_decay_factor every so many epochs."}
    )
    lr_decay_factor: float = field(default=0.9, metadata={"help": "Factor of lr_decay_epochs."})
    schedule_steps: int | None = field(
        default=None, metadata={"help": "Steps over which the learning rate schedule runs, by default max_steps."}
    )
    cells_per_batch: int | Literal["auto"] | None = field(
        default=None,
        metadata={
            "help": "Cells of a batch on each device, of as many sentences as fit, instead of a number of sentences."
        },
    )
    cells_on_device: bool | Literal["auto"] = field(
        default="auto",
        metadata={"help": "Keep the cells on the device: auto (as many as fit, on a GPU), true (all) or false."},
    )
    bf16_weights: bool = field(
        default=False,
        metadata={"help": "With bf16, compute training steps with a bfloat16 copy of the float32 weights."},
    )
    inner_folds: int = field(
        default=0,
        metadata={"help": "Choose the number of steps, up to max_steps, on so many sets of held-out training groups."},
    )
    average_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the weights, which is what is evaluated and saved (0.98, say)."
        },
    )
    l2_weight_decay: bool = field(
        default=False, metadata={"help": "Make weight decay a part of the gradient, as in Adam."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights, as the Hub names it (apache-2.0, cc-by-4.0, other ..)."},
    )
    data_license: str | None = field(default=None, metadata={"help": "Licence of the training data, in words."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train low-rank adapters of this rank, and nothing else."}
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "What the adapters add is scaled by this over lora_rank (by default the same as lora_rank)."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_mlp: bool = field(default=False, metadata={"help": "Put adapters beside feed-forward layers, too."})
    train_fully: list[str] | None = field(
        default=None, metadata={"help": "Parts of the model that are trained whole beside the adapters."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train all but the backbone."})
    # The library takes true and false here, too, which its own annotations leave out.
    resume_from_checkpoint: str | bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Continue from this checkpoint, or from the newest in output_dir (true or last)."},
    )
    fsdp: str | bool | None = field(  # type: ignore[assignment]
        default=None, metadata=TrainingArguments.__dataclass_fields__["fsdp"].metadata
    )

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better one; the best step is kept."},
    )
    keep_resamplings: bool = field(
        default=False,
        metadata={"help": "Write the resamplings of the scores, too, by which crossval pools runs."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Take a few steps, say what the run needs, and write nothing."},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace the run that output_dir holds: its checkpoints now, its model at the end."},
    )

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(
                "output_dir is empty: expected the folder to write; name one, or leave it out for runs/pertstate"
            )
        self._check_meaning()
        self._check_numbers()
        cells = self.cells_per_batch
        if cells is not None and cells != "auto" and not (isinstance(cells, int) and cells >= 1):
            raise ValueError(f"cells_per_batch must be at least 1, or auto, found {cells!r}")
        if self.cells_on_device not in (True, False, "auto"):
            raise ValueError(f"cells_on_device must be true, false or auto, found {self.cells_on_device!r}")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = EVALUATED
        self._set_direction()
        by_time = self.logging_steps is None
        if by_time:
            self.logging_steps = 1
        super().__post_init__()
        if by_time:
            self.logging_steps = None
        if self.cells_on_device == "auto" and not self.keeps_cells_on_device:
            # What it became is what a checkpoint says.
            self.cells_on_device = False
        check_reporting(self.report_to)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: a CPU does not train in float16; leave it out, or use bf16")
        if self.l2_weight_decay and self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"l2_weight_decay turns AdamW into Adam, found optim={self.optim.value!r}; use optim: adamw_torch, or "
                "l2_weight_decay: false"
            )
        if self.lr_decay_epochs is not None:
            if not 0 < self.lr_decay_epochs < math.inf:
                raise ValueError(f"lr_decay_epochs must be above 0, found {self.lr_decay_epochs}; null is no decay")
            if self.lr_scheduler_type != "constant":
                raise ValueError(
                    f"lr_decay_epochs={self.lr_decay_epochs} decays a constant learning rate, found lr_scheduler_type="
                    f"{self.lr_scheduler_type.value!r}; set one of them: lr_decay_epochs: null, or lr_scheduler_type: constant"
                )
        elif self.lr_decay_factor != type(self).lr_decay_factor:
            raise ValueError(
                f"lr_decay_factor={self.lr_decay_factor} has no effect without lr_decay_epochs; set it too"
            )
        if not 0 < self.lr_decay_factor <= 1:
            raise ValueError(f"lr_decay_factor must lie in (0, 1], found {self.lr_decay_factor}")
        if self.license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", self.license):
            raise ValueError(
                f"license={self.license!r}: expected an identifier of https://huggingface.co/docs/hub/repositories-licenses "
                "such as apache-2.0 or cc-by-4.0; use other for one that is not there"
            )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} keeps the best step and needs load_best_model_at_end, found "
                "false; set it, with an eval_strategy, or leave early_stopping_patience out"
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} would push states of the optimiser, which are pickles; set "
                "every_save (each checkpoint's model) or end (the last alone)"
            )
        if self.average_decay is not None and (self.fsdp or self.deepspeed):
            raise ValueError(
                f"average_decay={self.average_decay}: each process holds a part of the weights with fsdp or deepspeed, which are "
                "not averaged; leave average_decay out"
            )
        if self.cells_on_device is True and (self.dataloader_num_workers or self.n_gpu > 1):
            found = f"{self.dataloader_num_workers} dataloader workers and {self.n_gpu} devices of one process"
            raise ValueError(
                f"cells_on_device=true: batches are made on the one device of each process, without workers; found {found}; leave "
                "dataloader_num_workers out, and start one process for each device (accelerate launch)"
            )
        if self.bf16_weights and (
            not self.bf16 or self.world_size > 1 or self.n_gpu > 1 or self.fsdp or self.deepspeed
        ):
            raise ValueError(
                f"bf16_weights: expected bf16: true and one process with one device, found bf16={self.bf16}, {self.world_size} "
                f"processes and {self.n_gpu} devices of one; set bf16: true, or leave bf16_weights out"
            )
        self._check_lora()

    def to_json_string(self) -> str:
        """
        As it is saved beside the weights: without tokens, and of every path of this machine the last part. JSON has no NaN
        and no infinity; they are texts.
        """
        content = public(self.to_dict())
        for name in ("output_dir", "resume_from_checkpoint"):
            if isinstance(content[name], str):
                content[name] = os.path.basename(os.path.normpath(content[name]))
        return json.dumps(_as_json(content), indent=2)

    def cells_of_batch(self, set_size: int) -> int:
        """The most cells of a batch, for sentences of up to `set_size` cells; only with `cells_per_batch`."""
        if self.cells_per_batch == "auto":
            return set_size * self.train_batch_size
        return int(given("cells_per_batch", self.cells_per_batch))

    @property
    def keeps_cells_on_device(self) -> bool:
        """Whether batches are made on the device."""
        if self.cells_on_device == "auto":
            return self.device.type == "cuda" and self.n_gpu <= 1 and not self.dataloader_num_workers
        return self.cells_on_device

    def _check_meaning(self):
        """ValueError if an argument is set that has no meaning here."""
        for one in fields(self):
            if one.name in WITHOUT_MEANING and (value := getattr(self, one.name)) not in (one.default, None, "no", []):
                raise ValueError(f"{one.name}={value!r} has no meaning here: {WITHOUT_MEANING[one.name]}; leave it out")
        if self.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise ValueError(
                f"ddp_backend={self.ddp_backend!r} is for several processes, found one; leave it out, or start them with "
                "accelerate launch"
            )

    def _set_direction(self):
        """Say whether more is better of `metric_for_best_model`. The library takes every name without "loss" to be so."""
        from pertstate.evaluation.metrics import CHEAP, HIGHER_IS_BETTER, METRICS  # the help of a run does without

        name = (self.metric_for_best_model or "").removeprefix("eval_")
        if name in CHEAP and name not in HIGHER_IS_BETTER:
            known = ", ".join(f"eval_{of}" for of in ("loss", *METRICS))
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model!r}: the best {name} is that of the real cells, neither the "
                f"highest nor the lowest; take one of {known}"
            )
        if name in HIGHER_IS_BETTER:
            if self.greater_is_better not in (None, HIGHER_IS_BETTER[name]):
                raise ValueError(
                    f"greater_is_better={self.greater_is_better}, but of {name} the {'highest' if HIGHER_IS_BETTER[name] else 'lowest'} "
                    "is best; leave greater_is_better out"
                )
            self.greater_is_better = HIGHER_IS_BETTER[name]

    def _check_numbers(self):
        for name, (holds, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {expected}, found {value}")

    def _check_lora(self):
        options = ("lora_alpha", "lora_dropout", "lora_mlp", "train_fully")
        if self.lora_rank is None:
            idle = [name for name in options if getattr(self, name)]
            if idle:
                raise ValueError(f"{', '.join(idle)}: no effect without lora_rank; set it, or leave them out")
            return
        if isinstance(self.train_fully, str):
            self.train_fully = [self.train_fully]
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, found {self.lora_rank}; null trains the model itself")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be above 0, found {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), found {self.lora_dropout}")
        if self.freeze_backbone:
            raise ValueError(
                "freeze_backbone=true: with lora_rank the backbone is frozen already; leave one of them out"
            )


def _as_json(value):
    if isinstance(value, dict):
        return {name: _as_json(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_as_json(of) for of in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
