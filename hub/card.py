"""The model card of a checkpoint: README.md, from what the run and its data say of themselves."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

from pertstate._version import __version__
from pertstate.base.cell_values import describe_reading
from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.hub_names import is_repository
from pertstate.evaluation.metrics import (
    ADDITIVE,
    METRICS,
    MODEL,
    NO_CHANGE,
    PERTURBATION_MEAN,
)
from pertstate.families import FAMILIES
from pertstate.hub.provenance import Provenance
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from pertstate.training.arguments import StateTrainingArguments
    from pertstate.training.run_config import RunConfig


CARDS = Path(__file__).parents[1] / "model_cards"
TAGS = ["single-cell", "perturbation", "pertstate", "biology"]
# Numbers of each cell in, numbers of each cell out: the nearest of the tasks that the Hub knows.
TASK = "tabular-regression"
UNKNOWN_LICENSE = "unknown"
SHOWN_NAMES = 20
# How the Hub names a metric, and how a reader does.
_METRICS = {
    "pearson": ("pearsonr", "Pearson of the mean change"),
    "mae": ("mae", "MAE of the mean"),
    "energy": ("energy-distance", "energy distance"),
}
_REPOSITORY_LINE = re.compile(r"^name, revision = .*$", re.MULTILINE)


def render_card(
    run: "RunConfig | None",
    config: PerturbationConfig,
    processor: StateProcessor,
    metrics: dict | None = None,
    state=None,
    args: "StateTrainingArguments | None" = None,
    provenance: Provenance | None = None,
) -> str:
    """
    The text of a checkpoint's README.md. Names that come from data stand in it as text, whatever they hold.

    Args:
        run ([`RunConfig`], *optional*): the run; without it the card says that it is not recorded.
        config ([`PerturbationConfig`]): of the model; the `card.md` of its family says what that computes.
        processor ([`StateProcessor`]): names and normalisation.
        metrics (`dict[str, float]`, *optional*): figures of the test split, keys `test_..`.
        state (`TrainerState`, *optional*): for the steps that were taken.
        args ([`StateTrainingArguments`], *optional*): for licences, hardware and the number of processes.
        provenance ([`Provenance`], *optional*): the data of the run, by default looked at here.
    """
    if run is not None and provenance is None:
        provenance = Provenance.of_run(run)
    folder = "checkpoint" if run is None else run.training.get("output_dir", "runs/pertstate")
    name = os.path.basename(os.path.normpath(folder))
    family = FAMILIES[type(config).model_type]
    # The weights that training started from: a folder, or a name on the Hub.
    base_model = None if run is None else run.model.get("pretrained")
    is_adapter = args is not None and args.lora_rank is not None
    license = UNKNOWN_LICENSE if args is None or args.license is None else args.license
    results = _results(metrics or {})
    data = ModelCardData(
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=TAGS,
        base_model=base_model if base_model is not None and is_repository(base_model) else None,
        datasets=[s.name for s in provenance.sources if s.commit is not None] or None if provenance else None,
        metrics=[_METRICS[metric][0] for metric in METRICS] if results else None,
        model_name=name if results else None,
        eval_results=_eval_results(results, provenance, family.model.is_ceiling) or None,
    )
    return _template().render(
        card_data=data.to_yaml(),
        model_name=name,
        folder=folder,
        config=config,
        processor=processor,
        vocabulary=processor.vocabulary,
        about=family.card,
        is_ceiling=family.model.is_ceiling,
        example=next(iter(processor.vocabulary.perturbations), processor.control),
        reads=describe_reading(processor.normalize, processor.values, processor.target_sum),
        predicts=processor.predicted_values(config.gene_dim is not None),
        license=None if license == UNKNOWN_LICENSE else license,
        data_license=None if args is None else args.data_license,
        base_model=None if base_model is None else _public_name(base_model),
        base_revision=None if run is None else run.model.get("pretrained_revision"),
        is_adapter=is_adapter,
        run=run,
        provenance=provenance,
        held_out=[] if run is None else _held_out(run, provenance),
        heldout_controls_used=run is not None
        and run.data.control_sentences
        and run.data.heldout_controls
        and not family.model.fitted,
        results=results,
        steps=_steps(config, state),
        processes=1 if args is None else args.world_size,
        hardware=None if args is None else _hardware(args),
        versions=_versions(),
        pertstate_version=__version__,
        shown=SHOWN_NAMES,
    )


def with_repository(card: str, name: str) -> str:
    """The card, its example loading the repository `name` at a commit that the reader is to fill in."""
    line = f'name, revision = {name!r}, "COMMIT"  # a commit hash of this repository, whose code you have looked at'
    return _REPOSITORY_LINE.sub(lambda _: line, card, count=1)


# Text of data in Markdown


def as_code(text: str) -> str:
    """Any text as a code span of Markdown: one line, in which nothing is markup."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # A blank inside each end is taken away by readers, where there is one at both.
    pad = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def as_names(names: list[str], shown: int = SHOWN_NAMES) -> str:
    """The first names of a list as code, and how many more there are."""
    listed = ", ".join(map(as_code, names[:shown]))
    return listed + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def as_block(text: str, language: str) -> str:
    """Any text as a fenced block that ends where the text does."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": as_code, "names": as_names, "block": as_block, "python": repr}
    return environment.get_template("template.md")


# What the sections say


def _held_out(run: "RunConfig", provenance: Provenance) -> list[str]:
    """Lines of Markdown, one for each thing that the run holds out."""
    lines = [
        f"{name.replace('_', ' ')}: {as_names(getattr(run.data, name))}"
        for name in ("test_contexts", "val_contexts", "test_perturbations", "val_perturbations")
        if getattr(run.data, name)
    ]
    if provenance.splits is not None:
        lines += [
            f"{split}: context {as_code(context)} of {as_code(dataset)}, whole"
            for (dataset, context), split in provenance.splits.zeroshot.items()
        ]
        lines += [
            f"{split}: {len(names)} perturbations of context {as_code(context)} of {as_code(dataset)}: {as_names(names)}"
            for (dataset, context), held in provenance.splits.fewshot.items()
            for split, names in held.items()
            if names
        ]
    return lines


def _results(metrics: dict) -> list[dict]:
    """The figures of the model and of each baseline that has some: a figure is None where it is undefined."""
    rows = []
    for method in (MODEL, NO_CHANGE, PERTURBATION_MEAN, ADDITIVE):
        prefix = "test_" + ("" if method == MODEL else method.replace(" ", "_") + "_")
        if f"{prefix}energy" in metrics:
            rows.append({"name": method, **{m: metrics.get(prefix + m) for m in METRICS}})
    return rows


def _eval_results(results: list[dict], provenance: Provenance | None, is_ceiling: bool) -> list[EvalResult]:
    """The same figures as the Hub shows them, the baselines' beside the model's."""
    if not results:
        return []
    names = provenance.datasets if provenance else []
    on_the_hub = [source for source in provenance.sources if source.commit is not None] if provenance else []
    # The Hub takes a name of its own, or something that looks like one.
    kind = on_the_hub[0].name if on_the_hub else re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(names)).strip("-") or "cells"
    of_model = " (a ceiling: decoded from the observed cells)" if is_ceiling else ""
    return [
        EvalResult(
            task_type=TASK,
            task_name="prediction of perturbed cells",
            dataset_type=kind[:96],
            dataset_name=", ".join(names) or "held-out cells",
            dataset_split="test",
            dataset_revision=on_the_hub[0].commit if on_the_hub else None,
            metric_type=_METRICS[metric][0],
            metric_name=_METRICS[metric][1] + (of_model if row["name"] == MODEL else f", {row['name']} (baseline)"),
            metric_value=round(row[metric], 6),
        )
        for row in results
        for metric in METRICS
        if row[metric] is not None
    ]


def _steps(config: PerturbationConfig, state) -> str:
    if FAMILIES[config.model_type].model.fitted:
        return "Fitted in one pass over the training cells, without gradient steps"
    if state is None:
        return "An unfinished run's steps"
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return f"{state.global_step} steps" + (f" in {seconds[-1]:,.0f} seconds" if seconds else "")


def _hardware(args: "StateTrainingArguments") -> str:
    device = args.device
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        kind = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a process)"
    else:
        kind = device.type
    return f"{args.world_size} x {kind}"


def _versions() -> str:
    return ", ".join(
        f"{name} {version}"
        for name, version in (
            ("pertstate", __version__),
            ("transformers", transformers.__version__),
            ("torch", torch.__version__),
            ("anndata", importlib.metadata.version("anndata")),
            ("Python", platform.python_version()),
        )
    )


def _public_name(name: str) -> str:
    return name if is_repository(name) else os.path.basename(os.path.normpath(name))
