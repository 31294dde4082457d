"""Cells on the device: the same batches as on the host, whatever their values, their matrix and the room that there is."""

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch

from pertstate.base.cell_sentences import SentenceLayout
from pertstate.data import CellStore, load_store, prepare, simulate_screen
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.cells_on_device import CellRows, RowsOnDevice
from pertstate.data.splits import Splits


CPU = torch.device("cpu")
WIDE = 1 << 40


def values(kind: str, cells=50, genes=30, seed=0) -> np.ndarray:
    """Cells with many zeros, float32."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.3, (cells, genes)).astype(np.float32)
    most = {"counts": 1, "many counts": 300, "very many counts": 40_000}
    if kind in most:
        return counts * most[kind]
    log1p = np.log1p(counts * rng.uniform(1, 9, (cells, 1))).astype(np.float32)
    made = {"log1p": log1p, "half": log1p.astype(np.float16).astype(np.float32), "zeros": 0 * counts}
    return made[kind] if kind in made else rng.normal(size=counts.shape).astype(np.float32)


def drawn(cells: int, sizes, seed=1) -> tuple[SentenceLayout, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return SentenceLayout(sizes), [rng.integers(cells, size=n) for n in sizes]


def expected(matrix: np.ndarray, layout: SentenceLayout, rows: list[np.ndarray]) -> np.ndarray:
    return layout.spread(matrix[np.concatenate(rows)])


KINDS = {
    "counts": "sparse uint8",
    "many counts": "sparse int16",
    "very many counts": "sparse int32",
    "log1p": "sparse float32",
    "half": "sparse float16",
    "zeros": "sparse uint8",
    "embedding": "dense float32",
}


@pytest.mark.parametrize("kept", [0, 17, 50])
@pytest.mark.parametrize("kind, layout", KINDS.items())
def test_a_matrix_in_memory_comes_back_to_the_bit(kind, layout, kept):
    matrix = values(kind)
    order = np.random.default_rng(2).permutation(50)
    whole = RowsOnDevice(CellRows(matrix), order, CPU, WIDE)
    assert (whole.layout, whole.kept, whole.needed) == (layout, 50, whole.nbytes)
    each = np.full(50, whole.needed / 50) if "dense" in layout else None
    sizes = each if each is not None else (matrix[order] != 0).sum(axis=1) * (whole._dtype.itemsize + 2) + 8
    part = RowsOnDevice(CellRows(matrix), order, CPU, int(sizes[:kept].sum()))
    assert (part.kept, part.nbytes) == (kept, int(sizes[:kept].sum()))
    for sizes in ([4, 4], [1, 5, 3]):
        sentences, rows = drawn(50, sizes)
        for found in (whole, part):
            out = found.read(sentences, rows)
            assert out.dtype == torch.float32
            np.testing.assert_array_equal(out.numpy(), expected(matrix, sentences, rows))


def test_cells_that_are_not_of_the_run_are_read_where_they_are():
    matrix = np.concatenate([values("counts"), values("embedding", cells=20)])
    for budget in (0, 300, WIDE):
        there = RowsOnDevice(CellRows(matrix), np.arange(10, 40), CPU, budget)
        sentences, rows = drawn(70, [9, 30])
        np.testing.assert_array_equal(there.read(sentences, rows).numpy(), expected(matrix, sentences, rows))


def test_wide_matrices_and_narrow_ids():
    for genes, ids in ((1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        matrix = np.zeros((3, genes), dtype=np.float32)
        matrix[[0, 1, 2], [0, genes - 1, 7]] = 1.5
        there = RowsOnDevice(CellRows(matrix), np.arange(3), CPU, WIDE)
        assert there._columns.dtype == ids
        sentences, rows = drawn(3, [6])
        np.testing.assert_array_equal(there.read(sentences, rows).numpy(), expected(matrix, sentences, rows))


@pytest.fixture(scope="module")
def screen():
    adata = simulate_screen(num_contexts=3, num_perturbations=3, num_genes=70, cells_per_group=20, seed=4)
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    scaled = adata.X / np.maximum(np.asarray(adata.X.sum(axis=1)).reshape(-1, 1), 1) * 1e4
    adata.layers["log1p"] = sp.csr_matrix(np.log1p(sp.csr_matrix(scaled).toarray()).astype(np.float32))
    adata.obsm["X_emb"] = np.random.default_rng(0).normal(size=(adata.n_obs, 5)).astype(np.float32)
    return adata


# Some genes, in another order than that of the data.
FEW = [f"gene_{i}" for i in range(60, 3, -3)]
STORES = [
    ({}, {}, {}),
    ({}, {"layout": "dense"}, {}),
    ({}, {}, {"normalize": "none"}),
    ({}, {}, {"genes": FEW}),
    ({"input": "layers/log1p"}, {}, {}),
    ({"input": "layers/log1p"}, {"dtype": "float16"}, {}),
    ({"input": "layers/log1p"}, {"layout": "dense"}, {"genes": FEW}),
    ({"input": "obsm/X_emb"}, {}, {}),
    ({"input": "obsm/X_emb", "gene_input": "layers/log1p"}, {"dtype": "float16"}, {}),
]


def in_pieces(store: CellStore, path) -> CellStore:
    """The same cells in record batches of 37."""
    (table,) = [batch for batches in store.batches_of_shards() for batch in batches]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        for start in range(0, len(store), 37):
            writer.write_batch(table.slice(start, 37))
    return CellStore.of_files(store.path, store.manifest, [path])


@pytest.mark.parametrize("share", [0, 0.4, 1])
@pytest.mark.parametrize("number", range(len(STORES)))
def test_a_store_gives_the_values_of_the_host(screen, tmp_path_factory, number, share):
    reading, written, loaded = STORES[number]
    folder = tmp_path_factory.getbasetemp() / f"on-device-{number}"
    if not folder.exists():
        folder.mkdir()
        screen.write_h5ad(folder / "screen.h5ad")
        data = DataArguments(datasets={"screen": str(folder / "screen.h5ad")}, batch_key="batch", **reading)
        prepare(data, folder / "store", PrepareArguments(shard_megabytes=1, **written), quiet=True)
    cells, _ = load_store(
        in_pieces(CellStore(folder / "store"), folder / f"pieces-{share}.arrow"),
        Splits({"screen": []}, {"screen"}),
        **loaded,
    )
    for matrix in filter(lambda of: of is not None, (cells.features, cells.genes)):
        rows = np.random.default_rng(0).permutation(len(cells))
        needed = RowsOnDevice(CellRows(matrix), rows, CPU, WIDE).needed
        there = RowsOnDevice(CellRows(matrix), rows, CPU, int(needed * share))
        assert there.kept == len(cells) if share == 1 else there.kept < len(cells)
        sentences, asked = drawn(len(cells), [30, 7, 30])
        found, wanted = there.read(sentences, asked).numpy(), expected(matrix[:], sentences, asked)
        if matrix._scale_to is None:
            np.testing.assert_array_equal(found, wanted)
        else:
            # Two implementations of log1p, each to the last digit but one.
            np.testing.assert_allclose(found, wanted, rtol=3e-7)
