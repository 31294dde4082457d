"""The model card of a checkpoint: its README.md, written from the run and its data."""

import importlib.metadata
import math
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

from pertstate._version import __version__
from pertstate.base.cell_values import describe_reading
from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.constants import TASK, Split
from pertstate.base.doses import dose_text
from pertstate.base.hub_names import is_repository
from pertstate.base.markdown import as_block, as_code
from pertstate.base.messages import counted
from pertstate.base.origin import told_from_none
from pertstate.base.printable import printable
from pertstate.base.public import last_part, public, public_text
from pertstate.data.record import RunRecord
from pertstate.evaluation.baselines import BASELINES
from pertstate.evaluation.metrics import CEILING, CEILING_MODEL, METRICS, MODEL
from pertstate.evaluation.scores import Scores
from pertstate.families import FAMILIES
from pertstate.hub.provenance import Provenance, Source
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from pertstate.training.arguments import StateTrainingArguments
    from pertstate.training.run_config import RunConfig


CARDS = Path(__file__).parents[1] / "model_cards"
TAGS = ["single-cell", "perturbation", "pertstate", "biology"]
# A row of numbers for each cell goes in and comes out. Of the tasks that the Hub lists scores of, this is the nearest.
_TASK_OF_SCORES = "tabular-regression"
UNKNOWN_LICENSE = "unknown"
SHOWN_NAMES = 20
# What the Hub calls each metric, and what the card calls it.
_METRICS = {
    "pearson": ("pearsonr", "Pearson of the mean change"),
    "mae": ("mae", "MAE of the mean"),
    "energy": ("energy-distance", "energy distance"),
}
_REPOSITORY_LINE = re.compile(r"^name, revision = .*$", re.MULTILINE)


@dataclass(frozen=True)
class Merged:
    """
    What a merged checkpoint was made of.

    Args:
        adapter, base (`str`): folder or repository of the adapter, and of the model that it was trained on.
        adapter_revision, base_revision (`str`, *optional*): their revisions.
        output (`str`): the folder of the merged checkpoint.
        license, data_license (`str`, *optional*): as the adapter's training arguments state them.
        has_arguments (`bool`): whether the merged checkpoint has these arguments.
    """

    adapter: str
    base: str
    adapter_revision: str | None
    base_revision: str | None
    output: str
    license: str | None = None
    data_license: str | None = None
    has_arguments: bool = False


