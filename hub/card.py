"""The model card that a training run writes beside its weights."""

import importlib.metadata
import os
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from cellstate._version import __version__
from cellstate.cell_values import describe_reading
from cellstate.configuration_families import FittedConfig
from cellstate.configuration_state import PerturbationConfig
from cellstate.evaluation.metrics import ADDITIVE, METRICS, MODEL, NO_CHANGE, PERTURBATION_MEAN
from cellstate.hub.stores import on_hub
from cellstate.processing import StateProcessor
from cellstate.training.run_config import RunConfig


CARDS = Path(__file__).parents[1] / "model_cards"


def render_card(
    run: RunConfig, config: PerturbationConfig, processor: StateProcessor, metrics: dict | None = None, state=None
) -> str:
    """
    The text of a checkpoint's README.md.

    Args:
        run ([`RunConfig`]): the run, for the data and what was held out.
        config ([`PerturbationConfig`]): of the model; `model_cards/MODEL_TYPE.md` says what its family computes.
        processor ([`StateProcessor`]): names and normalisation.
        metrics (`dict[str, float]`, *optional*): figures of the test split, keys `test_..`.
        state (`TrainerState`, *optional*): for the steps that were taken.
    """
    metrics = metrics or {}
    rows = []
    for method in (MODEL, NO_CHANGE, PERTURBATION_MEAN, ADDITIVE):
        prefix = "test_" + ("" if method == MODEL else method.replace(" ", "_") + "_")
        if f"{prefix}energy" in metrics:
            figures = {m: f"{metrics[prefix + m]:.4f}" if prefix + m in metrics else "undefined" for m in METRICS}
            rows.append({"name": method, **figures})
    vocabulary = processor.vocabulary
    held = run.data.splits or ", ".join(
        f"{name.replace('_', ' ')}: {', '.join(map(str, getattr(run.data, name)))}"
        for name in ("test_contexts", "val_contexts", "test_perturbations", "val_perturbations")
        if getattr(run.data, name)
    )
    folder = run.training.get("output_dir", "runs/cellstate")
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            tags=["single-cell", "perturbation", "cellstate", "biology"],
            model_name=Path(folder).name,
        ),
        template_path=str(CARDS / "template.md"),
        model_name=Path(folder).name,
        model_type=config.model_type,
        about=(CARDS / f"{type(config).model_type}.md").read_text(encoding="utf-8").strip(),
        folder=folder,
        example=vocabulary.perturbations[0],
        processor=processor,
        reads=describe_reading(processor.normalize, processor.values, processor.target_sum),
        predicts=processor.predicted_values(config.gene_dim is not None),
        datasets=", ".join(_datasets(run)),
        features="dimensions of an embedding" if processor.values == "embedding" else "genes, " + processor.values,
        contexts=f"{len(vocabulary.contexts)}: " + ", ".join(vocabulary.contexts[:20]),
        perturbations=f"{len(vocabulary.perturbations)}: " + ", ".join(vocabulary.perturbations[:20]),
        perturbation_features=processor.perturbation_features,
        held_out=held or "nothing",
        heldout_controls="among the training sentences"
        if run.data.control_sentences and run.data.heldout_controls and not isinstance(config, FittedConfig)
        else "not used in training",
        results=rows,
        # Of a path, which is nobody's business, the last part.
        pretrained=os.path.basename(os.path.normpath(run.model["pretrained"])) if run.model.get("pretrained") else None,
        steps=_steps(config, state),
        versions=", ".join(
            f"{name} {version}"
            for name, version in (
                ("cellstate", __version__),
                ("transformers", transformers.__version__),
                ("torch", torch.__version__),
                ("anndata", importlib.metadata.version("anndata")),
            )
        ),
    )
    return card.content


def _steps(config: PerturbationConfig, state) -> str:
    if isinstance(config, FittedConfig):
        return "Fitted in one pass over the training cells, without gradient steps"
    return f"{state.global_step} steps" if state is not None else "An unfinished run's steps"


def _datasets(run: RunConfig) -> list[str]:
    """What the cells were read from: names of files and folders, or of data sets on the Hub."""
    streamed = f"{run.stream.path}@{run.stream.revision}" if run.stream.revision else run.stream.path
    named = streamed or run.data.store or run.data.datasets or run.data.splits
    names = list(named.values()) if isinstance(named, dict) else [named]
    # A name on the Hub stays whole; of a path, which is nobody's business, the last part.
    return [str(n) if on_hub(n) else os.path.basename(os.path.normpath(n)) for n in names]
