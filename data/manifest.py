"""The description of a cell store, `store.json`, and the names of the columns of its files."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd

from pertstate._version import __version__
from pertstate.base.bounded_text import LARGEST_TABLES, parse_json, read_text
from pertstate.base.cell_source import GROUP_KEYS, with_rows
from pertstate.base.constants import Normalize, Values
from pertstate.base.files import whole_file
from pertstate.base.finite import within_reach
from pertstate.base.processor_files import fits_reading, fits_scale
from pertstate.base.public import public


STORE_FILE = "store.json"
FORMAT_VERSION = 1

# Columns of the Arrow files. Expression is sparse (two list columns: the arrays of a CSR matrix) or dense.
GENE_IDS, GENE_VALUES, EXPRESSION = "gene_ids", "gene_values", "expression"
EMBEDDING, TOTAL, BARCODE, OBS = "embedding", "total", "barcode", "obs_"

_COUNTS = ("uint8", "uint16", "uint32")
# The fields that hold names of the data, by which cells are read. All other texts are for people; paths are removed from them.
_NAMES = ("genes", "reading", "vocabularies", "groups", "shards")


@dataclass
class Manifest:
    """
    What a store holds; `store.json`.

    Args:
        cells (`int`): number of cells.
        genes (`list[str]`): names of the genes, in the order of the gene ids.
        reading (`dict`): how the files were read: `perturbation_key`, `control`, `context_key`, `batch_key`, `input`,
            `gene_input` and `combination_separator`, see [`StateProcessor`].
        expression (`str`, *optional*): what the expression is, `"counts"` or `"log1p"`; None if there is none.
        layout (`str`): `"sparse"` or `"dense"` expression.
        dtype (`str`): type of the expression values, or of the embedding if there is no expression.
        embedding_dim (`int`, *optional*): dimensions of the embedding.
        normalize (`str`), target_sum (`float`): what a model's processor does with the expression by default.
        vocabularies (`dict[str, list[str]]`): the names of `dataset`, `context`, `perturbation` and `batch`.
        groups (`dict[str, list[int]]`): the groups in order: their codes in these vocabularies, `offset` (of the first
            cell) and `length`.
        shards (`list[dict]`): `file`, `cells`, `bytes` and `sha256` of each Arrow file, in order.
        sources (`list[dict]`): `dataset`, `path` (without its folders), `bytes`, `sha256`, `cells` (taken from it) and `genes`
            of each file.
        scale (`dict`, *optional*): what log1p values sum to, see [`StateProcessor`].
        highly_variable (`int`, *optional*): how many highly variable genes were chosen.
        notes (`list[str]`): what was left out, and why.
        format_version (`int`), pertstate_version (`str`): of the layout, and of the package that wrote the store.
    """

    cells: int
    genes: list[str]
    reading: dict
    expression: str | None
    layout: str
    dtype: str
    embedding_dim: int | None
    normalize: str
    target_sum: float
    vocabularies: dict[str, list[str]]
    groups: dict[str, list[int]]
    shards: list[dict]
    sources: list[dict]
    highly_variable: int | None = None
    scale: dict | None = None
    notes: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    pertstate_version: str = __version__

    @classmethod
    def from_file(cls, path: Path) -> "Manifest":
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or of a later version.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.parent} is no cell store: it has no {path.name} (looked from {Path.cwd()}); make one with "
                "`pertstate prepare`"
            )
        return cls.from_text(read_text(path, LARGEST_TABLES), path)

    @classmethod
    def from_text(cls, text: str, path: str | os.PathLike) -> "Manifest":
        """The manifest in a text; `path` is named in errors."""
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is not a whole JSON file ({error}); prepare the store again") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"{path} is of format {version}, this version reads up to {FORMAT_VERSION}; update pertstate"
            )
        names = set(cls.__dataclass_fields__)
        if version is None or not names - {"scale"} <= set(content) <= names:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: expected the fields {sorted(names)}, found {found}; prepare the store again")
        manifest = cls(**content)
        wrong = manifest._wrong_fields()
        if wrong:
            raise ValueError(
                f"{path}: these fields are damaged or contradict one another: {wrong}; prepare the store again"
            )
        return manifest

    def _wrong_fields(self) -> list[str]:
        """Names of the fields that hold what `pertstate prepare` never writes."""
        fits = {
            "cells": _is_count(self.cells, 1),
            "genes": _is_list(self.genes, str) and len(set(self.genes)) == len(self.genes),
            "reading": isinstance(self.reading, dict) and fits_reading(self.reading),
            "expression": self.expression in (None, *Values.RAW, Values.LOG1P),
            "layout": self.layout in ("sparse", "dense"),
            "dtype": self.dtype in (_COUNTS if self.expression == Values.COUNTS else ("float32", "float16")),
            "embedding_dim": self.embedding_dim is None or _is_count(self.embedding_dim, 1),
            "normalize": self.normalize in (Normalize.NONE, Normalize.COUNTS_TO_LOG1P),
            "target_sum": type(self.target_sum) in (int, float) and within_reach(self.target_sum),
            "vocabularies": isinstance(self.vocabularies, dict)
            and {*GROUP_KEYS} - {"batch"} <= set(self.vocabularies) <= {*GROUP_KEYS}
            and all(_is_list(known, str) and known == sorted(set(known)) for known in self.vocabularies.values()),
            "shards": _is_list(self.shards, dict) and all(map(_is_shard, self.shards)),
            "sources": _is_list(self.sources, dict) and all(map(_is_source, self.sources)),
            "highly_variable": self.highly_variable is None or _is_count(self.highly_variable, 1),
            "scale": self.scale is None or fits_scale(self.scale),
            "notes": _is_list(self.notes, str),
            "pertstate_version": isinstance(self.pertstate_version, str),
        }
        fits["groups"] = fits["vocabularies"] and self._groups_fit()
        return [name for name, fit in fits.items() if not fit]

    def _groups_fit(self) -> bool:
        """Whether the groups follow one another in order, each stands once, and all codes are those of known names."""
        keys, groups = [name for name in GROUP_KEYS if name in self.vocabularies], self.groups
        if not isinstance(groups, dict) or set(groups) != {*keys, "offset", "length"}:
            return False
        if not all(_is_list(column, int) for column in groups.values()) or len(set(map(len, groups.values()))) > 1:
            return False
        codes = list(zip(*(groups[name] for name in keys)))
        known = all(0 <= code < len(self.vocabularies[name]) for name in keys for code in groups[name])
        lengths = np.array(groups["length"], dtype=object)  # any number that JSON may hold
        follow = groups["offset"] == (np.cumsum(lengths) - lengths).tolist()
        return (
            known
            and follow
            and min(lengths, default=0) > 0
            and sum(lengths) < 2**63
            and all(a < b for a, b in zip(codes, codes[1:]))
        )

    def write(self, path: Path):
        """Write the JSON file, whole or not at all."""
        with whole_file(path) as partial:
            partial.write_text(self._text, encoding="utf-8")

    @property
    def _text(self) -> str:
        content = {name: value if name in _NAMES else public(value) for name, value in asdict(self).items()}
        return json.dumps(content, ensure_ascii=False, indent=1)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file that [`Manifest.write`] writes. That file holds the SHA-256 of every file of the store."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def group_table(self) -> pd.DataFrame:
        """The groups with names, `start` and `stop`, as in [`Cells`].

        Raises:
            ValueError: the groups do not add up to the cells.
        """
        keys = [name for name in GROUP_KEYS if name in self.groups]
        columns = {name: np.array(self.vocabularies[name], dtype=object)[self.groups[name]] for name in keys}
        table = with_rows(pd.DataFrame(columns), np.array(self.groups["length"], dtype=np.int64))
        in_shards = sum(shard["cells"] for shard in self.shards)
        if int(table["stop"].iloc[-1]) != self.cells or in_shards != self.cells:
            raise ValueError(
                f"{STORE_FILE}: {self.cells} cells, but the groups hold {int(table['stop'].iloc[-1])} and the shards "
                f"{in_shards}; prepare the store again"
            )
        return table


def _is_count(value, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_list(value, of: type) -> bool:
    return type(value) is list and all(type(item) is of for item in value)


def _is_source(source: dict) -> bool:
    return (
        isinstance(source.get("path"), str)
        and "\0" not in source["path"]
        and isinstance(source.get("sha256", ""), str)
        and _is_count(source.get("cells"), 0)
    )


def _is_shard(shard: dict) -> bool:
    file = shard.get("file")
    if not isinstance(file, str) or "\0" in file:
        return False
    place = PureWindowsPath(file)  # knows the separators and drives of every system
    return (
        bool(place.name)
        and not place.anchor
        and ".." not in place.parts
        and isinstance(shard.get("sha256"), str)
        and _is_count(shard.get("cells"), 1)
        and _is_count(shard.get("bytes"), 1)
    )


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files of a folder (a `.zarr`), in order."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def sha256_of(files: Iterable[Path]) -> str:
    """One SHA-256 of some files, taken one after another; they are read block by block."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
