"""Which name of a gene is meant: a column of var, Ensembl ids with or without version, the genes of `raw`."""

import re
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from .messages import closest, some


# The share of genes that may be missing, where nobody says another.
MAX_MISSING_GENES = 0.5
_VERSION = re.compile(r"^(ENS[A-Z]*[GTP]\d{6,})\.\d+$")


class GeneView:
    """
    An AnnData, or what reads a file like one, whose genes go by other names; and whose `X` is that of `raw` where this is
    asked for.

    Args:
        data (`AnnData`): the cells.
        var_names (`pandas.Index`): the names of its genes.
        raw (`AnnData.raw`, *optional*): where `X` is taken from.
    """

    def __init__(self, data: ad.AnnData, var_names: pd.Index, raw=None):
        self._data, self.var_names, self._raw = data, var_names, raw

    @property
    def X(self):
        return self._data.X if self._raw is None else self._raw.X

    def __getattr__(self, name: str):
        return getattr(self._data, name)


def without_version(name: str) -> str:
    """An Ensembl id without its version; any other name as it is."""
    found = _VERSION.match(name)
    return found.group(1) if found else name


def view_of(data: ad.AnnData, source: str, gene_key: str | None, ignore_versions: bool) -> tuple[ad.AnnData, str]:
    """
    The data with the names of genes that are meant, and where the values then are.

    Args:
        source (`str`): `"X"`, `"layers/NAME"`, `"obsm/NAME"`, or `"raw/X"`, whose genes are those of `raw`.
        gene_key (`str`, *optional*): the column of var that holds the names.
        ignore_versions (`bool`): leave the versions of Ensembl ids out.

    Raises:
        KeyError: there is no such column, or no `raw`.
        ValueError: a gene has no name in the column.
    """
    of_raw = source == "raw/X"
    if not (of_raw or gene_key or ignore_versions):
        return data, source
    raw: Any = data.raw if of_raw else None
    if of_raw and raw is None:
        raise KeyError(f"input 'raw/X': the data have no raw, found X and layers {some(data.layers)}")
    var_names = pd.Index(raw.var_names if of_raw else data.var_names)
    if gene_key is not None:
        var = raw.var if of_raw else data.var
        if gene_key not in var:
            raise KeyError(
                f"var has no column {gene_key!r} (gene_key), found {some(var.columns)}; "
                f"{closest(gene_key, var.columns) if len(var.columns) else 'leave gene_key out'}"
            )
        if var[gene_key].isna().any():
            raise ValueError(f"var[{gene_key!r}] is empty for {int(var[gene_key].isna().sum())} genes; name them")
        var_names = pd.Index(var[gene_key].astype(str).to_numpy())
    if ignore_versions:
        var_names = pd.Index([without_version(str(name)) for name in var_names])
    return GeneView(data, var_names, raw), "X" if of_raw else source


def other_names(adata: ad.AnnData, missing: list[str]) -> str:
    """What might match where genes are missing, for errors: a column of var, names without versions, or in another case."""
    wanted = set(missing)
    for column in getattr(adata, "var", pd.DataFrame()).columns:
        if len(wanted & set(adata.var[column].astype(str))) > len(wanted) / 2:
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
    A sentence on genes that are read as unexpressed, by their columns (-1 is none); None where all are there.

    Args:
        most (`float`): the largest share of genes that may be missing.

    Raises:
        ValueError: more are.
    """
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


__all__ = ["GeneView", "view_of"]
