"""A file of cells is read only if all that it says lies in the file itself, and takes no more memory than it could fill."""

import math
import os
import stat
from pathlib import Path

import h5py

from pertstate.base.bounded_text import kind_of, load_json
from pertstate.base.messages import some
from pertstate.data.hdf5_texts import CheckedBytes, text_bytes


MOST_OBJECTS = 200_000
LONGEST_NAME = 1 << 16  # bytes of a text of fixed width
# gzip makes zeros 1,030 times smaller. Small arrays are read in any case.
LARGEST_RATIO, SMALL = 1100, 1 << 26
# How deep groups may be nested.
DEEPEST = 50
# HDF5 keeps each text of no fixed width by itself, with at least so many bytes.
BYTES_OF_TEXT = 16


# HDF5


def check_hdf5(file: h5py.File):
    """
    Check that a file needs no other one, before anything of it is read: HDF5 follows links to other files, and takes values
    from them, wherever they lie.

    Raises:
        ValueError: a link or a dataset leaves the file, names take more memory than the file could fill, or a heap of texts
            is damaged; it is named.
    """
    path = file.filename
    state = state_of(path)
    if _CHECKED.get(path) == state:
        return
    with CheckedBytes(path) as content:
        try:
            with h5py.File(content, "r") as checked:
                content.opened(checked)
                _check_objects(checked, content, os.path.getsize(path))
        except OSError:
            if content.fault is not None:
                raise content.fault from None
            raise
    _CHECKED[path] = state


