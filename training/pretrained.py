"""A run that starts from a checkpoint: its config, its processor, and what the run may change in them."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import cached_file, extract_commit_hash

from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.constants import Normalize, Values
from pertstate.base.modeling_finetuning import VocabularyChange
from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.base.processor_files import READING
from pertstate.base.vocabulary import Vocabulary
from pertstate.data.arguments import DataArguments
from pertstate.data.coexpression import COEXPRESSION
from pertstate.data.perturbation_features import read_perturbation_features
from pertstate.families import FAMILIES
from pertstate.hub.checkpoints import adapter_config, check_family, check_name
from pertstate.hub.publish import ADAPTER_KEY, MODEL_KEY
from pertstate.hub.unchanged import check_unchanged, state_of
from pertstate.processing import StateProcessor


# Fields of the model section that name a checkpoint.
NAMING = ("pretrained", "pretrained_revision")


@dataclass(frozen=True)
class Pretrained:
    """
    A checkpoint that training starts from.

    Args:
        name (`str`): folder, or repository on the Hub.
        revision (`str`, *optional*): commit of the repository.
        config ([`PerturbationConfig`]): of the checkpoint.
        processor ([`StateProcessor`]): of the checkpoint.
        state (`dict`): which files its folder held; see [`state_of`].
    """

    name: str
    revision: str | None
    config: PerturbationConfig
    processor: StateProcessor
    state: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, section: dict) -> "Pretrained | None":
        """
        The checkpoint that a model section names. None where it names none, or names a folder of weights that others
        published.

        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, it is an adapter, or its family is not trained by
                steps.
        """
        if section.get("pretrained") is None or is_published(section):
            return None
        name, revision = _named(section)
        state = state_of(name)
        config = config_of(section)
        # On the Hub, the commit and not the branch, which may move on while the run is under way, or before its adapter is
        # used.
        revision = extract_commit_hash(cached_file(name, MODEL_KEY, revision=revision), None)
        return cls(name, revision, config, StateProcessor.from_pretrained(name, revision=revision), state)

    def config_for(self, section: dict) -> PerturbationConfig:
        """
        The checkpoint's config, with the options of training that a model section sets
        ([`PerturbationConfig.training_fields`]).

        Raises:
            ValueError: the section sets another family, a preset, or a field to another value than the checkpoint has.
        """
        config = type(self.config).from_dict(self.config.to_dict())
        for name, value in section.items():
            if name in NAMING:
                continue
            if name == "preset":
                raise ValueError(
                    f"model.preset={value!r}: the sizes are those of the checkpoint {self.name}; leave preset out"
                )
            has = getattr(config, name)
            if name in config.training_fields:
                setattr(config, name, value)
            elif value != has:
                raise ValueError(
                    f"model.{name}={value!r} contradicts the checkpoint {self.name}, which has {has!r}; leave it out. These "
                    f"may differ: {', '.join(config.training_fields)}"
                )
        config.validate()
        return config

    def processor_for(self, data: DataArguments, given: frozenset[str], reading: dict | None = None) -> StateProcessor:
        """
        The checkpoint's processor as it reads the data of a run: what the data section leaves open is as in the checkpoint.

        Args:
            data ([`DataArguments`]), given (`frozenset[str]`): the section, and which of its fields were set.
            reading (`dict`, *optional*): how the files of a store were read, where one is.

        Raises:
            ValueError: the section contradicts the checkpoint.
        """
        own = self.processor
        asked = {name: value for name, value in data.reading.items() if name in given} if reading is None else reading
        settings = {name: asked.get(name, getattr(own, name)) for name in READING}
        self._check_data(data, given, settings)
        if data.perturbation_features not in (None, COEXPRESSION) and own.perturbation_features is not None:
            further = read_perturbation_features(data.perturbation_features)
            further.check_control(settings["control"])
            settings["perturbation_features"] = own.perturbation_features.extended(further)
        genes = data.chosen_genes()
        vocabulary = own.vocabulary.merged(Vocabulary(genes)) if isinstance(genes, list) else own.vocabulary
        return own.with_vocabulary(vocabulary, **settings)

    def _check_data(self, data: DataArguments, given: frozenset[str], reading: dict):
        own = self.processor
        wrong: dict[str, object] = {}
        if data.normalize not in (Normalize.AUTO, own.normalize):
            wrong["normalize"] = own.normalize
        if data.target_sum not in (None, own.target_sum):
            wrong["target_sum"] = own.target_sum
        if isinstance(data.genes, int):
            wrong["genes"] = f"its own {len(own.vocabulary.genes)} (a list of genes, or genes_file, changes them)"
        if data.chosen_genes() is not None and not own.vocabulary.genes:
            wrong["genes_file" if data.genes is None else "genes"] = "none, only dimensions of an embedding"
        if data.hvg_on_all:
            wrong["hvg_on_all"] = False
        if reading["input"].startswith("obsm/") != (own.values == Values.EMBEDDING):
            wrong["input"] = f"{own.input!r}, {own.values} values"
        if (reading["gene_input"] is None) != (own.gene_input is None):
            wrong["gene_input"] = own.gene_input
        if data.perturbation_features is not None and own.perturbation_features is None:
            wrong["perturbation_features"] = "perturbation ids"
        if reading["control"] != own.control and own.control in own.vocabulary.perturbations:
            wrong["control"] = f"{own.control!r}, which has weights of its own"
        for name, has in wrong.items():
            found = reading[name] if name in reading else getattr(data, name)
            raise ValueError(
                f"data.{name}={found!r} contradicts the checkpoint {self.name}, which has {has}; leave it out"
                + ("" if name in given else " (it comes from the store)")
            )

    def model_for(
        self, config: PerturbationConfig, processor: StateProcessor
    ) -> tuple[PerturbationPreTrainedModel, VocabularyChange]:
        """
        The checkpoint's model with a config of [`Pretrained.config_for`], resized to the names of a processor.

        Raises:
            ValueError: the checkpoint's folder has been replaced since the run began to read it.
        """
        model = FAMILIES[config.model_type].model.from_pretrained(
            self.name, revision=self.revision or "main", config=config, dtype=torch.float32
        )
        check_unchanged(self.name, self.state)
        model.name_or_path = self.name
        return model, model.resize_vocabulary(self.processor.vocabulary, processor.vocabulary)


def is_published(section: dict) -> bool:
    """Whether a model section names a folder of weights that others published in a form of their own."""
    name, family = section.get("pretrained"), FAMILIES.get(section.get("model_type", ""))
    if name is None or family is None or not os.path.isdir(name):
        return False
    is_ours = any(os.path.isfile(os.path.join(name, key)) for key in (MODEL_KEY, ADAPTER_KEY))
    return not is_ours and family.model.reads_published


def _named(section: dict) -> tuple[str, str | None]:
    revision = section.get("pretrained_revision")
    return str(section["pretrained"]), None if revision is None else str(revision)


def config_of(section: dict) -> PerturbationConfig:
    """The config of the checkpoint that a model section names; errors as in [`Pretrained.of`]."""
    name, revision = _named(section)
    check_name(name, "model.pretrained")
    if revision is not None and Path(name).is_dir():
        raise ValueError(
            f"model.pretrained_revision={revision!r}: only a Hub repository has revisions, and {name} is a folder; leave it out"
        )
    if adapter_config(name, revision) is not None:
        raise ValueError(
            f"model.pretrained={name!r} is an adapter ({ADAPTER_KEY}); make a checkpoint of it first: pertstate merge {name} "
            "FOLDER"
        )
    if Path(name).is_dir() and not Path(name, MODEL_KEY).is_file():
        raise FileNotFoundError(f"model.pretrained={name!r}: expected a checkpoint, found a folder without {MODEL_KEY}")
    check_family(name, revision)
    config = AutoConfig.from_pretrained(name, revision=revision)
    if FAMILIES[config.model_type].model.fitted:
        raise ValueError(
            f"model.pretrained={name!r}: {config.model_type} is fitted in one pass, there is nothing to train further; leave "
            "pretrained out and fit it on all the data"
        )
    return config
