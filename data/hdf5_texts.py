"""
How long the texts of an HDF5 file are, without reading them.

A text of no fixed width lies in a heap of the file; the dataset holds its length and its place. Nothing keeps a file from giving
one place to all names: a megabyte of text that a million cells share is a terabyte in memory.
"""

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
# What the texts of one attribute may take in memory, in bytes.
_ATTRIBUTE = 1 << 32


class UnknownLayoutError(ValueError):
    """The references of a dataset cannot be read as they lie in the file."""


class DamagedTextsError(ValueError):
    """A heap of texts with a part of no size, which HDF5 would read for ever, or an attribute whose texts take too much memory."""


class CheckedBytes:
    """
    The bytes of an HDF5 file, for [`h5py.File`] to read in place of the file: each heap of texts is checked before HDF5 sees it.

    Args:
        path (`str` or `Path`): of the file.

    Attributes:
        fault ([`DamagedTextsError`]): of the first damaged heap; HDF5 replaces the error by one of its own.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.fault: DamagedTextsError | None = None
        self._file = open(path, "rb", buffering=0)  # closed by __exit__
        self._size, self._place = os.fstat(self._file.fileno()).st_size, 0
        self._checked: set[int] = set()
        # Set once HDF5 has opened the file: bytes of a size in it, and where its addresses count from.
        self._length, self._base = 8, 0
        # Texts that are being read, and the largest heap met.
        self._texts, self._largest = 0, 0

    def __enter__(self) -> "CheckedBytes":
        return self

    def __exit__(self, *error):
        self._file.close()

    def opened(self, file: h5py.File):
        """Learn the file's sizes from its header."""
        created = file.id.get_create_plist()
        self._length, self._base = created.get_sizes()[1], created.get_userblock()

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        content = bytearray(size)
        return bytes(content[: self.readinto(content)])

    def readinto(self, buffer) -> int:
        wanted = memoryview(buffer).cast("B")
        # With the bytes around it, so that no signature is cut.
        before = min(self._place, len(_HEAP) - 1)
        content = os.pread(self._file.fileno(), before + len(wanted) + len(_HEAP) - 1, self._place - before)
        found = content.find(_HEAP)
        while found >= 0:
            self._check(self._place - before + found)
            found = content.find(_HEAP, found + 1)
        read = content[before : before + len(wanted)]
        wanted[: len(read)] = read
        self._place += len(read)
        return len(read)

    def check_heaps(self, addresses: np.ndarray):
        """Check the heaps at addresses as references of the file have them; 0 is none."""
        for address in addresses.tolist():
            place = self._base + address
            if address and os.pread(self._file.fileno(), len(_HEAP), place) == _HEAP:
                self._check(place)

    def check_attributes(self, node: h5py.Group | h5py.Dataset, where: str):
        """Read the texts of the attributes of a node."""
        for i in range(h5py.h5a.get_num_attrs(node.id)):
            attribute = h5py.h5a.open(node.id, index=i)
            if not has_texts(attribute.get_type()):
                continue
            self._texts = int(np.prod(attribute.shape or (1,), dtype=np.int64))
            self._check_room()
            try:
                node.attrs[attribute.name]
            except (OSError, TypeError, ValueError) as error:
                if self.fault is not None:
                    raise self.fault from None
                name = attribute.name.decode(errors="replace")
                raise ValueError(
                    f"the attribute {name} of {where} cannot be read ({error}); copy the file again"
                ) from None
            self._texts = 0

    def _check_room(self):
        if self._texts * self._largest > _ATTRIBUTE:
            raise DamagedTextsError(
                f"an attribute says that it has {self._texts:,} texts of up to {self._largest:,} bytes; write the file again"
            )

    def _check(self, heap: int):
        if heap in self._checked:
            return
        try:
            size = int.from_bytes(os.pread(self._file.fileno(), self._length, heap + 8), "little")
            _check_heap(os.pread(self._file.fileno(), min(size, self._size), heap), heap, self._length)
            self._checked.add(heap)
            if self._texts:
                self._largest = max(self._largest, size)
                self._check_room()
        except DamagedTextsError as error:
            self.fault = error
            raise


