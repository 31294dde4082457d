"""Checkpoints on the Hub: checked before they are pushed, pushed in one commit, fetched as one commit."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from cellstate import FAMILIES
from cellstate._version import __version__
from cellstate.configuration_state import PerturbationConfig, closest
from cellstate.hub.card import is_repository, render_card, with_repository
from cellstate.hub.errors import on_the_hub
from cellstate.processing import StateProcessor
from cellstate.vocabulary import PERTURBATION_FEATURES_FILE, VOCABULARY_FILE


CONFIG, PROCESSOR, WEIGHTS, CARD = "config.json", "processor_config.json", "model.safetensors", "README.md"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHTS_INDEX = WEIGHTS + ".index.json"
_ARGUMENTS = "training_args.json"
# What a checkpoint on the Hub is made of, all of it at the top; a push takes away what it no longer holds.
_OWN = (CONFIG, ADAPTER, PROCESSOR, VOCABULARY_FILE, CARD, _ARGUMENTS, "*.safetensors", _WEIGHTS_INDEX, "*.py")
_MAY_LACK = "model or revision"


def push_checkpoint(
    folder: str | os.PathLike,
    name: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """
    Push a checkpoint folder to the Hub in one commit: config, weights, code, processor, vocabulary and card.
    Checkpoints of steps, optimiser states and any other file of the folder stay where they are.

    Args:
        folder: what [`StateTrainer`] or `save_pretrained` wrote, an adapter too. Where a whole model has no card, one is
            written for the push.
        name (`str`): `"user/name"`; made where it does not exist.
        private (`bool`, *optional*): of a repository that is made here. True is refused for one that is public.
        revision (`str`, *optional*): branch, `main` by default; made where it does not exist.
        token (`str`, *optional*): by default that of `hf auth login`.
        message (`str`, *optional*): of the commit.

    Returns:
        `CommitInfo`: its `oid` is the commit to pin.

    Raises:
        FileNotFoundError, ValueError: the folder is no whole checkpoint; `revision` is a commit or a tag; a private
            repository is asked for and there is a public one. Nothing was sent.
        PermissionError, OSError: the Hub refuses, cannot be reached, or somebody else pushed at the same time. What was
            there stays as it was.
    """
    folder = Path(folder)
    files, text = _read_to_push(folder)
    branch = constants.DEFAULT_REVISION if revision is None else revision
    if constants.REGEX_COMMIT_OID.fullmatch(branch):
        raise ValueError(f"revision={branch!r} is a commit, which does not change; name a branch to push to")
    api = HfApi(token=token)
    with on_the_hub(name, _MAY_LACK):
        repository = ensure_repository(api, name, private)
        refs = api.list_repo_refs(repository)
        if branch in {tag.name for tag in refs.tags}:
            raise ValueError(f"revision={branch!r} is a tag of {repository}, which stays where it is; name a branch")
        if branch not in {known.name for known in refs.branches}:
            api.create_branch(repository, branch=branch, exist_ok=True)
        head = api.model_info(repository, revision=branch)
        there = [sibling.rfilename for sibling in head.siblings]
        gone = [path for path in there if path not in {*files, CARD} and any(fnmatch(path, own) for own in _OWN)]
        operations = [
            CommitOperationAdd(CARD, with_repository(text, repository).encode()),
            *(CommitOperationAdd(file, folder / file) for file in files),
            *(CommitOperationDelete(path) for path in gone if "/" not in path),
        ]
        # Of two pushes that meet, the second is refused: unchanged files are not sent, so that they could mix.
        return api.create_commit(
            repository,
            operations,
            commit_message=message or f"{folder.resolve().name}, with cellstate {__version__}",
            revision=branch,
            parent_commit=head.sha,
        )


def ensure_repository(api: HfApi, name: str, private: bool | None) -> str:
    """
    The full id of a model repository, which is made where it does not exist; to be used in [`on_the_hub`].

    Raises:
        ValueError: a private repository is asked for, and there is a public one.
    """
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repository).private:
        raise ValueError(
            f"{repository}: expected a private repository, found a public one; make it private in its settings, or push "
            "without asking for a private one"
        )
    return repository


def address_of(commit: CommitInfo) -> str:
    """Where the files of a commit can be seen."""
    return f"{commit.repo_url}/tree/{commit.oid}"


def fetch_checkpoint(name: str, revision: str | None = None) -> Path:
    """
    The folder of a checkpoint on the Hub, downloaded once: all files of one commit, which is the folder's name. Without
    network, or with `HF_HUB_OFFLINE`, the cache answers.

    Raises:
        FileNotFoundError, PermissionError, OSError: see [`on_the_hub`].
    """
    with on_the_hub(name if revision is None else f"{name}@{revision}", _MAY_LACK):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_OWN)))


def _read_to_push(folder: Path) -> tuple[list[str], str]:
    """The names of the files to push, the card left out, and the text of the card."""
    if (folder / ADAPTER).is_file():
        _require(folder, CARD)
        return _read_adapter(folder), (folder / CARD).read_text(encoding="utf-8")
    config, processor, files = read_checkpoint(folder)
    card = folder / CARD
    return files, card.read_text(encoding="utf-8") if card.is_file() else render_card(None, config, processor)


def _read_adapter(folder: Path) -> list[str]:
    """The files of an adapter, whose base model others can load too."""
    base = _read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not is_repository(base):
        raise ValueError(
            f"{folder / ADAPTER}: expected a base model on the Hub, found {base!r}, which others cannot load; push the base "
            "model and train on it by that name, or merge the adapter into it (cellstate merge)"
        )
    _tensors_in(folder, ADAPTER_WEIGHTS)
    _, files = _read_processor(folder)
    return [ADAPTER, ADAPTER_WEIGHTS, *files]


def read_checkpoint(folder: str | os.PathLike) -> tuple[PerturbationConfig, StateProcessor, list[str]]:
    """
    Config, processor and the names of the files of a whole checkpoint folder, the card left out.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: the files are damaged, or disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder (looked from {Path.cwd()})")
    _require(folder, CONFIG)
    content = _read_json(folder / CONFIG)
    model_type = content.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{folder / CONFIG}: model_type={model_type!r} is no family; {closest(model_type, FAMILIES)}")
    processor, files = _read_processor(folder)
    config = FAMILIES[model_type].config_class.from_pretrained(folder)
    files = [CONFIG, *_weights_of(folder, config), *files]
    return config, processor, files + [name for name in _code_of(folder, CONFIG) if name not in files]


