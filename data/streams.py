"""Streams of cells: local parquet, cell stores and data sets on the Hub, read without a copy on disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi, HfFileSystem

from pertstate.base.constants import Values
from pertstate.base.hub_errors import on_the_hub
from pertstate.base.hub_names import is_repository
from pertstate.data.arguments import StreamArguments
from pertstate.data.manifest import (
    EMBEDDING,
    GENE_IDS,
    GENE_VALUES,
    STORE_FILE,
    TOTAL,
    Manifest,
)
from pertstate.data.reading import expand_paths
from pertstate.data.stores import MAY_LACK
from pertstate.data.stream_reading import CellStream, StreamColumns, read_gene_names


def open_stream(
    arguments: StreamArguments, contexts: list[str] | None = None, others: Iterable[str] = ()
) -> CellStream:
    """
    The stream that a run names.

    Args:
        contexts (`list[str]`, *optional*): use only the cells of these contexts.
        others (`Iterable[str]`): further columns that are read, of a stream that is no store.

    Raises:
        FileNotFoundError, KeyError, ValueError: there is no such stream, or the run does not say what its columns are.
    """
    manifest = manifest_of(arguments)
    files = _files(arguments, manifest) if not is_repository(path_of(arguments)) else None
    columns = _columns(arguments, manifest, list(others))
    genes: list[str] | dict[int, str] | None = None
    if manifest is not None:
        genes = manifest.genes if columns.gene_ids is not None else None
    elif columns.gene_ids is not None:
        if arguments.gene_names is None:
            raise ValueError("stream: name the file that gives each gene id its name, with gene_names")
        genes = read_gene_names(arguments.gene_names, arguments.gene_id_column, arguments.gene_name_column)
    return CellStream(
        _load(arguments, files, columns.names),
        columns,
        genes,
        name=dataset_name(arguments),
        contexts=contexts,
        block_size=arguments.block_size,
    )


def path_of(arguments: StreamArguments) -> str:
    """
    The path of a stream, or its name on the Hub.

    Raises:
        ValueError: the arguments name none.
    """
    if arguments.path is None:
        raise ValueError("stream: expected a path, found none; name what is streamed")
    return arguments.path


def dataset_name(arguments: StreamArguments) -> str:
    """The dataset of a stream's cells, if no column says it: the last part of the stream's path."""
    name = Path(path_of(arguments)).name
    return Path(name).stem if name.endswith((".parquet", ".arrow")) else name


def datasets_of(arguments: StreamArguments) -> list[str]:
    """The names of the datasets whose cells a stream holds."""
    manifest = manifest_of(arguments)
    return [dataset_name(arguments)] if manifest is None else manifest.vocabularies["dataset"]


def files_of_stream(arguments: StreamArguments) -> list[Path]:
    """The local parquet files of a stream that is no store."""
    path = Path(path_of(arguments))
    return expand_paths(path / "*.parquet" if path.is_dir() else path)


def manifest_of(arguments: StreamArguments) -> Manifest | None:
    """The manifest of a stream that is a cell store; None for other data."""
    name = path_of(arguments)
    if not is_repository(name):
        path = Path(name) / STORE_FILE
        return Manifest.from_file(path) if path.is_file() else None
    with on_the_hub(name, MAY_LACK):
        if STORE_FILE not in HfApi().list_repo_files(name, repo_type="dataset", revision=arguments.revision):
            return None
        at = f"@{arguments.revision}" if arguments.revision else ""
        text = HfFileSystem().read_text(f"datasets/{name}{at}/{STORE_FILE}", encoding="utf-8")
    return Manifest.from_text(text, f"{name}/{STORE_FILE}")


def _columns(arguments: StreamArguments, manifest: Manifest | None, others: list[str]) -> StreamColumns:
    if manifest is None:
        if not arguments.columns:
            raise ValueError(
                f"stream: {arguments.path} is no cell store; say which column holds what with columns, e.g. {{perturbation: "
                "drug, context: cell_line_id, gene_ids: genes, gene_values: expressions, marker: -2}"
            )
        fields = set(StreamColumns.__dataclass_fields__) - {
            "dataset",
            "others",
        }  # without a store, a stream is one dataset
        unknown = sorted(set(arguments.columns) - set(fields))
        if unknown:
            raise ValueError(f"stream.columns: unknown {unknown}; expected some of {sorted(fields)}")
        return StreamColumns(**arguments.columns, others=others)
    if arguments.columns or arguments.gene_names:
        raise ValueError(
            f"stream: {arguments.path} is a cell store, whose columns are known; leave columns and gene_names out"
        )
    if manifest.layout == "dense" and manifest.expression is not None:
        raise ValueError(f"stream: {arguments.path} holds dense expression; stream a sparse store, or use data.store")
    sparse = manifest.expression is not None
    return StreamColumns(
        dataset="dataset",
        perturbation="perturbation",
        context="context",
        batch="batch" if "batch" in manifest.groups else None,
        gene_ids=GENE_IDS if sparse else None,
        gene_values=GENE_VALUES if sparse else None,
        total=TOTAL if manifest.expression in Values.RAW else None,
        embedding=EMBEDDING if manifest.embedding_dim is not None else None,
    )


def _files(arguments: StreamArguments, manifest: Manifest | None) -> list[str]:
    if manifest is not None:
        return [str(Path(path_of(arguments)) / shard["file"]) for shard in manifest.shards]
    return [str(file) for file in files_of_stream(arguments)]


def _load(arguments: StreamArguments, files: list[str] | None, columns: list[str]) -> IterableDataset:
    options: dict[str, Any]
    if files is None:
        name = path_of(arguments)
        options = {"split": arguments.split, "revision": arguments.revision, "streaming": True}
        with on_the_hub(name, MAY_LACK):
            return load_dataset(name, arguments.configuration, **options)
    form = "arrow" if files[0].endswith(".arrow") else "parquet"
    options = {"columns": columns} if form == "parquet" else {}  # other columns are not read at all
    return load_dataset(form, data_files=files, split="train", streaming=True, **options)
