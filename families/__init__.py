"""The families of models. Each is a folder here and a line of the list below. A family is imported when it is first used."""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pertstate.base.configuration_perturbation import PerturbationConfig
    from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
    from pertstate.losses.objective import Objective


class Family:
    """
    Where the parts of a family are. The folder `families/NAME` holds `configuration_NAME.py`, `modeling_NAME.py`,
    `objective_NAME.py` and `card.md`, the text of the model card about the family.

    Args:
        name (`str`): of the folder and the modules.
        prefix (`str`): of the classes: `{prefix}Config`, `{prefix}ForPerturbation`, `{prefix}Objective`.
        at_root (`bool`): config and model are at the root of the package, not in the folder.
    """

    def __init__(self, name: str, prefix: str, at_root: bool = False):
        self.name = name
        self.prefix = prefix
        self.at_root = at_root

    @property
    def model_type(self) -> str:
        """The family's name in a `config.json`."""
        return self.name if self.at_root else "state-" + self.name.replace("_", "-")

    @property
    def places(self) -> dict[str, str]:
        """The module of each public class."""
        folder = "pertstate" if self.at_root else f"pertstate.families.{self.name}"
        return {
            f"{self.prefix}Config": f"{folder}.configuration_{self.name}",
            f"{self.prefix}ForPerturbation": f"{folder}.modeling_{self.name}",
        }

    @property
    def config(self) -> "type[PerturbationConfig]":
        """The class of its configs."""
        return self._load(f"{self.prefix}Config")

    @property
    def model(self) -> "type[PerturbationPreTrainedModel]":
        """The class of its models."""
        return self._load(f"{self.prefix}ForPerturbation")

    @property
    def objective(self) -> "type[Objective]":
        """The class of the objective that trains its models."""
        module = import_module(f"pertstate.families.{self.name}.objective_{self.name}")
        return getattr(module, f"{self.prefix}Objective")

    @property
    def card(self) -> str:
        """The text of the model card about the family, in Markdown."""
        with open(os.path.join(os.path.dirname(__file__), self.name, "card.md"), encoding="utf-8") as file:
            return file.read().strip()

    def _load(self, name: str):
        return getattr(import_module(self.places[name]), name)


# One line a family.
_FAMILIES = (
    Family("state", "State", at_root=True),
    Family("embed_sum", "EmbedSum"),
    Family("neural_ot", "NeuralOT"),
    Family("pseudobulk", "Pseudobulk"),
    Family("decoder_only", "DecoderOnly"),
    Family("cpa", "CPA"),
    Family("scvi", "SCVI"),
    Family("perturbation_mean", "PerturbationMean"),
    Family("log_fold_change", "LogFoldChange"),
    Family("context_mean", "ContextMean"),
    Family("linear", "Linear"),
    Family("additive", "Additive"),
    Family("scgpt", "ScGPT"),
)

# Every family, by the `model_type` of its config.
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}


def public_classes() -> Iterator[tuple[str, str]]:
    """The name and the module of each config and model."""
    for family in _FAMILIES:
        yield from family.places.items()


def objective_for(config: "PerturbationConfig") -> "Objective":
    """
    The objective that trains a model of this config. `objective(outputs, batch)` returns named scalar terms; `"loss"` is
    their weighted sum.

    Raises:
        ValueError: no family has this `model_type`.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"no objective trains model_type {config.model_type!r}; expected one of {list(FAMILIES)}")
    return FAMILIES[config.model_type].objective(config)
