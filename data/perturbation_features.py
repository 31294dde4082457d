"""Reading perturbation features (protein embeddings, chemical fingerprints, ..) from a file with a vector for each name."""

import csv
import io
import lzma
import math
import os
import tokenize
import zipfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from pertstate.base.bounded_text import parse_json
from pertstate.base.messages import some
from pertstate.base.tables import name_of_cell
from pertstate.base.vocabulary import (
    FEATURES_TENSOR,
    NAMES_METADATA,
    PerturbationFeatures,
    as_array,
    names_of,
)
from pertstate.data.restricted_pickle import StoredArray, StoredTensor, read_pickled
from pertstate.data.self_contained import check_room


def read_perturbation_features(path: str | os.PathLike) -> PerturbationFeatures:
    """
    Read the vectors of perturbations from a file.

    - `.safetensors`: a tensor (P,) for each name; or, as in a checkpoint, the tensor `features` (N, P) with a JSON list of
      the N names in the metadata, under `names`.
    - `.npz`: an array (P,) for each name; or the two arrays `names` (N,) and `features` (N, P). No pickled objects.
    - `.csv`: a header row, then one row for each name: the name and P numbers.
    - `.pt`: a dictionary of a tensor (P,) for each name. Nothing that the file names is run.
    - `.parquet`: one column (or index) of names, and P columns of numbers, or one column of lists of P numbers.

    Args:
        path: the file. The ending of its name says which of these it is.

    Raises:
        FileNotFoundError, PermissionError: there is no such file, or this user may not read it.
        ValueError: the file has another ending, is not whole or is laid out in another way; a value is not a finite
            number; the widths differ; a name stands twice or is blank.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: expected perturbation features in a file that ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of perturbation features (looked from {Path.cwd()})")
    with open(path, "rb"):
        pass  # this user may read it; some libraries say of a file that they may not read that it is damaged
    try:
        names, vectors = _READERS[path.suffix](path)
        return PerturbationFeatures(names, vectors)
    except (
        SafetensorError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        OSError,
        csv.Error,
    ) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file ({error}); copy or write it again") from error
    except ValueError as error:
        # UnicodeDecodeError, pyarrow's ArrowInvalid and numpy's errors are ValueErrors too.
        raise ValueError(f"{path}: {error}") from error


def _stack(vectors: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """The names, and the matrix of their vectors."""
    if not vectors:
        raise ValueError("expected a vector for each perturbation, found none")
    for name, vector in vectors.items():
        if vector.ndim != 1:
            raise ValueError(f"expected a vector (P,) for each name, found shape {vector.shape} for {name!r}")
    names = list(vectors)
    _check_widths(names, [len(vector) for vector in vectors.values()])
    return names, np.stack(list(vectors.values()))


def _check_widths(names: list[str], widths):
    for name, width in zip(names, widths):
        if width != widths[0]:
            raise ValueError(
                f"expected vectors of one width, found {widths[0]} numbers for {names[0]!r} and {width} for {name!r}"
            )


def _read_safetensors(path: Path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if NAMES_METADATA in metadata:
            if list(file.keys()) != [FEATURES_TENSOR]:
                raise ValueError(
                    f"with {NAMES_METADATA!r} in the metadata, expected the tensor {FEATURES_TENSOR!r} alone, found "
                    f"{some(file.keys())}"
                )
            return names_of(metadata), as_array(file.get_tensor(FEATURES_TENSOR))
        return _stack({name: as_array(file.get_tensor(name)) for name in file.keys()})


def _read_npz(path: Path):
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("a name stands twice in it; keep one vector of each")
        check_room(sum(info.file_size for info in members.values()), size, "it")
        arrays = {name: _read_array(archive, info) for name, info in members.items()}
    if arrays.keys() == {NAMES_METADATA, FEATURES_TENSOR} and arrays[NAMES_METADATA].dtype.kind == "U":
        return arrays[NAMES_METADATA].tolist(), arrays[FEATURES_TENSOR]
    return _stack(arrays)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array, whose header says nothing that its bytes do not bear out."""
    with archive.open(info) as file:
        content = io.BytesIO(file.read())
    if len(content.getbuffer()) != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename[:100]!r} is cut short")
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(f"{info.filename[:100]!r} is of a format that no numbers need, {version}")
    try:
        shape, _, dtype = _HEADERS[version](content)
    # What Python raises at a header that is none.
    except (tokenize.TokenError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"{info.filename[:100]!r} is no array of numpy ({error})") from error
    if dtype.hasobject:
        raise ValueError(f"{info.filename[:100]!r} holds Python objects, which are never read; expected numbers")
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != info.file_size - content.tell():
        raise ValueError(f"{info.filename[:100]!r} does not hold the {shape} values that its header says")
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


