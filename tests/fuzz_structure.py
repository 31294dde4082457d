"""Changes of files that stay JSON or HDF5: values, types, shapes and names are damaged, and not the bytes that hold them."""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from pertstate.data.self_contained import check_hdf5


# What readers stumble over in the place of a value of JSON.
_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *(
        "",
        " ",
        "a",
        "\0",
        "\ud800",
        "../../x",
        "/etc/passwd",
        "1",
        "nan",
        "X",
        "obsm/X_pca",
        "layers/",
        "x" * 1000,
        "<&>",
    ),
    *([], [[]], [None], [1, "a"], {}, {"": None}, {"a": {"a": []}}, [0] * 100, ["a", "a"]),
)


def json_changed(data: bytes, r: random.Random) -> bytes:
    """A JSON text with one to three values or names changed; as it is where it is no JSON."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(r.randint(1, 3)):
        content = _changed(content, r)
    return json.dumps(content).encode()


def _changed(content, r: random.Random):
    """A value, or a part of it at any depth, changed."""
    if not isinstance(content, (dict, list)) or not content or r.random() < 0.15:
        return r.choice(_VALUES)
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key, what = r.choice(keys), r.random()
    made = content.copy()
    if what < 0.1:
        del made[key]
    elif what < 0.2 and isinstance(made, dict):
        made[r.choice(["", "x", "auto_map", "dtype", "scale", "doses", *made])] = made.pop(key)
    elif what < 0.2:
        made.insert(key, content[key])
    elif what < 0.25:
        made[key] = content[r.choice(keys)]
    else:
        made[key] = _changed(content[key], r)
    return made


_ARRAYS: tuple[Callable[[np.ndarray], object], ...] = (
    lambda a: a[:0],
    lambda a: a[:-1],
    lambda a: np.concatenate([a, a]),
    lambda a: a.reshape(-1, 1),
    lambda a: a.reshape(1, *a.shape),
    lambda a: a.astype("S2"),
    lambda a: a.astype(np.float64) * np.nan,
    lambda a: np.full(a.shape, np.inf),
    lambda a: a.astype(np.int64) - 2**40,
    lambda a: np.full(a.shape, 2**64 - 1, np.uint64),
    lambda a: a.astype(np.complex64),
    lambda a: a.astype(bool),
    lambda a: np.float64(3),
    lambda a: h5py.Empty("f"),
    lambda a: b"text",
    lambda a: np.array([b"a", b"\xff", b""] * len(a), dtype=object)[: len(a)],
    lambda a: np.zeros(a.shape, dtype=[("x", "i4"), ("y", "S3")]),
)
_ATTRIBUTES = (
    *(
        "csr_matrix",
        "csc_matrix",
        "array",
        "dataframe",
        "dict",
        "categorical",
        "string-array",
        "anndata",
        "null",
        "bytes",
    ),
    *(
        "nullable-integer",
        "nullable-string-array",
        "rec-array",
        "awkward-array",
        "_index",
        "index",
        "barcodes",
        "0.1.0",
    ),
    *("", "\0", 5, -1, True, 2**40, 1.5, np.array([3, 4]), np.array([-1, 2**62]), np.array([b"x", b"y"], dtype="S1")),
    *(np.array([], dtype="S1"), h5py.Empty("f"), np.array(["perturbation", "perturbation", "gone"], dtype=object)),
)


# A dataset that other changes have made larger, in bytes, is left as it is: it would be read whole here.
_LARGEST = 1 << 24


def hdf5_changed(data: bytes, r: random.Random) -> bytes:
    """
    An HDF5 file with one to three datasets, groups or attributes changed. It is as it was where it is no HDF5, and where the
    reader refuses it: to change it, HDF5 would read what the reader does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder, "changed.h5ad")
        disk.write_bytes(data)
        try:
            with h5py.File(disk, "r") as file:
                check_hdf5(file)
            with h5py.File(disk, "r+") as file:
                for _ in range(r.randint(1, 3)):
                    _change_hdf5(file, r)
            return disk.read_bytes() if disk.stat().st_size <= len(data) + _LARGEST else data
        except Exception:  # noqa: BLE001 - what h5py cannot change stays as it is
            return data


def _change_hdf5(file: h5py.File, r: random.Random):
    places: list[str] = []
    file.visit(places.append)
    place, what = r.choice(places), r.random()
    node = file[place]
    if what < 0.1:
        del file[place]
    elif what < 0.2:
        file.move(
            place, r.choice([f"{place}2", f"obs/{r.choice('aX')}", f"uns/{r.choice('aX')}", f"var/{r.choice('aX')}"])
        )
    elif what < 0.3:
        other = r.choice(places)
        del file[place]
        file[place] = r.choice([file[other], h5py.SoftLink(f"/{other}"), h5py.SoftLink(f"/{place}")])
    elif what < 0.5 or isinstance(node, h5py.Group):
        node = r.choice([node, file])
        names = [
            *node.attrs,
            "_index",
            "column-order",
            "encoding-type",
            "shape",
            "categories",
            "ordered",
            "encoding-version",
        ]
        name = r.choice(names)
        if r.random() < 0.3 and name in node.attrs:
            del node.attrs[name]
        else:
            node.attrs[name] = r.choice([*_ATTRIBUTES, node.ref])
    elif node.size is None or node.size * node.dtype.itemsize <= _LARGEST:
        attributes = dict(node.attrs)
        value = r.choice(_ARRAYS)(node[()])
        del file[place]
        file[place] = value
        file[place].attrs.update(attributes)
