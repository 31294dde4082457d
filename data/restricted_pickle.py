"""
Reading pickles that others wrote, without running what they name.

A pickle is a program: it may name any function of any module and call it. Python's unpickler asks one method for every
such name, `find_class`; here, and nowhere else in the package, it is subclassed, to answer from a closed table. Nothing
in the table is a function of numpy or torch: each entry is a stand-in of this module that checks what it is given and
keeps it as data (a [`StoredTensor`], a [`StoredArray`], a list), so that no state of a real object is set by a file
either. Tensors are read when they are asked for, once their size is known to be that of the file.
"""

import functools
import io
import math
import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from pertstate.data.pickle_program import LARGEST_PROGRAM, Keys, check_content, check_keys


_ZIP = b"PK\x03\x04"
# Flags of a member that is encrypted, patched or strongly encrypted.
_ENCRYPTED = 0x61
# First bytes of a file of torch.save that is not a zip archive (before torch 1.6, and tensors within a plain pickle).
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_TORCH_PROTOCOL = 1001
# The most entries that may be passed to functions for each byte of the pickle. Known pickles stay below 4.
_ENTRIES_PER_BYTE = 16
# Codes of a registry that other code fills, buffers from outside the file, ids as text: none of the known files has them.
_REFUSED_OPCODES = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID")
_DTYPE_CODE = re.compile(r"b1|i[1248]|u[1248]|f[248]|[SU][1-9][0-9]{0,5}|O8?")
# What the unpickler raises at bytes that are not a whole pickle.
_BROKEN = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


class RefusedPickleError(ValueError):
    """A pickle names something other than a tensor, numpy array or plain container. None of it was run."""


class _Data:
    """A value that a pickle can neither change nor make anew."""

    __slots__ = ()

    def __setstate__(self, state):
        raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__}")


class Storage(_Data):
    """
    The numbers behind tensors, read from the file when they are first asked for.

    Args:
        dtype (`torch.dtype`): of the numbers.
        numel (`int`): how many the pickle says there are.
        read (`Callable[[], bytes]`): gives their bytes.
    """

    __slots__ = ("dtype", "numel", "read", "_buffer")

    def __init__(self, dtype: torch.dtype, numel: int, read: Callable[[], bytes]):
        self.dtype, self.numel, self.read = dtype, numel, read
        self._buffer: bytearray | None = None

    @property
    def buffer(self) -> bytearray:
        """The bytes, writable as torch wants them; tensors of one storage share them."""
        if self._buffer is None:
            self._buffer = bytearray(self.read())
        return self._buffer


class StoredTensor(_Data):
    """A tensor of a file: its `shape` and `dtype` at once, its numbers with `load()`."""

    __slots__ = ("storage", "offset", "shape", "stride")

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]):
        whole = [offset, *shape, *stride]
        if not isinstance(storage, Storage) or len(shape) != len(stride) or not all(_is_size(n) for n in whole):
            raise pickle.UnpicklingError("a tensor's layout is none")
        numel = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride)) if numel else 0
        # A tensor may not be larger than its storage: otherwise a file of a few bytes could fill the memory.
        if numel > storage.numel or (numel and last >= storage.numel):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} lies outside its {storage.numel} stored numbers")
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def load(self) -> torch.Tensor:
        """The tensor. ValueError where its bytes are not what was written."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(self.storage.buffer, dtype=self.dtype).as_strided(self.shape, self.stride, self.offset)


class StoredArray(_Data):
    """A numpy array of a file, numbers with `load()`."""

    __slots__ = ("shape", "values")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.values: np.ndarray | list = []

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: "bytes | bytearray | list", dtype: "_DType", shape: tuple[int, ...], order: str):
        """The content: bytes of numbers or text, or a list of objects."""
        if not isinstance(dtype, _DType) or type(shape) is not tuple or not all(_is_size(n) for n in shape):
            raise pickle.UnpicklingError("an array's layout is none")
        numel = math.prod(shape)
        if dtype.is_object:
            if type(data) is not list or len(data) != numel:
                raise pickle.UnpicklingError(f"an array of shape {shape} does not hold a list of {numel} objects")
            self.values = data
        else:
            kind = dtype.numpy()
            if not isinstance(data, bytes | bytearray) or len(data) != numel * kind.itemsize:
                raise pickle.UnpicklingError(f"an array of shape {shape} does not hold its bytes")
            if kind.kind == "U":
                # numpy notices invalid characters only when the text is used.
                bytes(data).decode("utf-32-be" if dtype.is_big_endian else "utf-32-le")
            self.values = np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")
        self.shape = shape

    def load(self) -> "np.ndarray | list":
        """Numbers or text as an array; of objects the list of them."""
        return self.values


class _DType(_Data):
    """A numpy type as its code and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, align=False, copy=False):
        if type(code) is not str or not _DTYPE_CODE.fullmatch(code):
            raise RefusedPickleError("a numpy type that is no number, text or object")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "=", "|") or any(state[2:5]):
            raise RefusedPickleError("a numpy type that is no number, text or object")
        self.order = state[1]

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    @property
    def is_big_endian(self) -> bool:
        return self.order == ">" or (self.order in "=|" and sys.byteorder == "big")

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Named(_Data):
    """What a name in a pickle stands for: `make` is called where the pickle calls it."""

    __slots__ = ("make", "spend")

    def __init__(self, make: Callable, spend: Callable[[int], None]):
        self.make, self.spend = make, spend

    def __call__(self, *args):
        # A short pickle could make a function copy its arguments a million times.
        self.spend(
            1 + sum(len(arg) for arg in args if isinstance(arg, (str, bytes, bytearray, list, tuple, dict, set)))
        )
        return self.make(*args)