def _read_processor(folder: Path) -> tuple[StateProcessor, list[str]]:
    """The processor, and the names of what belongs to it: its own files, its code, the arguments of a training."""
    for name in (PROCESSOR, VOCABULARY_FILE):
        _require(folder, name)
    code = _code_of(folder, PROCESSOR)
    processor = StateProcessor.from_pretrained(folder)
    files = [PROCESSOR, VOCABULARY_FILE, *code]
    if processor.perturbation_features is not None:
        files.append(PERTURBATION_FEATURES_FILE)
    return processor, files + [name for name in (_ARGUMENTS,) if (folder / name).is_file()]


def _weights_of(folder: Path, config: PerturbationConfig) -> list[str]:
    """The weight files, whose headers hold each tensor of the model, and no other, in its shape."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / _WEIGHTS_INDEX).is_file():
        names = sorted(set(_read_json(folder / _WEIGHTS_INDEX)["weight_map"].values()))
    found = {}
    for name in names:
        found |= _tensors_in(folder, name)
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{folder}: the weights are not those of its {CONFIG}: {len(wrong)} tensors differ, {wrong[0]!r} being "
            f"expected of shape {expected.get(wrong[0])}, found {found.get(wrong[0])}; save both from one model"
        )
    return names if names == [WEIGHTS] else [_WEIGHTS_INDEX, *names]


def _tensors_in(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file, which is as long as its header says."""
    _require(folder, name)
    try:
        with safe_open(folder / name, framework="pt") as file:
            return {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{folder / name} is not a whole safetensors file ({error}); save it again") from error


def _code_of(folder: Path, settings: str) -> list[str]:
    """The files of the classes that a JSON file names as its code, and of the modules that they import with one dot."""
    classes = _read_json(folder / settings).get("auto_map")
    if not classes:
        raise ValueError(
            f"{folder / settings}: expected auto_map, which names the code that others load, found none; save the model and "
            "the processor again with save_pretrained"
        )
    waiting, files = sorted({name.rpartition("--")[2].split(".")[0] for name in classes.values()}), []
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in files:
            _require(folder, name)
            files.append(name)
            waiting += get_relative_imports(folder / name)
    return files


def _require(folder: Path, name: str):
    if os.path.basename(name) != name or not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} is no whole checkpoint: expected the file {name!r} in it, found none; save model and processor there "
            "with save_pretrained, or finish the run that writes it"
        )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a whole JSON file ({error}); save the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields, found {type(content).__name__}; save the checkpoint again")
    return content
