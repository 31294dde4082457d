"""Checkpoints on the Hub: checked before they are pushed, pushed in one commit, fetched as one commit."""

import os
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from transformers.dynamic_module_utils import get_relative_imports

from pertstate._version import __version__
from pertstate.base.checkpoint_files import read_header, read_json, stored_tensors
from pertstate.base.configuration_perturbation import PerturbationConfig
from pertstate.base.hub_errors import on_the_hub
from pertstate.base.hub_names import is_repository
from pertstate.base.messages import closest
from pertstate.base.public import public_text
from pertstate.base.vocabulary import PERTURBATION_FEATURES_FILE, VOCABULARY_FILE
from pertstate.data.record import RECORD_ARRAYS, RECORD_FILE
from pertstate.evaluation.report_data import SCORES_FOLDER
from pertstate.evaluation.scores import ARRAYS, SUMMARY, TABLE, Scores
from pertstate.families import FAMILIES
from pertstate.hub.card import render_card, with_repository
from pertstate.hub.public_files import public_bytes
from pertstate.hub.publish import ADAPTER_KEY, MODEL_KEY
from pertstate.hub.unchanged import check_unchanged, state_of
from pertstate.processing import StateProcessor


PROCESSOR, WEIGHTS, CARD, ADAPTER_WEIGHTS = (
    "processor_config.json",
    "model.safetensors",
    "README.md",
    "adapter_model.safetensors",
)
_WEIGHTS_INDEX = WEIGHTS + ".index.json"
_ARGUMENTS = "training_args.json"
# The files of a checkpoint on the Hub, all of them at the top. A push deletes those that the checkpoint no longer has.
_OWN = (
    MODEL_KEY,
    ADAPTER_KEY,
    PROCESSOR,
    VOCABULARY_FILE,
    CARD,
    _ARGUMENTS,
    RECORD_FILE,
    "*.safetensors",
    _WEIGHTS_INDEX,
    "*.py",
)
# Scores of the run lie in a folder of their own.
_SCORES = tuple(f"{SCORES_FOLDER}/{name}" for name in (TABLE, SUMMARY, ARRAYS))
# These files describe the checkpoint to people and to other programs. Their paths are removed before they are sent.
_RECORDS = (MODEL_KEY, _ARGUMENTS)
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
    Push a checkpoint folder to the Hub in one commit: config, weights, code, processor, vocabulary, card, and the scores of its
    run, without the single cells that these keep for pictures. Other files of the folder, such as checkpoints of steps and optimiser states, are not pushed.

    Args:
        folder: what [`StateTrainer`] or `save_pretrained` wrote, a whole model or an adapter. For a whole model without a
            card, one is written for the push.
        name (`str`): `"user/name"`; the repository is made if it does not exist.
        private (`bool`, *optional*): whether a repository that is made here is private. True is refused if there is a
            public one.
        revision (`str`, *optional*): branch, `main` by default; it is made if it does not exist.
        token (`str`, *optional*): by default that of `hf auth login`.
        message (`str`, *optional*): of the commit.

    Returns:
        `CommitInfo`: its `oid` is the commit to pin.

    Raises:
        FileNotFoundError, ValueError: the folder is no whole checkpoint; `revision` is a commit or a tag; a private
            repository is asked for and there is a public one. Nothing was sent.
        PermissionError, OSError: the Hub refuses, cannot be reached, or somebody else pushed at the same time. The
            repository stays as it was.
    """
    folder = Path(folder)
    before = state_of(folder)
    files, text = _read_to_push(folder)
    scores = _scores_to_send(folder)
    branch = constants.DEFAULT_REVISION if revision is None else revision
    if constants.REGEX_COMMIT_OID.fullmatch(branch):
        raise ValueError(f"revision={branch!r} is a commit, which does not change; name a branch to push to")
    api = HfApi(token=token)
    with on_the_hub(name, _MAY_LACK):
        repository = ensure_repository(api, name, private)
        refs = api.list_repo_refs(repository)
        if branch in {tag.name for tag in refs.tags}:
            raise ValueError(f"revision={branch!r} is a tag of {repository}, which does not move; name a branch")
        if branch not in {known.name for known in refs.branches}:
            api.create_branch(repository, branch=branch, exist_ok=True)
        head = api.model_info(repository, revision=branch)
        there = [sibling.rfilename for sibling in head.siblings or ()]
        gone = [path for path in there if path not in {*files, CARD} and any(fnmatch(path, own) for own in _OWN)]
        gone = [path for path in gone if "/" not in path]
        gone += [path for path in there if path in _SCORES and path not in scores]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(CARD, public_text(with_repository(text, repository)).encode()),
            *(CommitOperationAdd(file, _to_send(folder / file)) for file in files),
            *(CommitOperationAdd(path, content) for path, content in scores.items()),
            *(CommitOperationDelete(path) for path in gone),
        ]
        check_unchanged(folder, before)
        # This push is refused if somebody else has pushed meanwhile: unchanged files are not sent, so the two could mix.
        return api.create_commit(
            repository,
            operations,
            commit_message=message or f"{os.path.basename(os.path.realpath(folder))}, with pertstate {__version__}",
            revision=branch,
            parent_commit=head.sha,
        )


def _to_send(path: Path) -> Path | bytes:
    return public_bytes(path) if path.name in _RECORDS else path


def _scores_to_send(folder: Path) -> dict[str, bytes]:
    """
    The scores of a checkpoint's run by their paths on the Hub, empty where there are none. Real and predicted cells stay here, their
    means go along.

    Raises:
        ValueError: they are damaged.
    """
    if not (folder / SCORES_FOLDER / SUMMARY).is_file():
        return {}
    scores = Scores.load(folder / SCORES_FOLDER)
    with TemporaryDirectory(prefix="pertstate-scores-") as place:
        replace(scores, cells={}).save(place)
        return {
            path: public_bytes(Path(place, Path(path).name))
            if path.endswith(".json")
            else Path(place, Path(path).name).read_bytes()
            for path in _SCORES
        }


def ensure_repository(api: HfApi, name: str, private: bool | None) -> str:
    """
    The full id of a model repository, which is made if it does not exist. Call it within [`on_the_hub`].

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
    """The page that shows the files of a commit."""
    return f"{commit.repo_url}/tree/{commit.oid}"


