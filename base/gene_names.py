"""Names of genes: Ensembl ids with or without version, and what is said of genes that are missing."""

import re

import anndata as ad
import numpy as np
import pandas as pd

from .labels import label_text


# The largest share of genes that may be missing by default.
MAX_MISSING_GENES = 0.5
_VERSION = re.compile(r"^(ENS[A-Z]*[GTP]\d{6,})\.\d+$")


def without_version(name: str) -> str:
    """An Ensembl id without its version; any other name as it is."""
    found = _VERSION.match(name)
    return found.group(1) if found else name


def texts_of(column: pd.Series) -> pd.Series:
    """A column of var as names of genes: numbers (Entrez ids) are written alike, however they are stored."""
    return column.map(label_text).astype(str)


def other_names(adata: ad.AnnData, missing: list[str]) -> str:
    """What might match where genes are missing, for errors: a column of var, names without versions, or in another case."""
    wanted = set(missing)
    for column in getattr(adata, "var", pd.DataFrame()).columns:
        if len(wanted & set(texts_of(adata.var[column]))) > len(wanted) / 2:
            return f"; var[{column!r}] has them: set gene_key: {column}"
    bare = {without_version(name) for name in wanted}
    if len(bare & {without_version(str(name)) for name in adata.var_names}) > len(bare) / 2:
        return "; they match without the versions of Ensembl ids: set ignore_gene_versions: true"
    upper = {name.upper() for name in wanted}
    if len(upper & {str(name).upper() for name in adata.var_names}) > len(upper) / 2:
        return "; they match in another case: rename the genes of the data"
    return ""


def missing_note(columns: np.ndarray, most: float = MAX_MISSING_GENES) -> str | None:
    """
    A sentence that says how many genes of a model are read as unexpressed; None if the data have all of them.

    Args:
        columns (`np.ndarray` of shape `(genes,)`): the column of each gene in the data, -1 where it has none.
        most (`float`): the largest share of genes that may be missing.

    Raises:
        ValueError: more genes are missing, or `most` is not between 0 and 1.
    """
    if not 0 <= most <= 1:
        raise ValueError(f"max_missing_genes={most}: expected a share of the genes, 0 to 1")
    missing = int((columns < 0).sum())
    if not missing:
        return None
    note = f"{missing} of {len(columns)} genes of the model are missing from the data"
    if missing > most * len(columns):
        raise ValueError(
            f"{note}: expected at most {most:.0%}; give data with more of them, or allow it with max_missing_genes "
            "(--max-missing-genes 1)"
        )
    return f"{note} and are read as unexpressed"


__all__ = ["missing_note", "other_names", "without_version"]