def render_card(
    run: "RunConfig | None",
    config: PerturbationConfig,
    processor: StateProcessor,
    metrics: dict | None = None,
    state=None,
    args: "StateTrainingArguments | None" = None,
    provenance: Provenance | None = None,
    record: RunRecord | None = None,
    scores: Scores | None = None,
    merged: Merged | None = None,
) -> str:
    """
    The text of a checkpoint's README.md. Names from the data appear as plain text, whatever characters they hold. Only the
    last part of a path appears.

    Args:
        run ([`RunConfig`], *optional*): the run. Without it the card says that the run is not recorded.
        config ([`PerturbationConfig`]): the model's config. The card includes the `card.md` of its family.
        processor ([`StateProcessor`]): gives names and normalisation.
        metrics (`dict[str, float]`, *optional*): averages of the test split; their keys start with `test_`. Not used if
            `scores` are given.
        state (`TrainerState`, *optional*): gives the number of steps and the run time.
        args ([`StateTrainingArguments`], *optional*): gives licences, hardware and the number of processes.
        provenance ([`Provenance`], *optional*): where the run's data came from. By default it is read from `run` here.
        record ([`RunRecord`], *optional*): what the model and its ancestors were trained on.
        scores ([`Scores`], *optional*): the scores of the test split, with intervals and verdict.
        merged ([`Merged`], *optional*): the adapter and the base model that a merged checkpoint was made of. `run` is not given then;
            `record` and `scores` are those of the adapter.

    Returns:
        `str`: Markdown that begins with the metadata of the Hub as YAML.

    Raises:
        FileNotFoundError, ValueError, OSError: without `provenance`, the data of the run are missing or damaged.
    """
    if run is not None and provenance is None:
        provenance = Provenance.of_run(run)
    folder = "checkpoint" if run is None else run.training.get("output_dir", "runs/pertstate")
    if merged is not None:
        folder = merged.output
        if record is not None:
            names = list(dict.fromkeys(group.dataset for group in record.groups))
            provenance = Provenance(names, [Source(**source) for source in record.sources], None, record.notes)
    name = printable(last_part(folder))
    family = FAMILIES[type(config).model_type]
    # The weights that training started from: a folder or a repository.
    base_model = None if run is None else run.model.get("pretrained")
    if merged is not None:
        base_model = merged.base
    is_adapter = args is not None and args.lora_rank is not None
    stated = merged if merged is not None else args
    license = UNKNOWN_LICENSE if stated is None or stated.license is None else stated.license
    results = _results(metrics or {}) if scores is None else _scored(scores)
    data = ModelCardData(
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=None if is_adapter or family.model.is_ceiling else TASK,
        tags=TAGS,
        base_model=base_model if base_model is not None and is_repository(base_model) else None,
        datasets=[s.name for s in provenance.sources if s.commit is not None] or None if provenance else None,
        metrics=[_METRICS[metric][0] for metric in METRICS] if results else None,
        model_name=name if results else None,
        eval_results=_eval_results(results, provenance, family.model.is_ceiling) or None,
    )
    card = _template().render(
        card_data=data.to_yaml(),
        model_name=name,
        folder=public(folder),
        config=config,
        processor=processor,
        vocabulary=processor.vocabulary,
        about=family.card,
        is_ceiling=family.model.is_ceiling,
        dosed=[f"{name}@{dose_text(dose)}" for name, doses in (processor.doses or {}).items() for dose in doses],
        example=next(iter(processor.vocabulary.perturbations), processor.control),
        reads=describe_reading(processor.normalize, processor.values, processor.target_sum),
        predicts=processor.predicted_values(config.gene_dim is not None),
        license=None if license == UNKNOWN_LICENSE else license,
        data_license=None if stated is None else stated.data_license,
        base_model=None if base_model is None else _public_name(base_model),
        base_revision=merged.base_revision if merged else None if run is None else run.model.get("pretrained_revision"),
        merged=merged,
        adapter=None if merged is None else _public_name(merged.adapter),
        recorded=record is not None,
        has_arguments=merged is not None and merged.has_arguments,
        is_adapter=is_adapter,
        run=run,
        provenance=provenance,
        held_out=_held_out_of_record(record) if run is None else _held_out(run, provenance, record),
        seen_before=[] if record is None else _seen_before(record),
        change_tests=None if record is None or not record.change_tests else told_from_none(record.change_tests),
        verdict=None if scores is None else scores.verdict,
        score_notes=[] if scores is None else scores.notes,
        heldout_controls_used=run is not None
        and run.data.control_sentences
        and run.data.heldout_controls
        and not family.model.fitted,
        results=results,
        steps=_steps(config, state),
        processes=1 if args is None else args.world_size,
        hardware=None if args is None else hardware_of(args),
        versions=_versions(),
        pertstate_version=__version__,
        homepage=homepage(),
        shown=SHOWN_NAMES,
    )
    # Paths are removed from the whole text, because any field may hold one.
    return public_text(card)


def with_repository(card: str, name: str) -> str:
    """The card with an example that loads the repository `name`, at a commit that the reader fills in."""
    line = f'name, revision = {name!r}, "COMMIT"  # hash of a commit of this repository whose code you have read'
    return _REPOSITORY_LINE.sub(lambda _: line, card, count=1)


def homepage() -> str | None:
    """
    The address of this project's page: `Homepage` under `[project.urls]` in the pyproject.toml of the installed build.
    None if the build names no page, or if the package runs from a folder that was not installed.
    """
    build = next(iter(importlib.metadata.distributions(name="pertstate")), None)
    urls = [] if build is None else build.metadata.get_all("Project-URL", [])
    return next((url.partition(", ")[2] for url in urls if url.startswith("Homepage, ")), None)


# Text from data in Markdown


def as_names(names: list[str], shown: int = SHOWN_NAMES) -> str:
    """The first names of a list as code spans, and the number of names that are left out."""
    listed = ", ".join(map(as_code, names[:shown]))
    return listed + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


@cache
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


def _held_out(run: "RunConfig", provenance: Provenance | None, record: RunRecord | None) -> list[str]:
    """What the run holds out, and what it chose to hold out by itself: lines of Markdown."""
    lines = [
        f"{name.replace('_', ' ')}: {as_names(getattr(run.data, name))}"
        for name in ("test_contexts", "val_contexts", "test_perturbations", "val_perturbations")
        if getattr(run.data, name)
    ]
    if provenance is not None and provenance.splits is not None:
        lines += [
            f"{split}: context {as_code(context)} of {as_code(dataset)}, whole"
            for (dataset, context), split in provenance.splits.zeroshot.items()
        ]
        lines += [
            f"{split}: {counted(len(names), 'perturbation')} of context {as_code(context)} of {as_code(dataset)}: {as_names(names)}"
            for (dataset, context), held in provenance.splits.fewshot.items()
            for split, names in held.items()
            if names
        ]
    if not any(line.startswith(Split.VAL) for line in lines):
        lines += _held_out_of_record(record, [Split.VAL])
    return lines


