"""Choosing genes of data that do not fit in memory."""

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstate.cell_values import some


def shared_genes(var_names: list[pd.Index]) -> tuple[list[str], str | None]:
    """
    The genes that all files have, in the order of the first; and a note on how many fell out, where any did.

    Raises:
        ValueError: a file has a name twice, or the files have none in common.
    """
    shared = var_names[0]
    everything = set()
    for names in var_names:
        if not names.is_unique:
            duplicates = names[names.duplicated()].unique()
            raise ValueError(
                f"gene names are not unique, found {some(duplicates)} twice; run adata.var_names_make_unique()"
            )
        shared = shared[shared.isin(names)]
        everything.update(names)
    if len(shared) == 0:
        raise ValueError("the files have no gene name in common; give all of them the same kind of gene names")
    left = len(everything) - len(shared)
    note = f"{left} of {len(everything)} genes are not in every file: left out" if left else None
    return [str(name) for name in shared], note


def highly_variable_genes(
    blocks: list[tuple[int, Callable[[], sp.csr_matrix]]], genes: list[str], number: int
) -> list[str]:
    """
    The most variable genes of cells that are read block by block: `scanpy.pp.highly_variable_genes` (flavour "seurat").

    Args:
        blocks (`list[tuple[int, Callable]]`): cells of each block, and what reads it: log1p expression, CSR.
        genes (`list[str]`): names of the columns.
        number (`int`): how many to choose.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= number <= len(genes):
        raise ValueError(f"genes={number}: expected between 1 and the {len(genes)} genes that the data have")
    if number == len(genes):
        return genes
    import dask
    import dask.array as da
    import scanpy as sc

    shape = (len(genes),)
    empty = sp.csr_matrix((0, len(genes)), dtype=np.float64)

    def exact(read) -> sp.csr_matrix:
        return read().astype(np.float64)  # sums that do not depend on the blocks

    parts = [
        da.from_delayed(dask.delayed(exact, pure=False)(read), shape=(cells, *shape), dtype=np.float64, meta=empty)
        for cells, read in blocks
        if cells
    ]
    joined = ad.AnnData(da.concatenate(parts), var=pd.DataFrame(index=genes))
    # One block at a time: memory, not time, is what a store is short of.
    with dask.config.set(scheduler="synchronous"):
        sc.pp.highly_variable_genes(joined, n_top_genes=number)
    return [gene for gene, chosen in zip(genes, joined.var["highly_variable"]) if chosen]
