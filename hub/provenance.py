"""The data of a run: files, stores and streams, recorded so that others can tell whether they hold the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
from huggingface_hub import HfApi

from pertstate.base.hub_errors import on_the_hub
from pertstate.base.hub_names import is_repository, split_revision
from pertstate.data.arguments import StreamArguments
from pertstate.data.manifest import Manifest, files_of, sha256_of
from pertstate.data.splits import Splits
from pertstate.data.stores import MAY_LACK, read_manifest
from pertstate.data.streams import dataset_name, files_of_stream, manifest_of, path_of


if TYPE_CHECKING:
    from pertstate.training.run_config import RunConfig


@dataclass(frozen=True)
class Source:
    """
    Something that cells were read from.

    Args:
        name (`str`): the last part of a file's path, without the folders, which are private; or a name on the Hub.
        what (`str`): what it is, in words.
        dataset (`str`, *optional*): the dataset whose cells it holds.
        sha256 (`str`, *optional*): the hash of the file, of all files of a `.zarr` in order, or of a store's `store.json`.
        commit (`str`, *optional*): the commit of a data set on the Hub.
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
        sources (`list[Source]`): the files, stores and streams that they were read from.
        splits ([`Splits`], *optional*): what is held out, if the run has a TOML file that says so.
        notes (`list[str]`): sentences that say what was left out of the data.
    """

    datasets: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    splits: Splits | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_run(cls, run: "RunConfig", notes: Sequence[str] = ()) -> "Provenance":
        """
        Find out what a run reads. Every file is hashed, except the parquet files of a stream.

        Args:
            run ([`RunConfig`]): the run.
            notes (sequence of `str`): sentences that say what was left out of the data.

        Raises:
            FileNotFoundError, ValueError, OSError: the data are missing or damaged.
        """
        data = run.data
        found = None
        if run.stream.path is not None:
            found = _of_stream(run.stream)
        elif data.store is not None:
            found = _of_store(data.store)
        if found is not None:
            return cls(*found, None if data.splits is None else Splits.from_toml(data.splits, found[0]), list(notes))
        splits = None if data.splits is None else Splits.from_toml(data.splits)
        files = data.files() if splits is None else splits.datasets
        sources = [
            Source("AnnData", "object in memory, not hashed", name)
            if isinstance(path, ad.AnnData)
            else Source(path.name, "file of the dataset", name, sha256_of(files_of(path)))
            for name, paths in files.items()
            for path in paths
        ]
        return cls(list(files), sources, splits, list(notes))


def _of_store(name: str) -> tuple[list[str], list[Source]]:
    manifest, commit = read_manifest(name)
    return manifest.vocabularies["dataset"], _with_its_files(split_revision(name)[0], manifest, commit)


def _with_its_files(name: str, manifest: Manifest, commit: str | None) -> list[Source]:
    """A store, and the files that it was made of."""
    made_of = [
        Source(Path(source["path"]).name, "which the store was made of", sha256=source.get("sha256"))
        for source in manifest.sources
    ]
    return [Source(name if commit else Path(name).name, "cell store", sha256=manifest.sha256, commit=commit), *made_of]


def _of_stream(stream: StreamArguments) -> tuple[list[str], list[Source]]:
    name, manifest, commit = path_of(stream), manifest_of(stream), None
    if is_repository(name):
        with on_the_hub(name, MAY_LACK):
            commit = HfApi().dataset_info(name, revision=stream.revision).sha
    if manifest is not None:
        return manifest.vocabularies["dataset"], _with_its_files(name, manifest, commit)
    if commit is not None:
        return [dataset_name(stream)], [Source(name, "data set that was streamed", commit=commit)]
    files = files_of_stream(stream)
    size = sum(file.stat().st_size for file in files)
    streamed = f"{len(files)} streamed parquet files, {size:,} bytes, not hashed"
    return [dataset_name(stream)], [Source(Path(name).name, streamed)]
