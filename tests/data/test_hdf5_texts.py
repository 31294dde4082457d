"""The bytes of texts, counted where they lie, are those that come out when they are read."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from pertstate.cli import main
from pertstate.data import hdf5_texts
from pertstate.data.hdf5_texts import CheckedBytes, text_bytes
from pertstate.data.self_contained import check_hdf5


TEXTS = ["", "a", "bc", "ä" * 7, "d" * 300] * 101
TEXT = h5py.string_dtype()
RAGGED = np.empty(3, dtype=object)
RAGGED[:] = [np.arange(n, dtype=np.int32) for n in (0, 5, 1000)]


def compact(file: h5py.File):
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((len(TEXTS),))
    dataset = h5py.h5d.create(file.id, b"x", h5py.h5t.py_create(TEXT, logical=True), space, created)
    h5py.Dataset(dataset)[:] = TEXTS


LENGTH = sum(len(text.encode()) for text in TEXTS)
RECORDS = np.array(
    [(i, text, i / 2, "xy") for i, text in enumerate(TEXTS)], [("a", "i2"), ("b", TEXT), ("c", "f8"), ("d", TEXT)]
)
WRITERS = {
    "in one piece": (lambda file: file.create_dataset("x", data=TEXTS, dtype=TEXT), LENGTH),
    "of rows and columns": (
        lambda file: file.create_dataset("x", data=np.reshape(np.array(TEXTS, object), (101, 5)), dtype=TEXT),
        LENGTH,
    ),
    "in parts": (lambda file: file.create_dataset("x", data=TEXTS, dtype=TEXT, chunks=(64,)), LENGTH),
    "gzip": (lambda file: file.create_dataset("x", data=TEXTS, dtype=TEXT, chunks=(64,), compression="gzip"), LENGTH),
    "shuffled": (
        lambda file: file.create_dataset("x", data=TEXTS, dtype=TEXT, compression="gzip", shuffle=True),
        LENGTH,
    ),
    "lzf": (lambda file: file.create_dataset("x", data=TEXTS, dtype=TEXT, chunks=(64,), compression="lzf"), LENGTH),
    "records": (lambda file: file.create_dataset("x", data=RECORDS), LENGTH + 2 * len(TEXTS)),
    "records in parts": (
        lambda file: file.create_dataset("x", data=RECORDS, chunks=(100,), compression="gzip"),
        LENGTH + 2 * len(TEXTS),
    ),
    "lists": (lambda file: file.create_dataset("x", data=RAGGED, dtype=h5py.vlen_dtype(np.int32)), 4 * 1005),
    "in a header": (compact, LENGTH),
    "one text": (lambda file: file.create_dataset("x", data="abc", dtype=TEXT), 3),
    "no text": (lambda file: file.create_dataset("x", shape=(0,), dtype=TEXT), 0),
    "never written": (lambda file: file.create_dataset("x", shape=(1000,), dtype=TEXT), 0),
    "numbers": (lambda file: file.create_dataset("x", data=np.arange(1000)), 0),
    "of one width": (lambda file: file.create_dataset("x", data=np.array(TEXTS[:3], dtype="S9")), 0),
}


@contextmanager
def checked(path: Path) -> Iterator[tuple[h5py.File, CheckedBytes]]:
    """A file whose heaps are checked while it is read."""
    with CheckedBytes(path) as content, h5py.File(content, "r") as file:
        content.opened(file)
        yield file, content


@pytest.mark.parametrize("block", [0, 512])
@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_counted(tmp_path, name, block):
    write, expected = WRITERS[name]
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=block) as file:
        write(file)
    with checked(tmp_path / "x.h5") as (file, content):
        assert text_bytes(file["x"].id, content, 10**12, 10**6) == expected


@pytest.mark.parametrize("name", ["in one piece", "gzip", "records in parts"])
def test_they_are_counted_without_being_read(tmp_path, name, monkeypatch):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        WRITERS[name][0](file)
    monkeypatch.setattr(hdf5_texts, "_counted", None)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    with checked(tmp_path / "x.h5") as (file, content):
        assert text_bytes(h5py.h5d.open(file.id, b"x"), content, 10**12, 10**6) == WRITERS[name][1]


def test_counting_ends_where_it_is_enough(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        compact(file)
    with checked(tmp_path / "x.h5") as (file, content):
        found = text_bytes(file["x"].id, content, 1000, 1 << 29)  # two texts at once
        assert 1000 < found < 2000


def test_lists_of_texts_are_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        kind = h5py.h5t.array_create(h5py.h5t.py_create(TEXT, logical=True), (2,))
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((3,)))
    with checked(tmp_path / "x.h5") as (file, content), pytest.raises(ValueError, match="lists of texts are not read"):
        text_bytes(h5py.h5d.open(file.id, b"x"), content, 10, 10)


def parts_of_heap(content: bytes) -> tuple[int, int]:
    """Where the first text of the first heap begins with its header, and where the free rest of the heap does."""
    heap = content.index(b"GCOL")
    first = place = heap + 16
    while struct.unpack_from("<H", content, place)[0]:
        place += 16 + (struct.unpack_from("<Q", content, place + 8)[0] + 7) // 8 * 8
    return first, place


def an_attribute(file: h5py.File):
    file.create_group("x").attrs.create("names", TEXTS[:3], dtype=TEXT)


def a_fill_value(file: h5py.File):
    file.create_dataset("x", shape=(10,), chunks=(5,), dtype=TEXT, fillvalue="abc")


HELD = {name: write for name, (write, expected) in WRITERS.items() if expected and name != "of one width"}
HELD |= {"an attribute": an_attribute, "a fill value": a_fill_value}
REFUSED = r"the texts at byte [\d,]+ of the file are damaged; copy the file again"


@pytest.mark.parametrize("end", [0, 1 << 33], ids=["small", "large"])
@pytest.mark.parametrize("block", [0, 512])
@pytest.mark.parametrize("name", HELD)
def test_a_damaged_heap_is_refused_whatever_has_its_texts(tmp_path, name, block, end):
    """HDF5 reads it for ever where the free rest has no size."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=block) as file:
        HELD[name](file)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, parts_of_heap(content)[1] + 8, 0)
    path.write_bytes(content)
    if end:
        os.truncate(path, end)  # it takes no room on the disk
    with h5py.File(path) as file, pytest.raises(ValueError, match=REFUSED):
        check_hdf5(file)