def _held_out_of_record(record: RunRecord | None, splits: Iterable[str] = (Split.TEST, Split.VAL)) -> list[str]:
    """What a record holds out in some splits: lines of Markdown."""
    if record is None:
        return []
    lines = []
    for split in splits:
        held = [f"{group.context} / {group.perturbation}" for group in record.of_split(split)]
        if held:
            lines.append(f"{split}: {counted(len(held), 'group')}: {as_names(held)}")
    return lines


def _results(metrics: dict) -> list[dict]:
    """The scores of the model and of each baseline that was scored. A score that is undefined is None."""
    rows: list[dict] = []
    for method in (MODEL, *BASELINES, CEILING):
        prefix = "test_" + ("" if method == MODEL else method.replace(" ", "_") + "_")
        if f"{prefix}energy" in metrics:
            rows.append({"name": method, **{m: _finite(metrics.get(prefix + m)) for m in METRICS}, "intervals": {}})
    return rows


def _scored(scores: Scores) -> list[dict]:
    """The averages of scores, and their intervals as text."""
    rows: dict[str, dict] = {}
    for row in scores.averages.to_dict("records"):
        method = MODEL if row["method"] == CEILING_MODEL else row["method"]
        found = rows.setdefault(method, {"name": method, **dict.fromkeys(METRICS), "intervals": {}})
        found[row["metric"]] = _finite(row["value"])
        if math.isfinite(row["low"]):
            found["intervals"][row["metric"]] = f" [{row['low']:.4f}, {row['high']:.4f}]"
    return list(rows.values())


def _seen_before(record: RunRecord) -> list[str]:
    """The groups that this run holds out, but that earlier checkpoints were trained on: lines of Markdown."""
    held = [group for split in (Split.TEST, Split.VAL) for group in record.of_split(split)]
    lines = []
    for ancestor in record.ancestors:
        if ancestor.groups is None:
            lines.append(f"{as_code(ancestor.name)} has no record: it may have been trained on what is held out here")
            continue
        known = {(group.context, group.perturbation) for group in ancestor.groups}
        seen = sorted({f"{g.context} / {g.perturbation}" for g in held if (g.context, g.perturbation) in known})
        if seen:
            lines.append(
                f"{as_code(ancestor.name)} was trained on {len(seen)} of the held-out groups: {as_names(seen)}"
            )
    return lines


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None


def _eval_results(results: list[dict], provenance: Provenance | None, is_ceiling: bool) -> list[EvalResult]:
    """The scores of the model and of the baselines, as metadata that the Hub shows."""
    if not results:
        return []
    names = provenance.datasets if provenance else []
    on_the_hub = [source for source in provenance.sources if source.commit is not None] if provenance else []
    # The Hub expects the name of a data set here. Without one, it expects only characters that such a name may have.
    kind = on_the_hub[0].name if on_the_hub else re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(names)).strip("-") or "cells"
    of_model = " (a ceiling: decoded from the observed cells)" if is_ceiling else ""
    return [
        EvalResult(
            task_type=_TASK_OF_SCORES,
            task_name="prediction of perturbed cells",
            dataset_type=kind[:96],
            dataset_name=printable(public(", ".join(names))) or "held-out cells",
            dataset_split="test",
            dataset_revision=on_the_hub[0].commit if on_the_hub else None,
            metric_type=_METRICS[metric][0],
            metric_name=_METRICS[metric][1]
            + (
                of_model
                if row["name"] == MODEL
                else f", {row['name']} (no model)"
                if row["name"] == CEILING
                else f", {row['name']} (baseline)"
            ),
            metric_value=round(row[metric], 6),
        )
        for row in results
        for metric in METRICS
        if row[metric] is not None
    ]


def _steps(config: PerturbationConfig, state) -> str:
    """How long the model was trained, as the start of a sentence."""
    if FAMILIES[config.model_type].model.fitted:
        return "Fitted in one pass over the training cells, without gradient steps"
    if state is None:
        return "Still in training when this card was written"
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return f"Trained for {state.global_step} steps" + (f" in {seconds[-1]:,.0f} seconds" if seconds else "")


def hardware_of(args: "StateTrainingArguments") -> str:
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
    return name if is_repository(name) else last_part(name)
