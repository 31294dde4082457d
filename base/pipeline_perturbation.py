"""The pipeline `perturbation-prediction` of transformers: control cells and perturbations in, predicted cells out."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pipelines.base import ChunkPipeline

from .constants import CELL_MASK
from .messages import closest


# Control cells of the perturbations that are prepared together take at most so many bytes.
_TOGETHER = 1 << 27
_SENTENCES = 8  # in one forward pass


@dataclass
class Prepared:
    """Sentences of control cells. transformers moves tensors that it finds in dictionaries, and would lose their names."""

    sentences: Any


class PerturbationPredictionPipeline(ChunkPipeline):
    r"""
    Predicts how control cells look under perturbations.

    ```python
    pipe = transformers.pipeline("perturbation-prediction", model="runs/screen", trust_remote_code=True)
    predicted = pipe("controls.h5ad", perturbation=["STAT1", "KLF1+MAP2K6"], context="k562")
    ```

    Called with an `AnnData` or the path of one and `perturbation=`, it returns an `AnnData` laid out as
    [`StateProcessor.decode`] says. Called with several experiments, a list of dictionaries of `adata`, `perturbation`, `context`
    and `dose` or a `DataFrame` with these columns, it returns a list of them; what all have in common may be an argument.

    Args of a call:
        perturbation (`str` or `list[str]`): names, `"A+B"` for a combination; `"all"` for every single perturbation that the
            model was trained on.
        context (`str` or `list[str]`, *optional*): these contexts, all of the data by default.
        dose (`float` or `list[float]`, *optional*): each perturbation at each of these doses, for a model that knows doses.
        adata (`AnnData` or path, *optional*): the cells of experiments that do not name theirs.
        cells_per_perturbation (`int`, *optional*): at most so many control cells of each context, drawn with `seed`.
        seed (`int`, defaults to 0): of this draw, and of the order in which cells are put into sentences.
        batch_size (`int`, defaults to 8): sentences in one forward pass.
        missing_genes, input, convert_scale, obs_columns: see [`StateProcessor.__call__`].

    Any of them may also be given to `transformers.pipeline`.

    Raises:
        KeyError, ValueError, TypeError: see [`StateProcessor.__call__`] and [`Experiments.experiments`].
    """

    processor: Any
    model: Any
    _batch_size: int | None
    _preprocess_params: dict[str, Any]
    # transformers loads the processor, and looks for no part of another kind.
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _of_experiment = ("adata", "perturbation", "context", "dose")
    _of_cells = ("cells_per_perturbation", "seed", "missing_genes", "input", "convert_scale", "obs_columns")

    def __init__(self, model, processor=None, **kwargs):
        if processor is None:
            raise ValueError("expected the processor of the model's checkpoint, found none; pass processor=")
        if model.is_ceiling:
            raise ValueError(
                "this model decodes observed cells (the ceiling of decoding), and predicts none from control cells"
            )
        super().__init__(model, processor=processor, **kwargs)
        self.model.eval()

    def __call__(self, inputs, perturbation=None, **kwargs):
        """Predicted cells, an `AnnData` or a list of them; see the class."""
        batch_size = kwargs.pop("batch_size", self._batch_size) or _SENTENCES
        if perturbation is not None:
            kwargs["perturbation"] = perturbation
        asked = {**self._preprocess_params, **self._sanitize_parameters(**kwargs)[0]}
        defaults = {name: asked.pop(name) for name in self._of_experiment if name in asked}
        experiments, several = self.processor.experiments(inputs, defaults)
        found = [
            self.run_single({**experiment, "options": asked}, {}, {"batch_size": batch_size}, {})
            for experiment in experiments
        ]
        return found if several else found[0]

    def _sanitize_parameters(self, **kwargs):
        known = (*self._of_experiment, *self._of_cells)
        for name in kwargs:
            if name not in known:
                raise TypeError(f"this pipeline takes no {name!r}; {closest(name, known)}")
        return kwargs, {}, {}

    def preprocess(self, input_, **preprocess_parameters) -> Any:
        """The sentences of an experiment, some perturbations at a time."""
        options = {"seed": 0, **input_["options"]}
        at_most = options.pop("cells_per_perturbation", None)
        names = self.processor.named(input_["perturbation"], input_.get("dose"))
        with self.processor.control_cells(input_["adata"], input_.get("context"), at_most, options["seed"]) as (
            adata,
            cells,
        ):
            together = max(1, _TOGETHER // max(1, cells * self.processor.feature_dim * 4))
            for start in range(0, len(names), together):
                part = names[start : start + together]
                yield Prepared(self.processor(adata, part, context=input_.get("context"), **options))

    def _forward(self, input_tensors, **forward_parameters):
        """Predicted cells of some sentences."""
        sentences, batch_size = input_tensors.sentences, forward_parameters["batch_size"]
        parts = []
        for start in range(0, len(sentences[CELL_MASK]), batch_size):
            batch = {key: value[start : start + batch_size].to(self.device) for key, value in sentences.items()}
            parts.append(self.model(**batch))
        made = {
            name: None
            if getattr(parts[0], name) is None
            else torch.cat([getattr(part, name).float().cpu() for part in parts])
            for name in ("predictions", "gene_predictions")
        }
        return Prepared(self.processor.decode(type(parts[0])(**made), sentences))

    def postprocess(self, model_outputs, **postprocess_parameters):
        """All predicted cells of an experiment, one `AnnData`."""
        return self.processor.joined([part.sentences for part in model_outputs])

    def save_pretrained(self, save_directory, **kwargs):
        """Save model and processor, with all of their code."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["PerturbationPredictionPipeline"]
