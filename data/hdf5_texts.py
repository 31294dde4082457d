"""
How long the texts of an HDF5 file are, without reading them.

A text of no fixed width lies in a heap of the file; the dataset holds its length and its place. Nothing keeps a file from giving
one place to all names: a megabyte of text that a million cells share is a terabyte in memory.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterator

import h5py
import numpy as np


_DEFLATE = 1  # the number of a filter
_LENGTH = 4  # bytes of a length, which is the first part of a reference


# A heap of texts begins so: its signature, its version, three zeros. Then comes its size.
_HEAP = b"GCOL\1\0\0\0"
# A larger file is not searched for damaged heaps.
SEARCHED = 1 << 28


class UnknownLayoutError(ValueError):
    """The references of a dataset cannot be read as they lie in the file."""


def check_heaps(path: str | os.PathLike, length: int):
    """
    Check the heaps in which a file keeps its texts: HDF5 reads a heap for ever if a part of it has no size.

    Args:
        length (`int`): bytes of a size in this file.

    Raises:
        ValueError: a part of a heap has no size, or leaves the heap; its place is named.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not 0 < size <= SEARCHED:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            heap = content.find(_HEAP)
            while heap >= 0:
                _check_heap(content, heap, length)
                heap = content.find(_HEAP, heap + 1)


def _check_heap(content: mmap.mmap, heap: int, length: int):
    """Its parts follow one another: a number, which is 0 where the rest is free, a count, four zeros, a size, and the text."""
    header = _aligned(8 + length)  # that of the heap, and that of each part
    end = heap + int.from_bytes(content[heap + 8 : heap + 8 + length], "little")
    place = heap + header
    while place + header <= min(end, len(content)):
        number = struct.unpack_from("<H", content, place)[0]
        held = int.from_bytes(content[place + 8 : place + 8 + length], "little")
        taken = header + _aligned(held) if number else held
        if taken < header or place + taken > end:
            raise ValueError(f"the texts at byte {heap:,} of the file are damaged; copy the file again")
        place += taken


def _aligned(size: int) -> int:
    return (size + 7) // 8 * 8


def text_bytes(dataset: h5py.h5d.DatasetID, at_most: int, size: int) -> int:
    """
    The bytes that the texts (or lists) of a dataset take in memory. Counting ends once there are more than `at_most`.

    Args:
        size (`int`): of the file.

    Raises:
        ValueError: the type is one whose parts cannot be counted.
    """
    places, width = _references(
        dataset.get_type(), sum(h5py.h5i.get_file_id(dataset).get_create_plist().get_sizes()[:1])
    )
    if not places or not dataset.shape or 0 in dataset.shape:
        return 0  # one text by itself cannot be larger than the file
    total = 0
    try:
        for block in _blocks(dataset, width):
            elements = np.frombuffer(block, np.uint8).reshape(-1, width)
            for place, unit in places:
                lengths = np.ascontiguousarray(elements[:, place : place + _LENGTH]).view("<u4")
                total += int(lengths.sum(dtype=np.int64)) * unit
    except UnknownLayoutError:
        return _counted(dataset, at_most, size)
    return total


def _references(kind: h5py.h5t.TypeID, address: int) -> tuple[list[tuple[int, int]], int]:
    """Where in an element, as it lies in the file, references are, each with the bytes of a unit; and the element's width."""
    reference = _LENGTH + address + 4
    if isinstance(kind, h5py.h5t.TypeStringID):
        return ([(0, 1)], reference) if kind.is_variable_str() else ([], kind.get_size())
    if isinstance(kind, (h5py.h5t.TypeVlenID, h5py.h5t.TypeArrayID)):
        within, width = _references(kind.get_super(), address)
        if within:
            raise ValueError("lists of texts are not read")
        return ([(0, width)], reference) if isinstance(kind, h5py.h5t.TypeVlenID) else ([], kind.get_size())
    if not isinstance(kind, h5py.h5t.TypeCompoundID):
        return [], kind.get_size()
    # Of a table, the offsets are those in memory, where a reference has another width.
    places, wider = [], 0
    for i in sorted(range(kind.get_nmembers()), key=kind.get_member_offset):
        member = kind.get_member_type(i)
        within, width = _references(member, address)
        places += [(kind.get_member_offset(i) + wider + place, unit) for place, unit in within]
        wider += width - member.get_size()
    return places, kind.get_size() + wider


def _blocks(dataset: h5py.h5d.DatasetID, width: int) -> Iterator[bytes]:
    """The elements as they lie in the file."""
    created = dataset.get_create_plist()
    if created.get_layout() == h5py.h5d.CONTIGUOUS:
        place, elements = dataset.get_offset(), int(np.prod(dataset.shape, dtype=np.int64))
        if place is None:
            return  # nothing was written
        if dataset.get_storage_size() != elements * width:
            raise UnknownLayoutError("its elements have another width")
        with open(h5py.h5i.get_file_id(dataset).name, "rb") as file:
            file.seek(place)
            while elements > 0:
                block = file.read(width * min(elements, 1 << 18))
                if len(block) % width or not block:
                    raise UnknownLayoutError("it is cut short")
                elements -= len(block) // width
                yield block
        return
    if created.get_layout() != h5py.h5d.CHUNKED:
        raise UnknownLayoutError("it lies in a header")
    filters = [created.get_filter(i)[0] for i in range(created.get_nfilters())]
    whole = int(np.prod(created.get_chunk(), dtype=np.int64)) * width
    for i in range(dataset.get_num_chunks()):
        mask, block = dataset.read_direct_chunk(dataset.get_chunk_info(i).chunk_offset)
        for number in reversed(range(len(filters))):
            if mask >> number & 1:
                continue
            if filters[number] != _DEFLATE:
                raise UnknownLayoutError("it is packed in another way")
            block = zlib.decompressobj().decompress(block, whole + 1)
        if len(block) != whole:
            raise UnknownLayoutError("its chunks have another size")
        yield block


def _counted(dataset: h5py.h5d.DatasetID, at_most: int, size: int) -> int:
    """The same, from the texts themselves, of which a gigabyte at most is in memory at once."""
    values, total = h5py.Dataset(dataset), 0
    rows = max(1, (1 << 30) // max(1, size))
    for start in range(0, values.shape[0], rows):
        block = np.asarray(values[start : start + rows])
        for value in block.reshape(-1):
            parts = value if block.dtype.names else (value,)
            total += sum(len(part) if isinstance(part, (bytes, str)) else getattr(part, "nbytes", 0) for part in parts)
        if total > at_most:
            break
    return total
