"""Files of perturbation features that claim, share or compress more than they hold: one error, in no time and little memory."""

import io
import json
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from little_room import in_little_room
from safetensors.numpy import save_file

from pertstate.data.perturbation_features import read_perturbation_features


SECONDS = 20


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode("latin1") + content


def member(content: bytes, name: str = "A.npy", **options):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
            archive.writestr(name, content)

    return write


def zeros_in_a_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive, archive.open("A.npy", "w") as file:
        file.write(npy(header(((1 << 27) // 8,)), b""))
        for _ in range(32):
            file.write(bytes(1 << 22))


def overlapping(path):
    """A thousand members that are one in the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("A.npy", npy(header(((1 << 24) // 8,)), bytes(1 << 24)))
        first = archive.infolist()[0]
        for i in range(1000):
            other = zipfile.ZipInfo(f"B{i}.npy")
            for field in ("CRC", "compress_size", "file_size", "header_offset", "compress_type", "flag_bits"):
                setattr(other, field, getattr(first, field))
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
            archive._didModify = True


def twice(path):
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning):
        for value in (1.0, 2.0):
            content = io.BytesIO()
            np.save(content, np.full(3, value))
            archive.writestr("A.npy", content.getvalue())


def header(shape=(3,), descr="'<f8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


def many_rows(path, rows: int = 20_000_000):
    """One value in many rows, which parquet writes once."""
    value = pa.RecordBatch.from_arrays([pa.array(["A"] * 1000), pa.array(np.zeros(1000))], names=["name", "x"])
    with pq.ParquetWriter(path, value.schema) as writer:
        large = pa.Table.from_batches([value] * 1000)
        for _ in range(rows // 1_000_000):
            writer.write_table(large, row_group_size=1_000_000)


def one_long_name(path):
    name = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["A" * 10**6]))
    pq.write_table(pa.table({"name": name, "x": np.arange(20_000.0)}), path, store_schema=False)


def a_list_of_a_billion(path):
    values = pa.array(np.zeros(50_000_000, np.int8))
    lists = pa.ListArray.from_arrays(pa.array([0, 50_000_000], pa.int32()), values)
    schema = pa.schema([("name", pa.string()), ("x", lists.type)])
    with pq.ParquetWriter(path, schema) as writer:
        for i in range(2):
            writer.write_table(pa.table({"name": [f"A{i}"], "x": lists}, schema=schema))


def pandas_says(content: bytes):
    def write(path):
        table = pa.table({"name": ["A"], "x": [1.0]})
        pq.write_table(table.replace_schema_metadata({b"pandas": content}), path)

    return write


def one_tensor_for_all(path):
    row = torch.ones(1_000_000)
    torch.save({f"A{i}": row for i in range(20_000)}, path)


def one_array_for_all(path):
    row = np.ones(1_000_000)
    path.write_bytes(pickle.dumps({f"A{i}": row for i in range(2_000)}))


def of_kind(kind: str):
    """Numbers of kinds that torch or numpy lacks; of a kind with too few bytes."""
    head = json.dumps({"A": {"dtype": kind, "shape": [3], "data_offsets": [0, 3]}}).encode()
    return lambda path: path.write_bytes(len(head).to_bytes(8, "little") + head + b"abc")


WRITERS = {
    "a header of a terabyte.npz": (member(npy(header((10**12,)))), "does not hold the"),
    "a shape that overflows.npz": (member(npy(header((2**62, 4)))), "does not hold the"),
    "a shape below zero.npz": (member(npy(header((-1,)), bytes(8))), "does not hold|shape"),
    "a shape that is none.npz": (member(npy("{'descr': '<f8', 'fortran_order': False, 'shape': 3}\n")), "shape"),
    "texts of no width.npz": (member(npy(header((10**15,), "'<U0'"))), "does not hold the"),
    "texts of a gigabyte.npz": (member(npy(header((1,), "'<U250000000'"))), "does not hold the"),
    "objects.npz": (member(npy(header((1,), "'|O'"), pickle.dumps([1]))), "Python objects, which are never read"),
    "objects in a record.npz": (member(npy(header((1,), "[('a', '|O')]"), bytes(8))), "Python objects"),
    "a type that is none.npz": (member(npy(header((1,), "'<q99'"), bytes(8))), "no array|descr"),
    "records of records.npz": (member(npy(header((1,), "[('a', " * 200 + "'<f8'" + ")]" * 200), bytes(8))), "."),
    "brackets.npz": (member(npy("(" * 9000)), "no array of numpy|Cannot parse header"),
    "minus signs.npz": (member(npy("-" * 9000 + "1")), "no array of numpy|Cannot parse header"),
    "a long header.npz": (member(npy(header() + " " * 60_000, bytes(24))), "Header info length"),
    "no end of a header.npz": (member(npy("{'descr': (\n", b"")), "no array of numpy|Cannot parse header"),
    "a later version.npz": (member(npy(header(), bytes(24), b"\x03\x00")), "of a format that no numbers need"),
    "no array.npz": (member(b"text"), "magic string"),
    "zeros.npz": (zeros_in_a_zip, "would take 134,2"),
    "many that are one.npz": (overlapping, "would take 16,"),
    "a name twice.npz": (twice, "a name stands twice"),
    "not a number.npz": (lambda path: np.savez(path, A=np.array([1.0, np.nan])), "found nan in the vector of 'A'"),
    "records.npz": (lambda path: np.savez(path, A=np.zeros(2, "f4,f4")), "expected numbers"),
    "complex numbers.npz": (lambda path: np.savez(path, A=np.zeros(2, complex)), "expected numbers"),
    "names of half pairs.npz": (
        lambda path: np.savez(path, names=np.array(["\ud800"]), features=np.ones((1, 2))),
        "expected a name for each vector",
    ),
    "a field of a megabyte.csv": (lambda path: path.write_text("name,x\n" + "A" * 10**6 + ",1\n"), "field larger"),
    "a name too long.csv": (
        lambda path: path.write_text("name,x\n" + "A" * 110_000 + ",1\n"),
        "characters that can be",
    ),
    "zeros of bytes.csv": (lambda path: path.write_bytes(b"name,x\nA\0,1\n"), "NUL|expected a name"),
    "nothing but zeros.csv": (lambda path: path.write_bytes(bytes(10**6)), "."),
    "quotes.csv": (lambda path: path.write_text('name,x\n"A,1\n' * 1000), "."),
    "a number of a megabyte.csv": (lambda path: path.write_text("name,x\nA," + "9" * 130_000 + "\n"), "found inf"),
    "names that are one.csv": (lambda path: path.write_text("name,x\n" + "A,1\n" * 200_000), "names stand twice"),
    "not a number.csv": (lambda path: path.write_text("name,x\nA,nan\n"), "found nan in the vector of 'A'"),
    "many rows.parquet": (many_rows, "would take"),
    "one long name.parquet": (one_long_name, "would take|expected a name for each|names stand twice"),
    "a list of a billion.parquet": (a_list_of_a_billion, "would take"),
    "names that are one.parquet": (
        lambda path: pd.DataFrame({"name": ["A"] * 100_000, "x": 1.0}).to_parquet(path),
        "names stand twice",
    ),
    "a column twice.parquet": (
        lambda path: pq.write_table(pa.table([["A"], [1.0], [2.0]], names=["name", "x", "x"]), path),
        "stands twice|stand twice",
    ),
    "pandas says a list.parquet": (pandas_says(b"[1]"), "read: "),
    "pandas says nothing.parquet": (pandas_says(b"{"), "not whole|Expecting"),
    "pandas says brackets.parquet": (pandas_says(b"[" * 100_000), "nested too deep"),
    "pandas says a number.parquet": (pandas_says(b'{"index_columns": 5}'), "read: "),
    "one tensor for all.pt": (one_tensor_for_all, "would take"),
    "one array for all.pt": (one_array_for_all, "would take"),
    "objects.pt": (lambda path: path.write_bytes(pickle.dumps({"A": np.array([1, "a"], object)})), "expected numbers"),
    "lists.pt": (
        lambda path: path.write_bytes(pickle.dumps({"A": [1.0]})),
        "expected a vector for each name, found list",
    ),
    "code.pt": (lambda path: path.write_bytes(pickle.dumps({"A": os.system})), "nothing of it was run"),
    "not a number.pt": (lambda path: torch.save({"A": torch.tensor([torch.nan])}, path), "found nan"),
    "brackets.safetensors": (
        lambda path: save_file({"features": np.ones((1, 2))}, path, {"names": "[" * 100_000}),
        "nested too deep",
    ),
    "names that are one.safetensors": (
        lambda path: save_file({"features": np.ones((2, 2))}, path, {"names": '["A", "A"]'}),
        "names stand twice",
    ),
    **{
        f"numbers of kind {kind}.safetensors": (of_kind(kind), "not a whole .safetensors file|expected numbers|read: ")
        for kind in ("F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "I128", "C64", "F32")
    },
    "names that are none.safetensors": (
        lambda path: save_file({"features": np.ones((1, 2))}, path, {"names": "5"}),
        "expected a list of names",
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_hostile_features_are_one_error(tmp_path, name):
    write, message = WRITERS[name]
    path = tmp_path / f"x.{name.rpartition('.')[2]}"
    write(path)
    start = time.perf_counter()
    said = in_little_room(read_perturbation_features, path)
    assert time.perf_counter() - start < SECONDS
    assert "Traceback" not in said and re.search(message, said) and len(said) < 2000, said[:3000]
    assert said.startswith((str(path), "read: ")), said[:300]


def test_a_file_on_which_pyarrow_ends_the_process_is_one_error():
    """It ends when it is asked for the columns. With little memory it would fail before."""
    path = Path(__file__).with_name("damaged_levels.parquet")
    said = in_little_room(read_perturbation_features, path, memory=None)
    assert said.startswith(f"{path}: cannot be read as parquet") and "histogram" in said
