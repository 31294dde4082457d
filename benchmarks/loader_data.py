"""
A simulated `.h5ad` for the readers of the loader benchmark. Its cells are in random order and are written block by block.

    python benchmarks/loader_data.py FILE --cells 40000 --genes 2000 --density 0.1 --dense

This prints how many cells the file holds.
"""

import argparse
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from loader_readers import (
    BATCH,
    CELL_TYPE,
    CELL_TYPES,
    CONTROL,
    COUNTS,
    DENSE,
    MARK_GENES,
    PERTURBATION,
    SEED,
    TARGET_SUM,
    group_code,
)


# Groups are whole multiples of this, so that no reader pads or drops sentences of 64 or 512 cells.
CELLS_OF_GROUP = 512
BATCHES = 4
ROWS_AT_ONCE = 1000


def write_screen(path: Path, cells: int, genes: int, density: float, dense: bool) -> int:
    """
    Write up to `cells` cells, of which about one in ten is a control. Returns how many were written.

    `X` is log1p of counts per 10,000 (CSR, float32), `layers["counts"]` the counts, and with `dense`, `obsm["X_hvg"]`
    the values of `X`.

    Raises:
        ValueError: too few or too many cells to make groups of.
    """
    groups = cells // CELL_TYPES // CELLS_OF_GROUP
    perturbations = min(int(0.9 * cells) // CELL_TYPES // CELLS_OF_GROUP, groups - 1)
    controls = (groups - perturbations) * CELLS_OF_GROUP
    if perturbations < 1 or group_code(CELL_TYPES - 1, perturbations) >= 2**MARK_GENES:
        raise ValueError(f"cells: expected {2 * CELL_TYPES * CELLS_OF_GROUP:,} to 2,000,000, found {cells:,}")
    of_group = np.full((CELL_TYPES, perturbations + 1), CELLS_OF_GROUP)
    of_group[:, 0] = controls
    cell_type = np.repeat(np.arange(CELL_TYPES), of_group.sum(axis=1))
    perturbation = np.repeat(np.tile(np.arange(perturbations + 1), CELL_TYPES), of_group.ravel())
    order = np.random.default_rng(SEED).permutation(len(cell_type))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, cell_type[order], perturbation[order], genes, density, dense)
    return len(order)


def _write(path: Path, cell_type, perturbation, genes: int, density: float, dense: bool):
    names = np.array([CONTROL] + [f"p{i}" for i in range(1, perturbation.max() + 1)])
    obs = pd.DataFrame(
        {
            PERTURBATION: pd.Categorical(names[perturbation]),
            CELL_TYPE: pd.Categorical(np.array([f"line{i}" for i in range(CELL_TYPES)])[cell_type]),
            BATCH: pd.Categorical(np.array([f"b{i}" for i in range(BATCHES)])[np.arange(len(cell_type)) % BATCHES]),
        },
        index=[f"c{i}" for i in range(len(cell_type))],
    )
    ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])).write_h5ad(path)
    code = group_code(cell_type, perturbation)
    stride = int(1 / density)
    expressed = (genes - MARK_GENES) // stride
    generator = np.random.default_rng([SEED, genes])
    marks = code[:, None] >> np.arange(MARK_GENES) & 1
    indptr = np.concatenate([[0], np.cumsum(marks.sum(axis=1) + expressed)])
    with h5py.File(path, "r+") as file:
        # Not chunked, as anndata writes matrices by default.
        values, counts = (_new_csr(file, key, indptr, genes) for key in ("X", f"layers/{COUNTS}"))
        if dense:
            matrix = file.create_dataset(f"obsm/{DENSE}", (len(obs), genes), dtype=np.float32)
            matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, len(obs), ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, len(obs)))
            block = _counts(marks[rows], genes, stride, generator)
            log1p = _counts_to_log1p(block)
            for group, part in ((counts, block), (values, log1p)):
                group["data"][indptr[rows.start] : indptr[rows.stop]] = part.data
                group["indices"][indptr[rows.start] : indptr[rows.stop]] = part.indices
            if dense:
                matrix[rows] = log1p.toarray()


def _new_csr(file: h5py.File, key: str, indptr: np.ndarray, genes: int) -> h5py.Group:
    group = file.create_group(key)
    shape = np.array([len(indptr) - 1, genes])
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    group.create_dataset("data", (indptr[-1],), dtype=np.float32)
    group.create_dataset("indices", (indptr[-1],), dtype=np.int32)
    group["indptr"] = indptr.astype(np.int32)
    return group


def _counts(marks: np.ndarray, genes: int, stride: int, generator: np.random.Generator) -> sp.csr_matrix:
    """Counts of some cells, which express the genes of their marks and one gene in every `stride`."""
    starts = np.arange(MARK_GENES, genes - stride + 1, stride)
    drawn = starts + generator.integers(stride, size=(len(marks), len(starts)))
    indices = np.concatenate([part for mark, row in zip(marks, drawn) for part in (np.flatnonzero(mark), row)])
    indptr = np.concatenate([[0], np.cumsum(marks.sum(axis=1) + len(starts))])
    data = generator.geometric(0.5, len(indices)).astype(np.float32)
    return sp.csr_matrix((data, indices.astype(np.int32), indptr), shape=(len(marks), genes))


def _counts_to_log1p(counts: sp.csr_matrix) -> sp.csr_matrix:
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.repeat((TARGET_SUM / totals).astype(np.float32), np.diff(counts.indptr))
    return sp.csr_matrix((np.log1p(counts.data * scale), counts.indices, counts.indptr), shape=counts.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--cells", type=int, required=True)
    parser.add_argument("--genes", type=int, required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--dense", action="store_true", help="also as a dense obsm entry")
    arguments = parser.parse_args()
    print(write_screen(**vars(arguments)))


if __name__ == "__main__":
    main()
