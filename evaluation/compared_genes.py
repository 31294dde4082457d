"""Which genes are scored: those that were predicted, or those of them that the real cells have."""

from dataclasses import dataclass

import numpy as np

from pertstate.base.gene_view import view_of
from pertstate.base.messages import some
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.group_means import GroupMeans
from pertstate.data.in_memory import CellData
from pertstate.processing import StateProcessor, Vocabulary


@dataclass
class ComparedGenes:
    """
    The genes that are scored.

    Args:
        scorer ([`StateProcessor`]): reads these genes of real cells.
        columns (`np.ndarray` of shape `(genes,)`, *optional*): their places among the predicted features; None for all.
    """

    scorer: StateProcessor
    columns: np.ndarray | None = None

    def of_predicted(self, cells: np.ndarray) -> np.ndarray:
        """The scored genes of predicted cells."""
        return cells if self.columns is None else np.ascontiguousarray(cells[:, self.columns])

    def of_means(self, means: GroupMeans, processor: StateProcessor | None) -> GroupMeans:
        """
        The scored genes of what the record of a model knows.

        Args:
            means ([`GroupMeans`]): of the record.
            processor ([`StateProcessor`], *optional*): of the same checkpoint, whose genes these are.

        Raises:
            ValueError: genes are scored that the model does not know.
        """
        columns = self._of_model(processor)
        return means if columns is None else means.of_features(columns)

    def of_intervals(self, intervals: ChangeIntervals, processor: StateProcessor | None) -> ChangeIntervals:
        """The same of the intervals in the record."""
        columns = self._of_model(processor)
        return intervals if columns is None else intervals.of_features(columns)

    def _of_model(self, processor: StateProcessor | None) -> np.ndarray | None:
        """The places of the scored genes among those of a model; None where they are the same, or genes have no names."""
        genes = self.scorer.vocabulary.genes
        if processor is None or not genes or processor.vocabulary.genes == genes:
            return None
        place = {gene: i for i, gene in enumerate(processor.vocabulary.genes)}
        unknown = [gene for gene in genes if gene not in place]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of the {len(genes)} scored genes are not among those of the model whose record says what the "
                f"baselines know: {some(unknown)}; name the training cells with --train, and no model"
            )
        return np.array([place[gene] for gene in genes])


def compared_genes(scorer: StateProcessor, real: CellData, name: str, common: bool, notes: list[str]) -> ComparedGenes:
    """
    Decide which genes are scored.

    Args:
        scorer ([`StateProcessor`]): reads real cells in the units and genes of the predictions.
        real ([`CellData`]): the real cells.
        name (`str`): what errors call them.
        common (`bool`): score the genes that both have.
        notes (`list[str]`): gets a note of how many genes these are.

    Raises:
        KeyError: genes that were predicted are missing from the real cells, and not only common genes are scored.
        ValueError: there is no common gene, or the predictions are no genes.
    """
    predicted = scorer.vocabulary.genes
    if not predicted:
        if common:
            raise ValueError("--common-genes: what was predicted is an embedding, which has no genes; leave it out")
        return ComparedGenes(scorer)
    view, _ = view_of(real, scorer.input, scorer.gene_key, scorer.ignore_gene_versions, scorer.duplicate_genes)
    there = set(map(str, view.var_names))
    columns = np.array([i for i, gene in enumerate(predicted) if gene in there], dtype=np.int64)
    missing = [gene for gene in predicted if gene not in there]
    if missing and not len(columns):
        raise ValueError(
            f"none of the {len(predicted)} predicted genes is in {name}: predicted {some(predicted, 3)}, real "
            f"{some(view.var_names, 3)}; give both the same kind of names"
        )
    if missing and not common:
        raise KeyError(
            f"{len(missing)} of the {len(predicted)} predicted genes are missing from {name}: {some(missing)}; score the "
            f"{len(columns)} genes that both have with --common-genes"
        )
    if common:
        notes.append(
            f"scored on the {len(columns)} genes that both have: {len(missing)} predicted genes are missing from the real cells, and "
            f"{len(there) - len(columns)} genes of the real cells were not predicted"
        )
    if not missing:
        return ComparedGenes(scorer)
    return ComparedGenes(scorer.with_vocabulary(Vocabulary(genes=[predicted[i] for i in columns])), columns)