def fetch_checkpoint(name: str, revision: str | None = None) -> Path:
    """
    The local folder of a checkpoint on the Hub. It holds the files of one commit, which is the folder's name, and is
    downloaded once. Without network, or with `HF_HUB_OFFLINE`, the cache is used.

    Raises:
        FileNotFoundError, PermissionError, OSError: see [`on_the_hub`].
    """
    with on_the_hub(name if revision is None else f"{name}@{revision}", _MAY_LACK):
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_OWN, *_SCORES]))


def _read_to_push(folder: Path) -> tuple[list[str], str]:
    """The names of the files to push, without the card, and the text of the card."""
    if (folder / ADAPTER_KEY).is_file():
        _require(folder, CARD)
        return _read_adapter(folder), (folder / CARD).read_text(encoding="utf-8")
    config, processor, files = read_checkpoint(folder)
    card = folder / CARD
    return files, card.read_text(encoding="utf-8") if card.is_file() else render_card(None, config, processor)


def _read_adapter(folder: Path) -> list[str]:
    """The names of the files of an adapter. ValueError if others cannot load its base model."""
    base = read_json(folder / ADAPTER_KEY).get("base_model_name_or_path")
    if not isinstance(base, str) or not is_repository(base):
        raise ValueError(
            f"{folder / ADAPTER_KEY}: expected a base model on the Hub, found {base!r}, which others cannot load; push the base "
            "model and train on it by that name, or merge the adapter into it (pertstate merge)"
        )
    _require(folder, ADAPTER_WEIGHTS)
    read_header(folder / ADAPTER_WEIGHTS)
    _, files = _read_processor(folder)
    return [ADAPTER_KEY, ADAPTER_WEIGHTS, *files]


def read_checkpoint(folder: str | os.PathLike) -> tuple[PerturbationConfig, StateProcessor, list[str]]:
    """
    The config, the processor and the names of the files of a checkpoint folder, without the card.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: the files are damaged, or contradict one another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder (looked from {Path.cwd()})")
    _require(folder, MODEL_KEY)
    content = read_json(folder / MODEL_KEY)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{folder / MODEL_KEY}: model_type={model_type!r} is no family; {closest(str(model_type), FAMILIES)}"
        )
    processor, files = _read_processor(folder)
    # The model is loaded as a check, because others will load it.
    config = FAMILIES[model_type].model.from_pretrained(folder).config
    files = [MODEL_KEY, *_weights_of(folder), *files]
    return config, processor, files + [name for name in _code_of(folder, MODEL_KEY) if name not in files]


def _read_processor(folder: Path) -> tuple[StateProcessor, list[str]]:
    """The processor and the names of its files, of its code, and of the training's arguments if they are there."""
    for name in (PROCESSOR, VOCABULARY_FILE):
        _require(folder, name)
    code = _code_of(folder, PROCESSOR)
    processor = StateProcessor.from_pretrained(folder)
    files = [PROCESSOR, VOCABULARY_FILE, *code]
    if processor.perturbation_features is not None:
        files.append(PERTURBATION_FEATURES_FILE)
    return processor, files + [n for n in (_ARGUMENTS, RECORD_FILE, RECORD_ARRAYS) if (folder / n).is_file()]


def _weights_of(folder: Path) -> list[str]:
    """The names of the weight files, and of their index if there are several."""
    names = sorted({Path(tensor.file).name for tensor in stored_tensors(folder, {}).values()})
    return names if names == [WEIGHTS] else [_WEIGHTS_INDEX, *names]


def _code_of(folder: Path, settings: str) -> list[str]:
    """The code files of the classes that a JSON file names, and of the modules that these import with one dot."""
    classes = read_json(folder / settings).get("auto_map")
    if not isinstance(classes, dict) or not all(isinstance(name, str) for name in classes.values()):
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