def _read_csv(path: Path):
    names, rows = [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, [])
        _check_header(header)
        for row in lines:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {lines.line_num}: expected a name and {len(header) - 1} numbers, as in the header, found "
                    f"{len(row)} fields"
                )
            names.append(name_of_cell(row[0]))
            try:
                # A number too large becomes infinite, which is refused by name.
                with np.errstate(over="ignore"):
                    rows.append(np.array(row[1:], dtype=np.float32))
            except ValueError as error:
                raise ValueError(f"line {lines.line_num}, {row[0]!r}: expected numbers ({error})") from error
    if not rows:
        raise ValueError("expected a header row, then a name and numbers in each row, found no row")
    return names, np.stack(rows)


def _check_header(header: list[str]):
    """ValueError if the first row does not name columns: a perturbation in it would be lost."""
    if len(header) < 2:
        raise ValueError(f"expected a column of names and columns of numbers, found the columns {header}")
    try:
        numbers = [float(field) for field in header[1:]]
    except ValueError:
        return
    # Columns are often numbered.
    if not all(number.is_integer() for number in numbers) or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(
            f"expected a header row, found the numbers {some(header[1:], 3)} in the first row; name the columns there"
        )


def _read_parquet(path: Path):
    try:
        table = _bounded_table(path)
    except (OSError, pa.ArrowException) as error:
        # What pyarrow raises for a file that is damaged inside.
        raise ValueError(f"cannot be read as parquet ({error})") from error
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise ValueError(f"the columns {some(twice)} stand twice; keep one of each")
    index = _index_columns(table.schema)
    text = [field.name for field in table.schema if _is_text(field.type)]
    # A frame whose numbered rows are not all there is stored with its row numbers, which are no feature.
    values = [field for field in table.schema if field.name not in {*text, *index}]
    if len(text) != 1:
        raise ValueError(f"expected one column (or index) of names, found {len(text)}: {some(text)}")
    names = table.column(text[0])
    if names.null_count:
        raise ValueError(f"expected a name in each row, found {names.null_count} rows without in {text[0]!r}")
    names = _texts(names)
    if len(values) == 1 and _is_list(values[0].type):
        lists = table.column(values[0].name)
        if lists.null_count:
            missing = names[lists.is_null().to_pylist().index(True)]
            raise ValueError(f"expected a list of numbers in each row, found none for {missing!r}")
        vectors = [np.asarray(row.values) for chunk in lists.chunks for row in chunk]
        _check_widths(names, [len(vector) for vector in vectors])
        return names, np.stack(vectors) if vectors else np.empty((0, 0))
    for field in values:
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)):
            raise ValueError(
                f"expected columns of numbers, or one column of lists of numbers; found {field.name!r} of type {field.type}"
            )
    if not values:
        raise ValueError("expected columns of numbers beside the names, found none")
    with np.errstate(over="ignore"):  # what is infinite in float32 is refused by name
        return names, np.column_stack([table.column(field.name).to_numpy().astype(np.float32) for field in values])


def _bounded_table(path: Path) -> pa.Table:
    """The whole table, of which no part is larger than the file could fill."""
    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        # Texts stay codes, so that one long text in many rows is in memory once.
        text = [field.name for field in file.schema_arrow if _is_text(field.type)]
    with pq.ParquetFile(path, read_dictionary=text) as file:
        # Of a damaged file, pyarrow gives an error here, and ends the process below, in `column`. What is scanned is not kept.
        file.scan_contents(batch_size=1 << 16)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
        check_room(8 * max(values, file.metadata.num_rows), size, "it")
        batches, read = [], 0
        for batch in file.iter_batches(_ROWS):
            batches.append(batch)
            read += batch.nbytes
            check_room(read, size, "it")
        return pa.Table.from_batches(batches, schema=file.schema_arrow)


_ROWS = 1024


def _index_columns(schema: pa.Schema) -> list[str]:
    """The columns that pandas wrote a frame's index to."""
    about = parse_json((schema.metadata or {}).get(b"pandas", b"{}").decode("utf-8"))
    columns = about.get("index_columns") if isinstance(about, dict) else None
    return [name for name in columns if isinstance(name, str)] if isinstance(columns, list) else []


def _texts(column: pa.ChunkedArray) -> list[str]:
    """The texts of a column, each of which is in memory once, however many rows have it."""
    texts: list[str] = []
    for chunk in column.chunks:
        codes = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        known = codes.dictionary.to_pylist()
        texts += [known[code] for code in codes.indices.to_pylist()]
    return texts


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _read_torch(path: Path):
    content = read_pickled(path)
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of names and vectors, found {type(content).__name__}")
    size, values = path.stat().st_size, 0
    vectors = {}
    for name, value in content.items():
        if not isinstance(value, (StoredTensor, StoredArray)):
            raise ValueError(f"expected a vector for each name, found {type(value).__name__} for {name!r}")
        # Many tensors may lie in one place of the file.
        values += math.prod(value.shape)
        check_room(values * _LARGEST_ITEM, size, "it")
        vectors[str(name)] = as_array(value.load()) if isinstance(value, StoredTensor) else np.asarray(value.load())
    return _stack(vectors)


_LARGEST_ITEM = 8


_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".pt": _read_torch,
}
