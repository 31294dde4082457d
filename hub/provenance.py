"""What a run was trained on, so that another can tell whether they hold the same: files, stores and streams."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from pertstate.base.hub_errors import on_the_hub
from pertstate.base.hub_names import is_repository, split_revision
from pertstate.data.arguments import StreamArguments
from pertstate.data.manifest import Manifest, files_of, sha256_of
from pertstate.data.splits import Splits
from pertstate.data.stores import MAY_LACK, read_manifest
from pertstate.data.streams import dataset_name, files_of_stream, manifest_of


if TYPE_CHECKING:
    from pertstate.training.run_config import RunConfig


@dataclass(frozen=True)
class Source:
    """
    Something that cells were read from.

    Args:
        name (`str`): last part of a file's path, which is all of it that is anybody's business, or a name on the Hub.
        what (`str`): what it is, in words.
        dataset (`str`, *optional*): the dataset whose cells it holds.
        sha256 (`str`, *optional*): of the file, of all files of a `.zarr` in order, or of a store's `store.json`.
        commit (`str`, *optional*): of a data set on the Hub.
    """

    name: str
    what: str
    dataset: str | None = None
    sha256: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Provenance:
    """
    The data of a run.

    Args:
        datasets (`list[str]`): names of the datasets.
        sources (`list[Source]`): what they were read from.
        splits ([`Splits`], *optional*): what the run's TOML file holds out.
    """

    datasets: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    splits: Splits | None = None

    @classmethod
    def of_run(cls, run: "RunConfig") -> "Provenance":
        """Look at what the run reads; every file that it reads whole is hashed.

        Raises:
            FileNotFoundError, ValueError, OSError: the data are not there, or damaged.
        """
        data = run.data
        if run.stream.path is not None or data.store is not None:
            datasets, sources = _of_stream(run.stream) if run.stream.path is not None else _of_store(data.store)
            return cls(datasets, sources, None if data.splits is None else Splits.from_toml(data.splits, datasets))
        splits = None if data.splits is None else Splits.from_toml(data.splits)
        files = data.files() if splits is None else splits.datasets
        sources = [
            Source(path.name, "file of the dataset", name, sha256_of(files_of(path)))
            for name, paths in files.items()
            for path in paths
        ]
        return cls(list(files), sources, splits)


def _of_store(name: str) -> tuple[list[str], list[Source]]:
    manifest, commit = read_manifest(name)
    return manifest.vocabularies["dataset"], _with_its_files(split_revision(name)[0], manifest, commit)


def _with_its_files(name: str, manifest: Manifest, commit: str | None) -> list[Source]:
    """A store, and what it was made of."""
    made_of = [
        Source(Path(source["path"]).name, "which the store was made of", sha256=source.get("sha256"))
        for source in manifest.sources
    ]
    return [Source(name if commit else Path(name).name, "cell store", sha256=manifest.sha256, commit=commit), *made_of]


def _of_stream(stream: StreamArguments) -> tuple[list[str], list[Source]]:
    manifest, commit = manifest_of(stream), None
    if is_repository(stream.path):
        with on_the_hub(stream.path, MAY_LACK):
            commit = HfApi().dataset_info(stream.path, revision=stream.revision).sha
    if manifest is not None:
        return manifest.vocabularies["dataset"], _with_its_files(stream.path, manifest, commit)
    if commit is not None:
        return [dataset_name(stream)], [Source(stream.path, "data set that was streamed", commit=commit)]
    files = files_of_stream(stream)
    size = sum(file.stat().st_size for file in files)
    streamed = f"{len(files)} streamed parquet files, {size:,} bytes, not hashed"
    return [dataset_name(stream)], [Source(Path(stream.path).name, streamed)]
