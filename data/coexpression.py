"""Vectors of perturbed genes from how genes vary together in control cells, so that perturbations without cells can be predicted."""

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.linalg import eigh

from pertstate.base.cell_source import CellSource
from pertstate.base.messages import closest, some
from pertstate.base.vocabulary import PerturbationFeatures
from pertstate.processing import StateProcessor


# What a run writes instead of the name of a file of vectors.
COEXPRESSION = "coexpression"
# The width of a vector, and the largest number of control cells that are read for it.
COMPONENTS, MAX_CELLS = 32, 2048


def coexpression_features(
    source: CellSource, processor: StateProcessor, controls: np.ndarray, perturbations: list[str]
) -> PerturbationFeatures:
    r"""
    A vector for each gene that some control cells express: its weights in the principal components of the covariance of genes.

    The components are those of the log1p expression of the model's genes, centred within each (dataset, context). With the
    scores `s_j` of the cells on component j, of unit norm, the vector of a gene with centred expression x has the entries
    `x . s_j / sqrt(cells)`: the gene's loading times the component's standard deviation. Genes that the model does not read get
    theirs in the same way. All vectors are divided by one number, so that those of the model's genes have a mean square norm
    of 1.

    Args:
        source ([`CellSource`]): the cells.
        processor ([`StateProcessor`]): with the genes of the model, and what is done to the values.
        controls (`np.ndarray` of shape `(groups,)`): whether a group is of control cells that are trained on.
        perturbations (`list[str]`): those that need a vector, each named like its gene.

    Returns:
        [`PerturbationFeatures`], of width [`COMPONENTS`], or less where there are fewer genes or cells.

    Raises:
        ValueError: there is no expression, or a perturbation is not among the genes that control cells express.
    """
    if source.expression is None:
        raise ValueError(
            "data.perturbation_features=coexpression: expected expression, found an embedding alone; name the expression with "
            "gene_input, or give a file of vectors"
        )
    expression, places = _expression(source, processor.target_sum, controls)
    number = len(places)
    read = pd.Index(source.genes).get_indexer(processor.vocabulary.genes)
    centred = expression[:, read].toarray().astype(np.float64)
    for place in np.unique(places):
        centred[places == place] -= centred[places == place].mean(axis=0)
    width = min(COMPONENTS, *centred.shape)
    if centred.shape[0] <= centred.shape[1]:
        squares, scores = eigh(centred @ centred.T, subset_by_index=[number - width, number - 1])
    else:
        size = centred.shape[1]
        squares, loadings = eigh(centred.T @ centred, subset_by_index=[size - width, size - 1])
        scores = centred @ loadings / np.sqrt(np.maximum(squares, 1e-12))
    scores = scores[:, squares > squares.max() * 1e-9][:, ::-1]
    # A component may point either way; the largest entry is made positive.
    scores *= np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(scores.shape[1])])
    vectors = (expression.T @ scores) / np.sqrt(number)
    vectors /= np.sqrt((vectors[read] ** 2).sum(axis=1).mean())
    # A gene that no cell expresses varies with no other one.
    known = np.flatnonzero(expression.getnnz(axis=0) > 0)
    names = [source.genes[i] for i in known]
    _check(perturbations, names, set(source.genes))
    kept = [i for i, name in zip(known, names) if name != processor.control]
    return PerturbationFeatures([source.genes[i] for i in kept], vectors[kept])


def _expression(source: CellSource, target_sum: float | None, controls: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """The log1p expression `(cells, genes)` of at most [`MAX_CELLS`] control cells, evenly drawn, and the number of their place."""
    place_of = source.groups.groupby(["dataset", "context"], sort=True).ngroup().to_numpy()
    parts, places, seen = [], [], 0
    with source.blocks(controls) as blocks:
        step = max(1, -(-sum(size for size, _ in blocks) // MAX_CELLS))
        for _, read in blocks:
            block = read()
            chosen = np.arange(-seen % step, len(block.codes), step)
            parts.append(block.log1p(target_sum)[chosen])
            places.append(place_of[block.codes[chosen]])
            seen += len(block.codes)
    return sp.vstack(parts, format="csr"), np.concatenate(places)


def _check(perturbations: list[str], known: list[str], measured: set[str]):
    of = set(known)
    missing = [name for name in perturbations if name not in of]
    if not missing:
        return
    silent = [name for name in missing if name in measured]
    raise ValueError(
        f"data.perturbation_features=coexpression: expected perturbations named like genes that control cells express; "
        f"{len(missing)} of {len(perturbations)} are not: {some(missing)}"
        + (f" (measured, and 0 in all of these cells: {some(silent)})" if silent else f"; {closest(missing[0], known)}")
        + "; rename them with perturbation_map, leave their cells out with include, or give a file of vectors"
    )