class _Ordered(dict):
    """An OrderedDict, whose order a dict keeps. Attributes that torch attaches to it are left out."""

    def __init__(self, pairs=()):
        pairs = list(pairs.items() if isinstance(pairs, dict) else pairs)
        check_keys([pair[0] for pair in pairs])
        super().__init__(pairs)

    def __setstate__(self, state):
        """Nothing of it is read."""


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _scalar(dtype: _DType, data: bytes):
    """A number or text of numpy, as Python's."""
    if not isinstance(dtype, _DType) or dtype.is_object:
        raise RefusedPickleError("a numpy scalar of objects")
    array = StoredArray()
    array.fill(data, dtype, (1,), "C")
    return array.values[0].item()


def _array(kind, shape, code) -> StoredArray:
    return StoredArray()


def _array_of_buffer(buffer, dtype, shape, order) -> StoredArray:
    array = StoredArray()
    array.fill(buffer, dtype, shape, order)
    return array


def _set(members=()) -> set:
    members = list(members)
    check_keys(members)
    return set(members)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}, not as latin1")
    return text.encode("latin1")


def _tensor(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None) -> StoredTensor:
    return StoredTensor(storage, offset, shape, stride)


def _parameter(tensor: StoredTensor, requires_grad=False, hooks=None) -> StoredTensor:
    return tensor


def _not_a_function(*args):
    raise pickle.UnpicklingError("it calls a type")


_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_FUNCTIONS: dict[str, Callable] = {
    "collections.OrderedDict": _Ordered,
    "_codecs.encode": _encode,
    "numpy.dtype": _DType,
    "numpy.ndarray": _not_a_function,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    "torch.storage._load_from_bytes": lambda content: _read_old_torch(io.BytesIO(content)),
    **{f"{module}.set": _set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": lambda *args: frozenset(_set(*args)) for module in ("builtins", "__builtin__")},
}
# numpy 2 renamed its modules; files carry the names of the numpy that wrote them.
for _core in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_core}.multiarray.scalar"] = _scalar
    _FUNCTIONS[f"{_core}.multiarray._reconstruct"] = _array
    _FUNCTIONS[f"{_core}.numeric._frombuffer"] = _array_of_buffer
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_VALUES = {str(dtype): dtype for dtype in _DTYPES.values()}