def _check_heap(content: bytes, heap: int, length: int):
    """Its parts follow one another: a number, which is 0 where the rest is free, a count, four zeros, a size, and the text."""
    header = _aligned(8 + length)  # that of the heap, and that of each part
    part = struct.Struct(f"<H6x{'Q' if length == 8 else 'I' if length == 4 else 'H'}")
    place, last = header, len(content) - header
    while place <= last:
        number, held = part.unpack_from(content, place)
        taken = header + (held + 7 & ~7) if number else held
        if taken < header or place + taken > len(content):
            raise DamagedTextsError(f"the texts at byte {heap:,} of the file are damaged; copy the file again")
        place += taken


def has_texts(kind: h5py.h5t.TypeID) -> bool:
    """Whether values of a type, or parts of them, lie in a heap."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        return kind.is_variable_str()
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        return any(has_texts(kind.get_member_type(i)) for i in range(kind.get_nmembers()))
    if isinstance(kind, h5py.h5t.TypeArrayID):
        return has_texts(kind.get_super())
    return isinstance(kind, h5py.h5t.TypeVlenID)


def _aligned(size: int) -> int:
    return (size + 7) // 8 * 8


def text_bytes(dataset: h5py.h5d.DatasetID, content: CheckedBytes, at_most: int, size: int) -> int:
    """
    The bytes that the texts (or lists) of a dataset take in memory. Counting ends once there are more than `at_most`.

    Args:
        dataset (`h5py.h5d.DatasetID`): of a file that is read from `content`.
        content ([`CheckedBytes`]): checks the heaps of the texts.
        size (`int`): of the file.

    Raises:
        ValueError: the type is one whose parts cannot be counted, or a heap is damaged.
    """
    address = h5py.h5i.get_file_id(dataset).get_create_plist().get_sizes()[0]
    places, width = _references(dataset.get_type(), address)
    if not places or dataset.shape is None or 0 in dataset.shape:
        return 0
    if dataset.get_create_plist().fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED:
        h5py.Dataset(dataset).fillvalue  # noqa: B018  # read, and so checked
    total = 0
    try:
        for block in _blocks(dataset, content.path, width):
            elements = np.frombuffer(block, np.uint8).reshape(-1, width)
            for place, unit in places:
                lengths = np.ascontiguousarray(elements[:, place : place + _LENGTH]).view("<u4")
                total += int(lengths.sum(dtype=np.int64)) * unit
                where = place + _LENGTH
                content.check_heaps(_unique_addresses(elements[:, where : where + address]))
    except UnknownLayoutError:
        return _counted(dataset, at_most, size)
    return total


def _unique_addresses(parts: np.ndarray) -> np.ndarray:
    """`(elements, bytes of an address)` uint8 to the addresses, each once, uint64."""
    wide = np.zeros((len(parts), 8), dtype=np.uint8)
    wide[:, : parts.shape[1]] = parts
    return np.unique(wide.view("<u8"))


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


def _blocks(dataset: h5py.h5d.DatasetID, path: str | os.PathLike, width: int) -> Iterator[bytes]:
    """The elements as they lie in the file."""
    created = dataset.get_create_plist()
    if created.get_layout() == h5py.h5d.CONTIGUOUS:
        place, elements = dataset.get_offset(), int(np.prod(dataset.shape, dtype=np.int64))
        if place is None:
            return  # nothing was written
        if dataset.get_storage_size() != elements * width:
            raise UnknownLayoutError("its elements have another width")
        with open(path, "rb") as file:
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
    if not values.shape:
        return len(values.asstr()[()]) if h5py.check_string_dtype(values.dtype) else np.asarray(values[()]).nbytes
    rows = max(1, (1 << 30) // max(1, size))
    for start in range(0, values.shape[0], rows):
        block = np.asarray(values[start : start + rows])
        for value in block.reshape(-1):
            parts = value if block.dtype.names else (value,)
            total += sum(len(part) if isinstance(part, (bytes, str)) else getattr(part, "nbytes", 0) for part in parts)
        if total > at_most:
            break
    return total
