"""Choosing highly variable genes of data that do not fit in memory."""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse as sp

from pertstate.base.cell_values import highly_variable_genes


def variable_genes(
    blocks: Sequence[tuple[int, Callable[[], sp.csr_matrix]]], genes: list[str], number: int
) -> list[str]:
    """
    [`highly_variable_genes`] of cells that are read block by block.

    Args:
        blocks (`list[tuple[int, Callable]]`): for each block, its number of cells and a function that reads its log1p
            expression, CSR.
        genes (`list[str]`): names of the columns.
        number (`int`): how many to choose.

    Raises:
        ValueError: there are fewer genes.
    """
    if not 1 <= number <= len(genes):
        raise ValueError(f"genes={number}: expected between 1 and the {len(genes)} genes that the data have")
    if number == len(genes):
        return genes
    import dask
    import dask.array as da

    empty = sp.csr_matrix((0, len(genes)), dtype=np.float64)

    def exact(read) -> sp.csr_matrix:
        return read().astype(np.float64)  # so that sums do not depend on the blocks

    parts = [
        da.from_delayed(dask.delayed(exact, pure=False)(read), shape=(cells, len(genes)), dtype=np.float64, meta=empty)
        for cells, read in blocks
        if cells
    ]
    # One block at a time: memory matters more here than time.
    with dask.config.set(scheduler="synchronous"):
        return highly_variable_genes(da.concatenate(parts), genes, number)
