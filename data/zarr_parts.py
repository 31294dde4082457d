"""The parts of a zarr array, checked before they are unpacked: none takes more memory than the array's values have."""

import bz2
import io
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import pyarrow as pa

from pertstate.data.self_contained import LARGEST_RATIO, SMALL, packed_at_most


# Codecs that make few bytes of many. What gzip and zlib unpack is at most `LARGEST_RATIO` times as long.
_PACKINGS = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
_TEXTS = ("vlen-bytes", "vlen-utf8")
# Bytes at the start of a part that say how much it unpacks to.
_HEADERS = {"blosc": 8, "lz4": 4, "zstd": 18}
_ZSTD = b"\x28\xb5\x2f\xfd"
# Bytes of a value in the widest form that a codec gives it, and of a part's checksums.
_WIDEST, _CHECKSUMS = 8, 64
_COUNT = 4  # bytes that say how many texts a part has
_NO_PART = 2**64 - 1
_ADVICE = "write the store again"


def check_parts(array: Any, folder: Path, where: str):
    """
    Check what the parts of an array say that they unpack to.

    Args:
        array (`zarr.Array`): the array.
        folder (`Path`): where its parts lie.
        where (`str`): its name, for errors.

    Raises:
        ValueError: a part would take more memory than the values that it stands for, or its codecs do not let that be seen.
    """
    sharding = _sharding(array, where)
    codecs = _codecs(array) if sharding is None else list(sharding.codecs)
    names = [_name(codec) for codec in codecs]
    packings = [name for name in names if name in _PACKINGS]
    if len(packings) > 1:
        raise ValueError(f"{where} is packed {len(packings)} times over, expected once; {_ADVICE}")
    texts = any(name in _TEXTS for name in names)
    checksum = names[-1:] == ["crc32c"]
    outer = names[: len(names) - checksum]
    if packings and outer[-1] not in _PACKINGS or texts and len(outer) > len(packings) + 1:
        raise ValueError(
            f"{where} is packed by {', '.join(names)}, of which the last should pack its values; {_ADVICE}"
        )
    elements = math.prod(array.chunks)
    room = elements * max(_WIDEST, getattr(array.dtype, "itemsize", 0)) + _CHECKSUMS
    packing = packings[0] if packings else None
    # Of a part that says it, only the first bytes are read.
    head = None if texts or packing in _STREAMS and packing != "zstd" else _HEADERS.get(packing or "", 0)
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or path.name == "zarr.json" or not path.is_file():
            continue
        with open(path, "rb") as file:
            places = [(0, path.stat().st_size)] if sharding is None else _places(file, sharding, array, where)
            for start, size in places:
                if not texts and size > packed_at_most(room):
                    raise ValueError(
                        f"{where} has a part of {size:,} bytes for values of {room:,} at most; copy the store again"
                    )
                file.seek(start)
                part = file.read(size if head is None else min(size, head))
                if packing == "zstd" and _zstd_size(part) is None:
                    part += file.read(size - len(part))
                allowed = max(0 if texts else room, LARGEST_RATIO * size + SMALL)
                unpacked = 0 if packing is None else _unpacked_size(part, packing, allowed)
                if unpacked > allowed:
                    raise ValueError(
                        f"{where} has a part of {size:,} bytes that unpacks to {unpacked:,} or more, expected at most {room:,}; "
                        f"{_ADVICE}"
                    )
                if texts:
                    _check_texts(part[: size - 4 * checksum], packing, elements, where)


def _codecs(array) -> list:
    metadata = array.metadata
    if metadata.zarr_format == 3:
        return list(metadata.codecs)
    return [*(metadata.filters or ()), *([] if metadata.compressor is None else [metadata.compressor])]


def _name(codec) -> str:
    named = codec.codec_id if isinstance(codec, numcodecs.abc.Codec) else codec.to_dict()["name"]
    return named.removeprefix("numcodecs.")


def _sharding(array, where: str):
    """The codec that puts several parts into one file; None if each has its own."""
    codecs = _codecs(array)
    shards = [codec for codec in codecs if _name(codec) == "sharding_indexed"]
    if not shards:
        return None
    index = [_name(codec) for codec in shards[0].index_codecs]
    nested = any(_name(codec) == "sharding_indexed" for codec in shards[0].codecs)
    if len(codecs) > 1 or nested or index not in (["bytes"], ["bytes", "crc32c"]):
        raise ValueError(
            f"{where}: its parts lie in files in an unusual way, expected shards with a plain index; {_ADVICE}"
        )
    return shards[0]


def _places(file, sharding, array, where: str) -> Iterator[tuple[int, int]]:
    """Where the parts of a file of several begin, and how long they are."""
    count = math.prod(array.shards) // math.prod(array.chunks)
    length = 16 * count + (4 if len(sharding.index_codecs) > 1 else 0)
    size = file.seek(0, 2)
    if length > size:
        raise ValueError(
            f"{where} has a file of {size:,} bytes, and its index alone takes {length:,}; copy the store again"
        )
    file.seek(0 if sharding.index_location.value == "start" else size - length)
    order = sharding.index_codecs[0].endian
    index = file.read(16 * count)
    for at in range(0, len(index), 16):
        start, held = (
            int.from_bytes(index[i : i + 8], "little" if order is None else order.value) for i in (at, at + 8)
        )
        if start == held == _NO_PART:
            continue
        if start + held > size:
            raise ValueError(f"{where} has a part that lies outside of its file; copy the store again")
        yield start, held


def _unpacked_size(part: bytes, packing: str, at_most: int) -> int:
    """How many bytes a part says that it unpacks to. If it does not say: how many it does, counted until there are too many."""
    if packing == "blosc":
        return int.from_bytes(part[4:8], "little")
    if packing == "lz4":
        return int.from_bytes(part[:4], "little")
    if packing == "zstd":
        said = _zstd_size(part)
        if said is not None:
            return said
    opened = _STREAMS.get(packing)
    if opened is None:
        return 0
    with opened(part) as stream:
        read = 0
        while read <= at_most and (block := stream.read(1 << 20)):
            read += len(block)
    return read


_STREAMS: dict[str, Callable[[bytes], Any]] = {
    "bz2": lambda part: bz2.BZ2File(io.BytesIO(part)),
    "lzma": lambda part: lzma.LZMAFile(io.BytesIO(part)),
    "zstd": lambda part: pa.CompressedInputStream(pa.BufferReader(part), "zstd"),
}


def _zstd_size(part: bytes) -> int | None:
    """What the header of a frame says (RFC 8878, 3.1.1.1); None if it does not say. What is no frame unpacks to nothing."""
    if part[:4] != _ZSTD or len(part) < 5:
        return 0
    described = part[4]
    single, kind = described >> 5 & 1, described >> 6
    start = 5 + (1 - single) + (0, 1, 2, 4)[described & 3]
    width = (single, 2, 4, 8)[kind]
    if width == 0:
        return None
    return int.from_bytes(part[start : start + width], "little") + (256 if width == 2 else 0)


def _check_texts(part: bytes, packing: str | None, elements: int, where: str):
    """Before texts are unpacked, room is made for as many as their part says that it has."""
    content = part if packing is None else bytes(numcodecs.get_codec({"id": packing}).decode(part))
    count = int.from_bytes(content[:_COUNT], "little")
    if count > elements:
        raise ValueError(f"{where} has a part that says that it has {count:,} texts, expected {elements:,}; {_ADVICE}")
