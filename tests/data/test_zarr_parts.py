"""Parts of zarr arrays that unpack to more than their values, and those of every packing that do not."""

import bz2
import json
import lzma
import struct
import zlib
from pathlib import Path

import anndata as ad
import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import zarr
from numcodecs import zarr3

from pertstate.cli import main
from pertstate.data import read_h5ad, simulate_screen
from pertstate.data.reading import AnnDataFile


pytestmark = pytest.mark.filterwarnings("ignore")
CODES = "obs/perturbation/codes"
# More than gzip could make of so few bytes.
LARGE = 1 << 27


@pytest.fixture
def store(tmp_path) -> Path:
    screen = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=6, cells_per_group=4, seed=1)
    screen.write_zarr(tmp_path / "screen.zarr")
    return tmp_path / "screen.zarr"


def made(path: Path) -> zarr.Group:
    """A store of format 3, each array of which says itself what it is."""
    screen = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=6, cells_per_group=4, seed=1)
    with ad.settings.override(zarr_write_format=3):
        screen.write_zarr(path)
    root = json.loads((path / "zarr.json").read_text())
    root.pop("consolidated_metadata", None)
    (path / "zarr.json").write_text(json.dumps(root))
    return zarr.open_group(str(path), use_consolidated=False)


def packed(store: Path, place: str, part: bytes, **settings):
    """Give the only part of an array another content and packing."""
    (store / ".zmetadata").unlink(missing_ok=True)
    path = store / place / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    (store / place / "0").write_bytes(part)


ZEROS = bytes(LARGE)
BLOSC = numcodecs.Blosc("zstd", 9, 0)
LARGE_PARTS = {
    "blosc": lambda: BLOSC.encode(ZEROS),
    "bz2": lambda: bz2.compress(ZEROS),
    "lzma": lambda: lzma.compress(ZEROS),
    "zstd": lambda: numcodecs.Zstd(1).encode(ZEROS),
    "lz4": lambda: struct.pack("<I", LARGE) + bytes(100),
}


@pytest.mark.parametrize("packing", LARGE_PARTS)
def test_a_part_that_unpacks_to_more_than_its_values_is_refused(store, packing, capsys):
    packed(store, CODES, LARGE_PARTS[packing](), compressor={"id": packing})
    with pytest.raises(
        ValueError, match=f"{CODES} has a part of .* bytes that unpacks to .* or more, expected at most"
    ):
        AnnDataFile(store)
    assert main(["info", str(store)]) == 1 and "write the store again" in capsys.readouterr().err


def test_a_frame_of_zstd_that_does_not_say_its_size_is_counted(store):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(ZEROS)
    part = sink.getvalue().to_pybytes()
    packed(store, CODES, part, compressor={"id": "zstd", "level": 1})
    with pytest.raises(ValueError, match="unpacks to"):
        AnnDataFile(store)


def test_a_part_that_is_too_long_for_its_values_is_refused(store):
    packed(store, CODES, zlib.compress(ZEROS), compressor={"id": "zlib"})
    with pytest.raises(ValueError, match=f"{CODES} has a part of .* bytes for values of .* at most"):
        AnnDataFile(store)


def test_more_texts_than_a_part_has_are_refused(store):
    packed(store, "var/_index", struct.pack("<I", 2**32 - 1), compressor=None)
    with pytest.raises(ValueError, match="var/_index has a part that says that it has 4,294,967,295 texts, expected 6"):
        AnnDataFile(store)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compressor": {"id": "zlib"}, "filters": [{"id": "zlib"}]}, "is packed 2 times over"),
        ({"compressor": {"id": "crc32"}, "filters": [{"id": "zstd"}]}, "is packed by zstd, crc32, of which the last"),
    ],
)
def test_values_that_are_packed_in_layers_are_refused(store, settings, message):
    packed(store, CODES, b"", **settings)
    with pytest.raises(ValueError, match=f"{CODES} {message}"):
        AnnDataFile(store)


@pytest.mark.parametrize("shards", [None, (40,)])
@pytest.mark.parametrize(
    "packing", ["blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd", "zarr_gzip", "zarr_zstd", "none"]
)
def test_every_packing_is_read(tmp_path, packing, shards):
    group = made(tmp_path / "screen.zarr")
    numbers = np.arange(group["obs/_index"].shape[0], dtype=np.int64) * 10**9
    compressors = {
        "blosc": zarr.codecs.BloscCodec(),
        "zarr_gzip": zarr.codecs.GzipCodec(),
        "zarr_zstd": zarr.codecs.ZstdCodec(checksum=True),
        "none": None,
    }
    wrappers = {"bz2": "BZ2", "gzip": "GZip", "lz4": "LZ4", "lzma": "LZMA", "zlib": "Zlib", "zstd": "Zstd"}
    codec = compressors[packing] if packing in compressors else getattr(zarr3, wrappers[packing])()
    array = group["obs"].create_array(
        "number", shape=numbers.shape, dtype=numbers.dtype, chunks=(4,), shards=shards, compressors=codec
    )
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    array[:] = numbers
    group["obs"].attrs["column-order"] = [*group["obs"].attrs["column-order"], "number"]
    assert read_h5ad(tmp_path / "screen.zarr").obs["number"].tolist() == numbers.tolist()


@pytest.mark.parametrize("at", ["start", "end"])
def test_parts_within_a_file_of_several_are_checked(tmp_path, at):
    group = made(tmp_path / "screen.zarr")
    sharding = zarr.codecs.ShardingCodec(
        chunk_shape=(2,),
        codecs=[zarr.codecs.BytesCodec(), zarr.codecs.ZstdCodec()],
        index_codecs=[zarr.codecs.BytesCodec()],
        index_location=at,
    )
    array = group.create_array("uns/x", shape=(4,), dtype="i8", chunks=(4,), serializer=sharding, compressors=None)
    array[:] = np.arange(4)
    AnnDataFile(tmp_path / "screen.zarr")
    part = numcodecs.Zstd(1).encode(ZEROS)
    start = 32 if at == "start" else 0
    index = struct.pack("<4Q", start, len(part), 2**64 - 1, 2**64 - 1)
    (tmp_path / "screen.zarr" / "uns" / "x" / "c" / "0").write_bytes(index + part if at == "start" else part + index)
    with pytest.raises(ValueError, match="uns/x has a part of .* bytes that unpacks to 134,217,728 or more"):
        AnnDataFile(tmp_path / "screen.zarr")
