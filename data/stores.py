"""Cell stores as parquet, the form in which the Hub keeps and serves data sets."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, hf_hub_download

from pertstate.base.hub_errors import on_the_hub
from pertstate.base.hub_names import is_repository, split_revision
from pertstate.base.markdown import as_code, as_text
from pertstate.base.outputs import Kind, claimed_folder, whole_folder
from pertstate.base.public import public
from pertstate.data.manifest import STORE_FILE, Manifest, sha256_of
from pertstate.data.store import CellStore


CELLS_OF_ROW_GROUP = 4096
# What may be missing on the Hub, in the words of errors.
MAY_LACK = f"data set, revision or {STORE_FILE}"

_CARD = """---
tags:
- pertstate
- single-cell
- perturbation
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# {title}

{cells:,} cells in {groups:,} groups of data set, context, perturbation and batch, made with pertstate {version}.
{holds}

```python
from pertstate.data.stores import open_store

store = open_store({quoted})  # or in a run: --store NAME
```

{load} gives one row for each cell. `{store_file}` holds the gene names, the groups and the
normalisation.
{notes}"""


def open_store(name: str | os.PathLike) -> CellStore:
    """
    Open a cell store: a folder that `pertstate prepare` wrote, a folder of parquet ([`write_parquet`]), or a data set on
    the Hub, `"user/name"` or `"user/name@revision"`. Parquet is turned into Arrow once, in the cache of `datasets`.

    Raises:
        FileNotFoundError, ValueError: there is no store, or it is not whole.
        PermissionError, OSError: see [`on_the_hub`].
    """
    path = Path(name)
    manifest, commit = read_manifest(name)
    if commit is None:
        if all(shard["file"].endswith(".arrow") for shard in manifest.shards):
            return CellStore(path)
        files = [path / shard["file"] for shard in manifest.shards]
        for file, shard in zip(files, manifest.shards):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file, but {STORE_FILE} names it; copy the store again")
            if file.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{file}: expected {shard['bytes']:,} bytes, found {file.stat().st_size:,}; copy the store again"
                )
        try:
            cells = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        except (DatasetsError, pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as parquet ({error.__cause__ or error}); copy the store again"
            ) from error
    else:
        with on_the_hub(str(name), MAY_LACK):
            cells = load_dataset(split_revision(name)[0], revision=commit, split="train")
    return CellStore.of_files(path, manifest, [Path(file["filename"]) for file in cells.cache_files])


def read_manifest(name: str | os.PathLike) -> tuple[Manifest, str | None]:
    """
    The manifest of a store and, if the store is on the Hub, the commit that its name stands for now.

    Raises:
        FileNotFoundError, ValueError, PermissionError, OSError: see [`open_store`].
    """
    repository, revision = split_revision(name)
    if not is_repository(repository):
        return Manifest.from_file(Path(name) / STORE_FILE), None
    with on_the_hub(str(name), MAY_LACK):
        commit = HfApi().dataset_info(repository, revision=revision).sha
        file = hf_hub_download(repository, STORE_FILE, repo_type="dataset", revision=commit)
    return Manifest.from_file(Path(file)), commit


# What such a folder consists of.
_PARQUET = Kind("data set", (STORE_FILE,), lambda name: name in (STORE_FILE, "data", "README.md"))


def write_parquet(store: CellStore, folder: str | os.PathLike, name: str = "user/name", overwrite: bool = False):
    """
    Write a store as a folder that can be pushed to the Hub: `data/*.parquet`, `store.json` (without the folders that the
    files were in) and a card. `datasets.load_dataset(folder)` reads it, with streaming or without.

    Args:
        folder: the folder to write, whole or not at all.
        name (`str`): of the data set on the Hub, for the card.
        overwrite (`bool`): replace a data set that is there.

    Raises:
        FileExistsError, InUseError: see [`claimed_folder`].
        OSError: the disk is full; the output is as it was.
    """
    with claimed_folder(folder, _PARQUET, overwrite), whole_folder(folder, _PARQUET) as partial:
        _write_parquet(store, partial, name)


def _write_parquet(store: CellStore, folder: Path, name: str):
    (folder / "data").mkdir()
    shards = []
    for shard, batches in zip(store.manifest.shards, store.batches_of_shards()):
        file = f"data/{Path(shard['file']).stem.replace('data-', 'train-')}.parquet"
        table = pa.Table.from_batches(batches)
        for i, column in enumerate(table.schema):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(i, column.name, table[i].cast(column.type.value_type))
        pq.write_table(table, folder / file, row_group_size=CELLS_OF_ROW_GROUP, compression="zstd")
        written = folder / file
        shards.append(
            {"file": file, "cells": shard["cells"], "bytes": written.stat().st_size, "sha256": sha256_of([written])}
        )
    replace(store.manifest, shards=shards).write(folder / STORE_FILE)
    (folder / "README.md").write_text(_card(store, name), encoding="utf-8")


def _card(store: CellStore, name: str) -> str:
    manifest = store.manifest
    holds = []
    if manifest.expression is not None:
        holds.append(f"Expression of {len(manifest.genes):,} genes: {manifest.expression}.")
    if manifest.embedding_dim is not None:
        holds.append(f"An embedding of {manifest.embedding_dim} dimensions.")
    return _CARD.format(
        title=as_code(name.split("/")[-1]),
        cells=manifest.cells,
        groups=len(store.groups),
        version=as_text(manifest.pertstate_version),
        holds=" ".join(holds),
        quoted=json.dumps(public(name)),
        load=as_code(f"datasets.load_dataset({json.dumps(public(name))})"),
        store_file=STORE_FILE,
        notes="".join(f"\n- {as_text(note)}" for note in manifest.notes),
    )


def push_store(
    store: CellStore, name: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """
    Push a store to a data set repository on the Hub, in one commit.

    Args:
        name (`str`): `"user/name"`; the repository is made if it does not exist.
        private (`bool`, *optional*), revision (`str`, *optional*), token (`str`, *optional*): as in `huggingface_hub`.

    Returns:
        `str`: the commit, to pin as `"user/name@commit"`.

    Raises:
        FileNotFoundError, PermissionError, OSError: the Hub refuses; the repository stays as it was.
    """
    api = HfApi(token=token)
    with on_the_hub(name, MAY_LACK), tempfile.TemporaryDirectory() as folder:
        api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        write_parquet(store, Path(folder) / "store", name)
        commit = api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=Path(folder) / "store",
            revision=revision,
            commit_message=f"{store.manifest.cells:,} cells",
            delete_patterns=["data/*"],
        )
    return commit.oid