@pytest.mark.parametrize("part, size", [(0, 2**64 - 16), (0, 2**40), (1, 0), (1, 15), (1, 2**40)])
def test_a_heap_is_damaged_in_many_ways(tmp_path, part, size):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=TEXTS[:3], dtype=TEXT)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, parts_of_heap(content)[part] + 8, size)
    path.write_bytes(content)
    with h5py.File(path) as file, pytest.raises(ValueError, match=REFUSED):
        check_hdf5(file)


@pytest.mark.parametrize("name", HELD)
def test_heaps_as_they_are_written_are_whole(tmp_path, name):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        HELD[name](file)
    with h5py.File(tmp_path / "x.h5") as file:
        check_hdf5(file)


def test_an_attribute_of_one_text_many_times_is_refused(tmp_path):
    """All could be the one of 10 MB."""
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as file:
        file.create_group("x").attrs.create("names", ["d" * 10_000_019, *TEXTS[:2000]], dtype=TEXT)
    with h5py.File(tmp_path / "x.h5") as file, pytest.raises(ValueError, match=r"506 texts of up to 10,000,056 bytes"):
        check_hdf5(file)


def test_a_file_whose_heap_is_damaged_is_one_line(tmp_path, capsys):
    path = tmp_path / "x.h5ad"
    ad.AnnData(np.eye(3, dtype="float32"), obs=pd.DataFrame(index=["a", "b", "c"])).write_h5ad(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, parts_of_heap(content)[1] + 8, 0)
    path.write_bytes(content)
    assert main(["info", str(path)]) == 1
    assert "are damaged; copy the file again" in capsys.readouterr().err