class _Unpickler(pickle.Unpickler):
    """
    The one unpickler of this package: names are looked up in the tables above alone.

    Args:
        file: at the first byte of a pickle.
        storage (`Callable[[torch.dtype, str, int], Storage]`, *optional*): gives the storage of dtype, key and number of
            elements; a plain pickle has none.
    """

    def __init__(self, file: BinaryIO, storage: Callable | None = None):
        super().__init__(file)
        self._storage = storage
        self._left = _ENTRIES_PER_BYTE * _check_program(file)

    def find_class(self, module: str, name: str):
        named = f"{module}.{name}"
        if named in _VALUES:
            return _VALUES[named]
        if named in _STORAGES:
            return _STORAGES[named]
        if named not in _FUNCTIONS:
            raise RefusedPickleError(f"the global {named[:200]!r}")
        return _Named(_FUNCTIONS[named], self._spend)

    def persistent_load(self, id) -> Storage:
        if self._storage is None:
            raise pickle.UnpicklingError("a plain pickle refers to storages")
        kind, dtype, key, _, numel = id[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or not _is_size(numel):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return self._storage(dtype, key, numel)

    def _spend(self, entries: int):
        self._left -= entries
        if self._left < 0:
            raise pickle.UnpicklingError("it grows far beyond its size")


def _check_program(file: BinaryIO) -> int:
    """The length in bytes of the pickle that begins here, whose opcodes are read and not run."""
    start, keys = file.tell(), Keys()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in _REFUSED_OPCODES:
            raise RefusedPickleError(f"the opcode {opcode.name}")
        # The unpickler makes room for all numbers up to a memo's.
        if count > LARGEST_PROGRAM or (opcode.name.endswith("PUT") and int(argument or 0) > LARGEST_PROGRAM):
            raise pickle.UnpicklingError(f"it has more than {LARGEST_PROGRAM:,} steps")
        keys.step(opcode, argument)
    length = file.tell() - start
    file.seek(start)
    return length


def _read_old_torch(file: BinaryIO):
    """What torch.save wrote before it wrote zip archives: five pickles, then the bytes of each storage."""
    if file.read(len(_OLD_TORCH)) != _OLD_TORCH or _Unpickler(file).load() != _OLD_TORCH_PROTOCOL:
        raise pickle.UnpicklingError("it is no file of torch.save")
    system = _Unpickler(file).load()
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise pickle.UnpicklingError("it was written on a machine of another byte order")
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel, bytes))

    content = _Unpickler(file, storage).load()
    keys = _Unpickler(file).load()
    if set(keys) != set(storages):
        raise pickle.UnpicklingError("it does not hold the storages that its tensors refer to")
    for key in keys:
        found = storages[key]
        size = found.numel * found.dtype.itemsize
        (numel,) = struct.unpack("=q", file.read(8))
        position = file.tell()
        if numel != found.numel or file.seek(0, os.SEEK_END) - position < size:
            raise pickle.UnpicklingError(f"storage {key[:50]!r} does not hold its {found.numel} numbers")
        found.read = functools.partial(_read_at, file, position, size)
        file.seek(position + size)
    return content


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _read_torch(path: Path):
    """A file of torch.save, a zip archive of stored (not compressed) members."""
    size = path.stat().st_size
    # It stays open while a tensor of it is in use: listing thousands of members anew for each tensor takes minutes.
    archive = zipfile.ZipFile(path)
    members = {info.filename: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED for info in members.values()):
        raise pickle.UnpicklingError("it is compressed or encrypted, which torch.save does not do")
    inside = all(0 <= info.header_offset < size for info in archive.infolist())
    if not inside or sum(info.file_size for info in archive.infolist()) > size:
        raise pickle.UnpicklingError("its members are larger than the file")
    names = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise pickle.UnpicklingError("it is a zip archive, but none of torch.save")
    prefix = names[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in members and archive.read(order).decode("ascii") != sys.byteorder:
        raise pickle.UnpicklingError("it was written on a machine of another byte order")

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        member = members.get(f"{prefix}data/{key}")
        if member is None or member.file_size != numel * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key[:50]!r} does not hold its {numel} numbers")
        return storages.setdefault(key, Storage(dtype, numel, functools.partial(_read_member, archive, member)))

    storages: dict[str, Storage] = {}
    return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except _BROKEN as error:
        raise ValueError(f"{archive.filename} is damaged ({error}); copy it again") from error


# Weights that are tied lie in one place of a file.
_MOST_SHARED = 3


def check_stored_apart(tensors: Iterable[StoredTensor], path: Path):
    """
    ValueError if tensors of a file take much more memory than the file: many may lie in one place of it, and a model gives
    each a place of its own.
    """
    total, size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors), path.stat().st_size
    if total > _MOST_SHARED * size:
        raise ValueError(
            f"{path}: its weights take {total:,} bytes, in a file of {size:,}; expected weights that are stored each by itself"
        )


def read_pickled(path: str | os.PathLike):
    """
    The content of a file that `torch.save` or `pickle.dump` wrote, whatever its ending.

    Returns:
        Dicts, lists, tuples, sets, numbers, text (numpy's own become Python's); tensors as [`StoredTensor`] and arrays
        as [`StoredArray`].

    Raises:
        FileNotFoundError: there is no such file.
        RefusedPickleError: the pickle names anything else; none of it was run.
        ValueError: the file is not whole, is none of these, or would grow far beyond its size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            first = file.read(len(_OLD_TORCH))
            file.seek(0)
            if first.startswith(_ZIP):
                content = _read_torch(path)
            elif first == _OLD_TORCH:
                content = _read_old_torch(io.BytesIO(file.read()))
            else:
                content = _Unpickler(file).load()
        check_content(content)
        return content
    except RefusedPickleError as error:
        raise RefusedPickleError(
            f"{path}: expected a pickle of tensors, numpy arrays and plain containers, found {error}; nothing of it was "
            "run: do not open this file otherwise unless you trust who wrote it"
        ) from None
    except _BROKEN as error:
        raise ValueError(
            f"{path}: expected a whole file of torch.save or pickle, found one that cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}); copy it again"
        ) from error