def state_of(path: str | os.PathLike) -> tuple[int, ...]:
    """What tells that a file is another one, or was written since."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# Files that were found whole, with what tells that they have not changed since.
_CHECKED: dict[str, tuple[int, ...]] = {}


def _check_objects(file: h5py.File, content: CheckedBytes, size: int):
    seen: set[int] = set()
    groups: list[tuple[str, h5py.h5g.GroupID]] = [("", h5py.h5g.open(file.id, b"/"))]
    while groups:
        place, group = groups.pop()
        content.check_attributes(h5py.Group(group), place or "the file")
        for name in group:
            if place.count("/") >= DEEPEST:
                raise ValueError(f"{place[:100]}.. is nested more than {DEEPEST} deep; write the file again")
            where = f"{place}/{name.decode(errors='replace')}" if place else name.decode(errors="replace")
            kind = group.links.get_info(name).type
            if kind in (h5py.h5l.TYPE_EXTERNAL, h5py.h5l.TYPE_SOFT):
                target = group.links.get_val(name)
                target = target if isinstance(target, tuple) else (b"", target)
                if kind == h5py.h5l.TYPE_EXTERNAL:
                    raise ValueError(f"{where} is a link to another file ({_shown(target[0])}); {_ADVICE}")
                continue  # it leads to another place of this file, which is looked at there
            if kind != h5py.h5l.TYPE_HARD:
                raise ValueError(f"{where} is a link of an unknown kind; {_ADVICE}")
            # Its kind and address are known before it is opened, which takes longer.
            found = h5py.h5o.get_info(group, name)
            if found.addr in seen:
                continue
            seen.add(found.addr)
            if len(seen) > MOST_OBJECTS:
                raise ValueError(
                    f"expected at most {MOST_OBJECTS:,} datasets and groups, found more; write the file again"
                )
            if found.type == h5py.h5o.TYPE_GROUP:
                groups.append((where, h5py.h5g.open(group, name)))
            elif found.type == h5py.h5o.TYPE_DATASET:
                dataset = h5py.h5d.open(group, name)
                content.check_attributes(h5py.Dataset(dataset), where)
                _check_dataset(dataset, content, where, size)


_ADVICE = "only what lies in the file itself is read: write the data into one file, with adata.write_h5ad"
# Filters of HDF5 that make room for nothing: they sort bits, or give back as many values as their settings say.
_ORDERINGS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_NBIT, h5py.h5z.FILTER_SCALEOFFSET)
# What is read as a whole, whatever its size.
_TABLES = ("obs/", "var/", "raw/var/", "uns/", "raw.var/")


def _check_dataset(dataset: h5py.h5d.DatasetID, content: CheckedBytes, where: str, size: int):
    created = dataset.get_create_plist()
    layout = created.get_layout()
    if layout == h5py.h5d.CONTIGUOUS and created.get_external_count():  # no other layout can be in another file
        raise ValueError(f"{where} keeps its values in another file ({_shown(created.get_external(0)[0])}); {_ADVICE}")
    if layout == h5py.h5d.VIRTUAL:
        sources = [created.get_virtual_filename(i) for i in range(created.get_virtual_count())]
        raise ValueError(f"{where} takes its values from {some(map(_shown, sources), 3)}; {_ADVICE}")
    kind = dataset.get_type()
    elements = 0 if dataset.shape is None else math.prod(dataset.shape)
    in_table = f"{where}/".startswith(_TABLES)
    texts = isinstance(kind, h5py.h5t.TypeStringID)
    if in_table and texts and not kind.is_variable_str() and kind.get_size() > LONGEST_NAME:
        raise ValueError(
            f"{where} holds texts of {kind.get_size():,} bytes each, expected at most {LONGEST_NAME:,}; write the file again"
        )
    if kind.detect_class(h5py.h5t.VLEN) or (texts and kind.is_variable_str()):
        if elements * BYTES_OF_TEXT > size + SMALL // 16:
            raise ValueError(
                f"{where} says that it has {elements:,} names, in a file of {size:,} bytes; copy the file again"
            )
    packings = [number for i in range(created.get_nfilters()) if (number := created.get_filter(i)[0]) not in _ORDERINGS]
    if len(packings) > 1:
        raise ValueError(f"{where} is packed {len(packings)} times over, expected once; write the file again")
    stored = dataset.get_storage_size()
    if elements * kind.get_size() > LARGEST_RATIO * stored + SMALL:
        raise ValueError(
            f"{where} says that it has {elements:,} values, and {stored:,} bytes of the file are theirs; copy the file again"
        )
    if layout == h5py.h5d.CHUNKED and dataset.shape:
        whole = math.prod(-(-length // part) * part for length, part in zip(dataset.shape, created.get_chunk()))
        whole *= max(BYTES_OF_TEXT, kind.get_size())
        if stored > packed_at_most(whole):
            raise ValueError(
                f"{where} has {elements:,} values, and {stored:,} bytes of the file are theirs, expected {whole:,} at most; copy "
                "the file again"
            )
    # A part of values that are packed together is unpacked as a whole, however few of them are asked for.
    chunk = math.prod(created.get_chunk()) if layout == h5py.h5d.CHUNKED else 0
    if chunk > elements and chunk * kind.get_size() > SMALL:
        raise ValueError(
            f"{where} has {elements:,} values, in parts of {chunk:,}, which would take {chunk * kind.get_size():,} bytes; write "
            "the file again"
        )
    shared = text_bytes(dataset, content, 2 * size + SMALL, size)
    if shared > 2 * size + SMALL:
        raise ValueError(
            f"{where} has texts of {shared:,} bytes together, in a file of {size:,} bytes; write the file again"
        )


def packed_at_most(size: int) -> int:
    """How many bytes values of a size take packed, at most; packing seldom makes them longer. More would unpack to something else."""
    return 2 * size + (1 << 16)


def check_room(wanted: int, stored: int, where: str):
    """
    Check what a part of a file takes in memory, in bytes, against the bytes that are stored of it.

    Raises:
        ValueError: it is more than compression could make of any values.
    """
    if wanted > LARGEST_RATIO * stored + SMALL:
        raise ValueError(
            f"{where} would take {wanted:,} bytes, and {stored:,} are stored of it; copy or write it again"
        )


def _shown(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


# zarr


# Ways of packing values, by the names that zarr gives them; of numcodecs, those that give back bytes and nothing else. (One
# of the others is a pickle.)
_CODECS = (
    *(
        "adler32",
        "bitround",
        "blosc",
        "bytes",
        "bz2",
        "crc32",
        "crc32c",
        "delta",
        "endian",
        "fixedscaleoffset",
        "fletcher32",
    ),
    *(
        "gzip",
        "lz4",
        "lzma",
        "packbits",
        "quantize",
        "sharding_indexed",
        "shuffle",
        "transpose",
        "vlen-bytes",
        "vlen-utf8",
    ),
    *("zlib", "zstd"),
)
_METADATA = (".zarray", ".zmetadata", "zarr.json")


def check_zarr(path: Path):
    """
    Check that a folder in zarr format holds files and folders alone, no link that leads out of it, and values that are
    packed in no way but those of numbers and texts.

    Raises:
        ValueError: something leaves the folder, is no file, or would be unpacked by other code; it is named.
    """
    root = os.path.realpath(path)
    for folder, folders, files in os.walk(path):
        if len(Path(folder).relative_to(path).parts) > DEEPEST:
            raise ValueError(f"{folder[:100]}.. is nested more than {DEEPEST} deep; write the store again")
        for name in (*folders, *files):
            one = Path(folder, name)
            where = one.relative_to(path)
            if one.is_symlink() and not Path(os.path.realpath(one)).is_relative_to(root):
                raise ValueError(
                    f"{where} is a link to {os.readlink(one)!r}, which lies elsewhere; copy what it leads to"
                )
            mode = one.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{where}: expected a file or a folder, found {kind_of(mode)}; write the store again")
            if name in _METADATA:
                _check_codecs(load_json(one), where)


def _check_codecs(content, where: Path):
    """In a part of metadata, at any depth."""
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if name in ("compressor", "filters", "codecs", "index_codecs") and value is not None:
            for codec in value if isinstance(value, list) else [value]:
                named = codec.get("id", codec.get("name")) if isinstance(codec, dict) else codec
                if not isinstance(named, str) or named.removeprefix("numcodecs.") not in _CODECS:
                    raise ValueError(
                        f"{where}: its values are packed as {str(named)[:60]!r}, expected one of {', '.join(_CODECS)}; write the "
                        "store again"
                    )
        if isinstance(value, (dict, list)):
            _check_codecs(value, where)


def check_zarr_array(array, where: str):
    """
    Check what an array would take in memory against what lies on disk. Of dense matrices, which are read row by row, zarr
    writes no zeros; their size is that of the tables.

    Raises:
        ValueError: it would take much more.
    """
    itemsize = getattr(array.dtype, "itemsize", 0) or BYTES_OF_TEXT
    elements = math.prod(array.shape)
    stored = array.nbytes_stored()
    is_matrix = where in ("X", "raw/X") or (where.startswith("layers/") and where.count("/") == 1)
    if not is_matrix and elements * itemsize > LARGEST_RATIO * stored + SMALL:
        raise ValueError(
            f"{where} says that it has {elements:,} values, and {stored:,} bytes are theirs; copy the store again"
        )
    part = max(math.prod(of) for of in (array.chunks, array.shards or ()))
    if part > elements and part * itemsize > SMALL:
        raise ValueError(
            f"{where} has {elements:,} values, in parts of {part:,}, which would take {part * itemsize:,} bytes; write the store again"
        )
