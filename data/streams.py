"""Streams of cells: local parquet, cell stores and data sets on the Hub, read without a copy on disk."""

from pathlib import Path

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


def open_stream(arguments: StreamArguments, contexts: list[str] | None = None) -> CellStream:
    """
    The stream that a run names.

    Args:
        contexts (`list[str]`, *optional*): use the cells of these contexts alone.

    Raises:
        FileNotFoundError, KeyError, ValueError: there is no such stream, or it is not said what its columns are.
    """
    manifest = manifest_of(arguments)
    files = _files(arguments, manifest) if not is_repository(arguments.path) else None
    columns, genes = _columns(arguments, manifest), None
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


def dataset_name(arguments: StreamArguments) -> str:
    """What the stream's cells are called where no column says their dataset: the last part of its path."""
    name = Path(arguments.path).name
    return Path(name).stem if name.endswith((".parquet", ".arrow")) else name


def datasets_of(arguments: StreamArguments) -> list[str]:
    """The datasets whose cells the stream holds."""
    manifest = manifest_of(arguments)
    return [dataset_name(arguments)] if manifest is None else manifest.vocabularies["dataset"]


def files_of_stream(arguments: StreamArguments) -> list[Path]:
    """The local parquet files of a stream that is no store."""
    path = Path(arguments.path)
    return expand_paths(path / "*.parquet" if path.is_dir() else path)


def manifest_of(arguments: StreamArguments) -> Manifest | None:
    """That of a cell store; None for other data."""
    if not is_repository(arguments.path):
        path = Path(arguments.path) / STORE_FILE
        return Manifest.from_file(path) if path.is_file() else None
    with on_the_hub(arguments.path, MAY_LACK):
        if STORE_FILE not in HfApi().list_repo_files(arguments.path, repo_type="dataset", revision=arguments.revision):
            return None
        at = f"@{arguments.revision}" if arguments.revision else ""
        text = HfFileSystem().read_text(f"datasets/{arguments.path}{at}/{STORE_FILE}", encoding="utf-8")
    return Manifest.from_text(text, f"{arguments.path}/{STORE_FILE}")


def _columns(arguments: StreamArguments, manifest: Manifest | None) -> StreamColumns:
    if manifest is None:
        if not arguments.columns:
            raise ValueError(
                f"stream: {arguments.path} is no cell store; say which column holds what with columns, e.g. {{perturbation: "
                "drug, context: cell_line_id, gene_ids: genes, gene_values: expressions, marker: -2}"
            )
        fields = set(StreamColumns.__dataclass_fields__) - {"dataset"}  # a stream that is no store is one data set
        unknown = sorted(set(arguments.columns) - set(fields))
        if unknown:
            raise ValueError(f"stream.columns: unknown {unknown}; expected some of {sorted(fields)}")
        return StreamColumns(**arguments.columns)
    if arguments.columns or arguments.gene_names:
        raise ValueError(
            f"stream: {arguments.path} is a cell store, whose columns are known; leave columns and gene_names out"
        )
    if manifest.layout == "dense" and manifest.expression is not None:
        raise ValueError(
            f"stream: {arguments.path} holds dense expression; stream a store that is sparse, or use data.store"
        )
    sparse = manifest.expression is not None
    return StreamColumns(
        dataset="dataset",
        perturbation="perturbation",
        context="context",
        batch="batch" if "batch" in manifest.groups else None,
        gene_ids=GENE_IDS if sparse else None,
        gene_values=GENE_VALUES if sparse else None,
        total=TOTAL if manifest.expression == Values.COUNTS else None,
        embedding=EMBEDDING if manifest.embedding_dim is not None else None,
    )


def _files(arguments: StreamArguments, manifest: Manifest | None) -> list[str]:
    if manifest is not None:
        return [str(Path(arguments.path) / shard["file"]) for shard in manifest.shards]
    return [str(file) for file in files_of_stream(arguments)]


def _load(arguments: StreamArguments, files: list[str] | None, columns: list[str]) -> IterableDataset:
    if files is None:
        options = {"split": arguments.split, "revision": arguments.revision, "streaming": True}
        with on_the_hub(arguments.path, MAY_LACK):
            return load_dataset(arguments.path, arguments.configuration, **options)
    form = "arrow" if files[0].endswith(".arrow") else "parquet"
    options = {"columns": columns} if form == "parquet" else {}  # other columns are not read at all
    return load_dataset(form, data_files=files, split="train", streaming=True, **options)
