"""Pickles are read as data: what is known comes back, anything else is refused and nothing of it runs."""

import io
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pertstate.data.restricted_pickle import (
    RefusedPickleError,
    StoredArray,
    StoredTensor,
    read_pickled,
)


class Payload:
    """An object that makes the file `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def state_dict() -> dict:
    """A state dict with the attribute `_metadata` that torch adds to it."""
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 2)
    torch.nn.init.constant_(layer.bias, 3)
    return layer.state_dict()


def content() -> dict:
    return {
        "tensor": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "none": torch.empty(0, 2),
        "numbers": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "objects": np.array(["a", 1], dtype=object),
        "text": np.array(["a", "Ünü"]),
        np.str_("name"): np.int64(3),
        "float": np.float32(0.5),
        "bool": np.bool_(True),
        7: (1, [2.5, None, True], {"x", "y"}, b"z", 10**30),
        "ordered": state_dict(),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
    }


def plain(value):
    """A value that was read, with its tensors and arrays loaded and in a form that compares exactly."""
    if isinstance(value, StoredTensor | StoredArray):
        value = value.load()
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist(), tuple(value.shape)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value


def write(path: Path, value, how) -> Path:
    if how == "zip":
        torch.save(value, path)
    elif how == "before zip":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(value, protocol=how))
    return path


@pytest.mark.parametrize("how", ["zip", "before zip", 2, 3, 4, 5])
def test_tensors_arrays_and_containers_come_back(tmp_path, how):
    found = read_pickled(write(tmp_path / "any.name", content(), how))
    expected = {key: value.data if isinstance(value, torch.nn.Parameter) else value for key, value in content().items()}
    expected["name"] = 3
    assert plain(found) == plain(expected)
    assert type(found["name"]) is int and type(next(k for k in found if k == "name")) is str
    assert list(found["ordered"]) == ["weight", "bias"] and hasattr(content()["ordered"], "_metadata")
    assert isinstance(found["tensor"], StoredTensor) and found["tensor"].stride == (1, 3)


@pytest.mark.parametrize("how", ["zip", "before zip", 0, 1, 2, 3, 4, 5])
def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path, how):
    mark = tmp_path / "mark"
    path = write(tmp_path / "x", {"a": [Payload(mark)]}, how)
    with pytest.raises(RefusedPickleError, match=r"x: expected a pickle of tensors.*global '(nt|posix)\.mkdir'"):
        read_pickled(path)
    assert not mark.exists()
    # The test's own pickle would have run.
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_a_payload_within_a_tensors_bytes_is_refused(tmp_path):
    inner = io.BytesIO()
    torch.save(Payload(tmp_path / "mark"), inner, _use_new_zipfile_serialization=False)

    class Hidden:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    with pytest.raises(RefusedPickleError, match=r"global '(nt|posix)\.mkdir'"):
        read_pickled(write(tmp_path / "x", {"tensor": Hidden()}, 4))
    assert not (tmp_path / "mark").exists()


def program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93"


ORDERED = named("collections", "OrderedDict")
DTYPE = named("numpy", "dtype") + b"\x8c\x02i8\x85R"
PROGRAMS = {
    # Names that reach everything else.
    "getattr": (program(named("builtins", "getattr")), "global 'builtins.getattr'"),
    "eval of another time": (b"c__builtin__\neval\n(S'1'\ntR.", "global '__builtin__.eval'"),
    "instance": (b"(S'true'\nios\nsystem\n.", "global 'os.system'"),
    "dotted": (program(named("collections", "OrderedDict.fromkeys")), "global 'collections.OrderedDict.fromkeys'"),
    "torch.load": (program(named("torch", "load")), "global 'torch.load'"),
    "extension registry": (program(b"\x82\x01"), "opcode EXT1"),
    # numpy would take bytes for pointers.
    "structured type": (program(named("numpy", "dtype"), b"\x8c\x02V8\x85R"), "a numpy type that is no number"),
    "type with fields": (
        program(DTYPE, b"(K\x03\x8c\x01|N(\x8c\x01at}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"),
        "a numpy type that is no number",
    ),
    "scalar of objects": (
        program(
            named("numpy._core.multiarray", "scalar"), named("numpy", "dtype"), b"\x8c\x02O8\x85RC\x08AAAAAAAA\x86R"
        ),
        "a numpy scalar of objects",
    ),
    # A function is no object whose state could be set.
    "state of a function": (program(ORDERED, b"}\x8c\x04make\x8c\x01xsb"), "it sets the state of a _Named"),
    "attributes of a function": (program(ORDERED, b"N}\x8c\x04make\x8c\x01xs\x86b"), "it sets the state of a _Named"),
    "instance of a function": (program(ORDERED, b")\x81"), "NEWOBJ"),
    "call of a number": (program(b"K\x01)R"), "TypeError"),
    "a storage in a plain pickle": (program(b"K\x01Q"), "a plain pickle refers to storages"),
    # Small files that would fill the memory.
    "memo": (program(b"Nr\xff\xff\xff\xff"), "more than 5,000,000 steps"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "cannot be read"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"N.", "cannot be read"),
    "copies": (
        program(
            named("builtins", "set"), b"\x940](" + b"K\x01" * 2000 + b"e\x940](" + b"h\x00h\x01\x85R" * 2000 + b"e"
        ),
        "grows far beyond its size",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_no_training_writes(tmp_path, name):
    content, message = PROGRAMS[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_pickled(tmp_path / "x")
    assert "\n" not in str(error.value)


def rezipped(source: Path, target: Path, compression=zipfile.ZIP_STORED, **changed: bytes):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, changed.get(info.filename.partition("/")[2], old.read(info)))


def test_archives_that_torch_does_not_write(tmp_path):
    whole = write(tmp_path / "a", {"t": torch.zeros(1000)}, "zip")
    rezipped(whole, tmp_path / "deflated", zipfile.ZIP_DEFLATED)
    rezipped(whole, tmp_path / "short", **{"data/0": b"\0" * 8})
    rezipped(whole, tmp_path / "order", byteorder=b"big" if sys.byteorder == "little" else b"little")
    rezipped(whole, tmp_path / "whole")
    assert read_pickled(tmp_path / "whole")["t"].load().shape == (1000,)
    with zipfile.ZipFile(tmp_path / "other", "w") as archive:
        archive.writestr("a.txt", "x")
    messages = {
        "deflated": "compressed or encrypted",
        "short": "storage '0' does not hold its 1000 numbers",
        "order": "another byte order",
        "other": "none of torch.save",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"{name}: expected a whole file.*{message}"):
            read_pickled(tmp_path / name)


def test_one_number_does_not_stand_for_many(tmp_path):
    path = write(tmp_path / "x", {"t": torch.zeros(1).expand(10**12)}, "zip")
    assert path.stat().st_size < 5000
    with pytest.raises(ValueError, match=r"a tensor of shape \(1000000000000,\) lies outside its 1 stored numbers"):
        read_pickled(path)


@pytest.mark.parametrize("how", ["zip", "before zip", 4])
def test_a_part_of_a_file_is_an_error(tmp_path, how):
    whole = write(tmp_path / "x", {"t": torch.arange(100.0), "names": ["a", "b"]}, how).read_bytes()
    for length in range(0, len(whole) - 1, 37):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x: expected a whole file of torch.save or pickle"):
            read_pickled(tmp_path / "x")


def test_a_damaged_tensor_is_an_error(tmp_path):
    path = write(tmp_path / "x", {"t": torch.arange(100.0)}, "zip")
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x is damaged .*CRC"):
        read_pickled(path)["t"].load()


def test_no_change_of_bytes_gives_another_error(tmp_path):
    """Whatever the bytes are, reading gives a value or a ValueError."""
    rng, path = random.Random(0), tmp_path / "x"
    sources = [write(path, content(), how).read_bytes() for how in ("zip", "before zip", 2, 4)]
    outcomes = set()
    for _ in range(400):
        changed = bytearray(rng.choice(sources))
        for _ in range(rng.choice((1, 2, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            found = read_pickled(path)
            for value in found.values() if isinstance(found, dict) else ():
                plain(value)
            outcomes.add("value")
        except ValueError:
            outcomes.add("error")
    assert outcomes == {"value", "error"}


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="x: no such file"):
        read_pickled(tmp_path / "x")
