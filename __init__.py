"""
Models of how cells respond to perturbations, trained, shared and loaded the Hugging Face way.

Nothing heavy is imported before it is used.
"""

from importlib import import_module

from pertstate._version import __version__
from pertstate.families import FAMILIES, auto_classes, objective_for, public_classes


# Public name to the module that has it.
_PLACES: dict[str, str] = {
    **dict(public_classes()),
    "PerturbationFeatures": "pertstate.base.vocabulary",
    "PerturbationOutput": "pertstate.base.modeling_perturbation",
    "SentenceDataset": "pertstate.data.sentences",
    "Splits": "pertstate.data.splits",
    "StateProcessor": "pertstate.processing",
    "StateTrainer": "pertstate.training.trainer",
    "StateTrainingArguments": "pertstate.training.arguments",
    "evaluate": "pertstate.evaluation.comparison",
    "predict": "pertstate.evaluation.prediction",
}

__all__ = ["FAMILIES", "__version__", "objective_for", *_PLACES]


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto_classes.register()
