"""StateProcessor: AnnData to cell sentences, and predictions back to AnnData."""

import json
import os
from dataclasses import asdict, dataclass, field

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .cell_values import check_finite, kind_of_values, resolve_normalisation, some, take_rows, wrong_kind
from .configuration_state import closest
from .modeling_perturbation import (
    BATCH_IDS,
    CELL_MASK,
    CONTEXT_IDS,
    CONTROL_CELLS,
    PERTURBATION_DOSES,
    PERTURBATION_IDS,
    PerturbationOutput,
)


VOCABULARY_FILE = "vocabulary.json"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass
class Vocabulary:
    """The names behind a model's numbers, in order. Saved as `vocabulary.json` beside the weights.

    Args:
        genes (`list[str]`): features of a cell in the model's order; for an embedding, the genes of the gene decoder.
        perturbations (`list[str]`): single perturbations. The control is no perturbation and is not among them,
            except in converted checkpoints that gave it a row of its own.
        contexts (`list[str]`): cell types or lines seen in training.
        batches (`list[str]`): experimental batches seen in training.
    """

    genes: list[str] = field(default_factory=list)
    perturbations: list[str] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name, values in asdict(self).items():
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise ValueError(f"vocabulary {name!r}: expected a list of names, found {type(values).__name__}")
            duplicates = pd.Index(values)[pd.Index(values).duplicated()].unique().tolist()
            if duplicates:
                raise ValueError(f"vocabulary {name!r} has duplicates: {duplicates[:10]}; every name must be unique")

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Vocabulary":
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a whole JSON file ({error}); copy the checkpoint again") from error
        if not isinstance(content, dict) or set(content) != set(cls.__dataclass_fields__):
            raise ValueError(f"{path}: expected the lists {sorted(cls.__dataclass_fields__)}")
        return cls(**content)


class CellSentences(BatchFeature):
    """
    Model-ready tensors, `model(**sentences)`, and where each cell came from.

    Attributes:
        obs (`pandas.DataFrame`): one row per real (not padded) cell, in the order of the tensors.
        controls (`str`): which control cells went in, in words.
    """

    obs: pd.DataFrame
    controls: str


class StateProcessor(ProcessorMixin):
    r"""
    Turns control cells of an AnnData into cell sentences, and a model's output into an AnnData.

    Made by [`StateProcessor.fit`] on training data, or by `from_pretrained` from a checkpoint; the arguments below
    are what it remembers.

    Args:
        vocabulary ([`Vocabulary`]): names of genes, perturbations, contexts and batches.
        perturbation_key (`str`): obs column with the name of each cell's perturbation.
        control (`str`): the name of unperturbed cells in that column.
        context_key (`str`): obs column with each cell's context (cell type or line).
        batch_key (`str`, *optional*): obs column with each cell's experimental batch.
        input (`str`): where the cells are read from.

            - `"X"`: the main matrix
            - `"layers/NAME"`: a layer
            - `"obsm/NAME"`: an embedding
        gene_input (`str`, *optional*): for an embedding with a gene decoder, where expression is read from (`"X"` or
            `"layers/NAME"`).
        values (`str`): what a model's features are.

            - `"log1p"`: log1p expression
            - `"counts"`: raw counts
            - `"embedding"`: dimensions of an embedding
        normalize (`str`): what is done to the values that are read.

            - `"log1p_cp10k"`: they are counts; scaled to `target_sum` counts a cell (summed over all genes of the
              data, not only the model's), then log1p
            - `"none"`: nothing
        target_sum (`float`): counts per cell after scaling.
        combination_separator (`str`, *optional*): joins the names of perturbations applied together; None where
            there are no combinations (or names contain the character).
        feature_dim (`int`): features of a cell.
        set_size (`int`): cells of a sentence.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None = None,
        perturbation_key: str = "perturbation",
        control: str = "control",
        context_key: str = "cell_type",
        batch_key: str | None = None,
        input: str = "X",
        gene_input: str | None = None,
        values: str = "log1p",
        normalize: str = "none",
        target_sum: float = 1e4,
        combination_separator: str | None = "+",
        feature_dim: int | None = None,
        set_size: int = 128,
    ):
        self.vocabulary = vocabulary if vocabulary is not None else Vocabulary()
        self.perturbation_key = perturbation_key
        self.control = control
        self.context_key = context_key
        self.batch_key = batch_key
        self.input = input
        self.gene_input = gene_input
        self.values = values
        self.normalize = normalize
        self.target_sum = target_sum
        self.combination_separator = combination_separator
        self.feature_dim = feature_dim if feature_dim is not None else len(self.vocabulary.genes)
        self.set_size = set_size
        self.chat_template = None  # the inherited save looks for it
        self._ids = {
            kind: {name: i for i, name in enumerate(getattr(self.vocabulary, kind))}
            for kind in ("perturbations", "contexts", "batches")
        }

    # Learning from data

    @classmethod
    def fit(
        cls,
        adata: "ad.AnnData | list[ad.AnnData]",
        perturbation_key: str = "perturbation",
        control: str = "control",
        context_key: str = "cell_type",
        batch_key: str | None = None,
        input: str = "X",
        genes: int | list[str] | None = None,
        normalize: str = "auto",
        combination_separator: str | None = "+",
        gene_input: str | None = None,
        set_size: int = 128,
    ) -> "StateProcessor":
        r"""
        Learn gene order, normalisation and vocabularies from training cells (one AnnData or several).

        Args:
            adata (`AnnData` or list of them): training cells, those of held-out contexts and perturbations left out.
                Several are joined on the genes that all have.
            genes (`int`, `list[str]` or None): the model's genes: this many highly variable ones (scanpy, flavour
                "seurat", on the cells given), the ones listed, or all. With an embedding as `input`: those of the
                gene decoder.
            normalize (`str`): `"auto"` finds out whether the values are counts (then `"log1p_cp10k"`) or log1p
                already (then `"none"`); `"log1p_cp10k"`; `"none"` keeps values as they are, counts included.

            The other arguments are those of the class.

        Raises:
            KeyError: a column, layer or obsm entry is missing; what exists is listed.
            ValueError: values are NaN, negative, neither counts nor log1p, or contradict `normalize`; no cell is a
                control; a label is missing.
        """
        adatas = list(adata) if isinstance(adata, (list, tuple)) else [adata]
        if not adatas:
            raise ValueError("expected training cells, found an empty list of AnnData")
        if normalize not in ("auto", "log1p_cp10k", "none"):
            raise ValueError(f"normalize={normalize!r}; {closest(normalize, ('auto', 'log1p_cp10k', 'none'))}")
        processor = cls(
            perturbation_key=perturbation_key,
            control=control,
            context_key=context_key,
            batch_key=batch_key,
            input=input,
            gene_input=gene_input,
            combination_separator=combination_separator or None,
            set_size=set_size,
        )
        embedding = input.startswith("obsm/")
        if gene_input is not None and not embedding:
            raise ValueError(
                f"gene_input={gene_input!r} feeds the gene decoder of a model on embeddings; input={input!r} is "
                "expression itself: leave gene_input out"
            )
        expression = gene_input if embedding else input
        singles, contexts, batches, widths, found = set(), set(), set(), set(), set()
        names: set[str] = set()
        for data in adatas:
            labels = processor.labels(data)
            names.update(labels["perturbation"].unique())
            contexts.update(labels["context"].unique())
            if batch_key is not None:
                batches.update(labels["batch"].unique())
            if embedding:
                widths.add(processor._matrix(data, input).shape[1])
            if expression is not None:
                found.add(kind_of_values(take_rows(processor._matrix(data, expression), slice(0, 2000))))
        if control not in names:
            raise ValueError(
                f"no control cells: no cell has obs[{perturbation_key!r}] == {control!r}, found {some(sorted(names))}; "
                "say which label marks the controls with control="
            )
        for name in names:
            singles.update(processor.split_combination(name))
        if len(widths) > 1:
            raise ValueError(f"{input}: expected one width in all files, found {sorted(widths)}")
        if expression is not None:
            processor.normalize, values = resolve_normalisation(normalize, found, expression)
        elif normalize == "log1p_cp10k":
            raise ValueError(f"normalize='log1p_cp10k' is for counts; input={input!r} is an embedding: use 'none'")
        processor.values = "embedding" if embedding else values
        if embedding and expression is not None and values == "counts":
            raise ValueError(
                f"the gene decoder predicts log1p expression, {gene_input} holds counts: use normalize='auto'"
            )
        genes_of_model = processor._choose_genes(adatas, genes, expression) if expression is not None else []
        vocabulary = Vocabulary(genes_of_model, sorted(singles), sorted(contexts), sorted(batches))
        settings = {name: getattr(processor, name) for name in _SETTINGS}
        settings["feature_dim"] = widths.pop() if embedding else len(genes_of_model)
        return cls(vocabulary=vocabulary, **settings)

    def _choose_genes(self, adatas, genes, expression: str) -> list[str]:
        shared = adatas[0].var_names
        for data in adatas:
            if not data.var_names.is_unique:
                duplicates = data.var_names[data.var_names.duplicated()].unique()
                raise ValueError(
                    f"gene names are not unique, found {some(duplicates)} twice; run adata.var_names_make_unique()"
                )
            shared = shared[shared.isin(data.var_names)]
        if len(shared) == 0:
            raise ValueError("the files have no gene name in common; give all of them the same kind of gene names")
        if genes is None:
            return [str(g) for g in shared]
        if isinstance(genes, str):
            raise ValueError(f"genes={genes!r}: expected a number of highly variable genes, or a list of gene names")
        if not isinstance(genes, (int, np.integer)):
            genes = [str(g) for g in genes]
            missing = [g for g, there in zip(genes, pd.Index(genes).isin(shared)) if not there]
            if missing:
                raise KeyError(f"{len(missing)} of {len(genes)} listed genes are not in the data: {missing[:10]}")
            return genes
        if not 1 <= genes <= len(shared):
            raise ValueError(f"genes={genes}: expected between 1 and the {len(shared)} genes that the data have")
        if genes == len(shared):
            return [str(g) for g in shared]
        # A checkpoint's user never chooses genes: scanpy is not needed to load this file.
        try:
            import scanpy as sc
        except ImportError as error:
            raise ImportError("choosing highly variable genes needs scanpy: pip install scanpy") from error
        blocks = []
        for data in adatas:
            columns = data.var_names.get_indexer(shared)
            block, _ = self._expression(data, expression, slice(None), columns, as_log1p=True)
            blocks.append(sp.csr_matrix(block))
        joined = ad.AnnData(sp.vstack(blocks, format="csr"), var=pd.DataFrame(index=shared))
        sc.pp.highly_variable_genes(joined, n_top_genes=genes)
        return [str(g) for g in shared[joined.var["highly_variable"].to_numpy()]]

    # Saving and loading

    def to_dict(self) -> dict:
        output = super().to_dict()
        output.pop("vocabulary")
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write `processor_config.json` and `vocabulary.json` (and this code); optionally push them to the Hub."""
        os.makedirs(save_directory, exist_ok=True)
        partial = os.path.join(save_directory, VOCABULARY_FILE + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self.vocabulary), file, ensure_ascii=False, indent=0)
        os.replace(partial, os.path.join(save_directory, VOCABULARY_FILE))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "StateProcessor":
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        path = cached_file(pretrained_model_name_or_path, VOCABULARY_FILE, **hub)
        return super().from_pretrained(pretrained_model_name_or_path, vocabulary=Vocabulary.from_file(path), **kwargs)

    # Labels

    def labels(self, adata: ad.AnnData) -> pd.DataFrame:
        """Columns `perturbation`, `context` and (with a `batch_key`) `batch` of each cell, as plain strings."""
        columns = {"perturbation": self.perturbation_key, "context": self.context_key}
        if self.batch_key is not None:
            columns["batch"] = self.batch_key
        frame = {}
        for name, key in columns.items():
            if key not in adata.obs:
                raise KeyError(
                    f"obs has no column {key!r} ({name}), found {some(adata.obs.columns)}; "
                    f"{closest(key, adata.obs.columns) if len(adata.obs.columns) else 'add it'}"
                )
            column = adata.obs[key]
            if column.isna().any():
                first = adata.obs_names[column.isna().to_numpy()][0]
                raise ValueError(f"obs[{key!r}] is empty in {int(column.isna().sum())} cells, first in {first!r}")
            frame[name] = column.astype(str).to_numpy()
            blank = np.isin(frame[name], [label for label in pd.unique(frame[name]) if not label.strip()])
            if blank.any():
                first = adata.obs_names[blank][0]
                raise ValueError(f"obs[{key!r}] is blank in {int(blank.sum())} cells, first in {first!r}")
        return pd.DataFrame(frame, index=adata.obs_names)

    def split_combination(self, name: str) -> list[str]:
        """The perturbations in a label: none for the control, several for a combination."""
        if name == self.control or name in self._ids["perturbations"]:
            return [] if name == self.control and name not in self._ids["perturbations"] else [name]
        parts = name.split(self.combination_separator) if self.combination_separator else [name]
        if not all(part.strip() for part in parts):
            raise ValueError(
                f"perturbation {name!r} has an empty part around {self.combination_separator!r}; where the character "
                "belongs to a name, set combination_separator=None"
            )
        return [part.strip() for part in parts if part.strip() != self.control]

    def encode_perturbations(self, names) -> np.ndarray:
        """Labels to ids of shape `(len(names), K)`, int64, padded with -1; all -1 is the control.

        Raises:
            KeyError: a perturbation is not in the vocabulary; the nearest names are said.
        """
        known = self._ids["perturbations"]
        parts = []
        for name in names:
            split = self.split_combination(str(name))
            unknown = [part for part in split if part not in known]
            if unknown:
                raise KeyError(
                    f"perturbation {unknown[0]!r} is unknown to this model ({len(known)} are known); "
                    + closest(unknown[0], known)
                )
            parts.append([known[part] for part in split])
        width = max([1, *map(len, parts)])
        return np.array([part + [-1] * (width - len(part)) for part in parts], dtype=np.int64).reshape(-1, width)

    def encode_contexts(self, names) -> np.ndarray:
        """Contexts to ids, int64; -1 for one that was not seen in training."""
        return np.array([self._ids["contexts"].get(str(name), -1) for name in names], dtype=np.int64)

    def encode_batches(self, names) -> np.ndarray:
        """Batches to ids, int64; -1 for one that was not seen in training, which only a model without batches takes."""
        return np.array([self._ids["batches"].get(str(name), -1) for name in names], dtype=np.int64)

    # Values

    def features(self, adata: ad.AnnData, rows=slice(None), missing_genes: str = "error", input: str | None = None):
        """
        The model's features of some cells, `(cells, feature_dim)` float32: read, checked, put into the model's gene
        order and normalised. Works on a backed AnnData and reads only the rows asked for.

        Args:
            rows (`slice` or sorted integer array): which cells.
            missing_genes (`str`): `"error"`, or `"zero"` to read genes that the data lack as unexpressed.
            input (`str`, *optional*): read from here instead of the processor's `input`.
        """
        source = input or self.input
        if self.values == "embedding":
            matrix = take_rows(self._matrix(adata, source), rows)
            matrix = np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=np.float32)
            if matrix.shape[1] != self.feature_dim:
                raise ValueError(f"{source}: expected {self.feature_dim} dimensions, found {matrix.shape[1]}")
            check_finite(matrix, adata, rows, source)
            return matrix
        return self._genes(adata, source, rows, missing_genes, as_log1p=self.values == "log1p")

    def gene_features(self, adata: ad.AnnData, rows=slice(None)) -> np.ndarray:
        """The gene decoder's target, `(cells, genes)` float32 log1p expression, for a model on embeddings."""
        return self._genes(adata, self.gene_input, rows, "error", as_log1p=True)

    def _genes(self, adata, source, rows, missing_genes, as_log1p) -> np.ndarray:
        if missing_genes not in ("error", "zero"):
            raise ValueError(f"missing_genes={missing_genes!r}; expected 'error' or 'zero'")
        genes = self.vocabulary.genes
        if not adata.var_names.is_unique:
            names = pd.Index(adata.var_names)
            duplicates = names[names.duplicated()].unique().intersection(pd.Index(genes))
            duplicates = duplicates.tolist()
            if duplicates:
                raise ValueError(
                    f"genes of the model stand twice in the data: {some(duplicates)}; run adata.var_names_make_unique()"
                )
            columns = pd.Series(np.arange(len(names)), index=names)[lambda s: ~s.index.duplicated()]
            columns = columns.reindex(genes, fill_value=-1).to_numpy()
        else:
            columns = adata.var_names.get_indexer(genes)
        missing = [g for g, c in zip(genes, columns) if c < 0]
        if missing and (missing_genes == "error" or len(missing) == len(genes)):
            raise KeyError(
                f"{len(missing)} of the model's {len(genes)} genes are missing from the data: {missing[:10]}"
                + ("; pass missing_genes='zero' to read them as unexpressed" if len(missing) < len(genes) else "")
                + f" (the data's genes look like {some(adata.var_names, 3)})"
            )
        present = columns[columns >= 0]
        block, _ = self._expression(adata, source, rows, present, as_log1p)
        dense = block.toarray() if sp.issparse(block) else np.asarray(block)
        if not missing:
            return np.ascontiguousarray(dense, dtype=np.float32)
        full = np.zeros((dense.shape[0], len(genes)), dtype=np.float32)
        full[:, columns >= 0] = dense
        return full

    def _expression(self, adata, source: str, rows, columns, as_log1p: bool):
        """Checked and normalised expression of some rows and columns, CSR or dense float32, and the raw kind."""
        matrix = take_rows(self._matrix(adata, source), rows)
        check_finite(matrix, adata, rows, source, nonnegative=True)
        kind = kind_of_values(matrix)
        expected = "counts" if self.normalize == "log1p_cp10k" or self.values == "counts" else "log1p"
        if kind not in (expected, "zeros"):
            raise ValueError(wrong_kind(source, expected, kind, self.target_sum))
        if expected == "counts" and as_log1p:
            totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).reshape(-1, 1)
            scale = (self.target_sum / np.where(totals == 0, 1, totals)).astype(np.float32)
            matrix = matrix[:, columns]
            if sp.issparse(matrix):
                matrix = sp.csr_matrix(matrix, dtype=np.float32)
                matrix.data *= np.repeat(scale.ravel(), np.diff(matrix.indptr))
                np.log1p(matrix.data, out=matrix.data)
                return matrix, kind
            return np.log1p(matrix.astype(np.float32) * scale), kind
        return matrix[:, columns].astype(np.float32), kind

    def _matrix(self, adata: ad.AnnData, source: str):
        if source == "X":
            if adata.X is None:
                raise KeyError(f"input 'X': the data have no X, found layers {some(adata.layers)}")
            return adata.X
        kind, _, name = source.partition("/")
        if kind not in ("layers", "obsm") or not name:
            raise ValueError(f"input={source!r}: expected 'X', 'layers/NAME' or 'obsm/NAME'")
        holder = getattr(adata, kind)
        if name not in holder:
            raise KeyError(f"{kind} has no entry {name!r}, found {some(holder)}; {closest(name, ['X', *holder])}")
        return holder[name]

    # Sentences

    def __call__(
        self,
        adata: ad.AnnData,
        perturbation: str | list[str],
        context: str | list[str] | None = None,
        doses: list[float] | None = None,
        missing_genes: str = "error",
        input: str | None = None,
        seed: int | None = None,
    ) -> CellSentences:
        r"""
        Sentences of control cells for virtual experiments: the controls of each context with each perturbation.

        Args:
            adata (`AnnData`): holds control cells (`obs[perturbation_key] == control`); other cells are not used.
            perturbation (`str` or `list[str]`): what to predict; `"A+B"` is a combination.
            context (`str` or `list[str]`, *optional*): these contexts, all of the data by default.
            doses (`list[float]`, *optional*): weight of each perturbation of a combination, 1 by default.
            missing_genes (`str`): `"error"`, or `"zero"` to read genes that the data lack as unexpressed.
            input (`str`, *optional*): read cells from here instead of the processor's `input`.
            seed (`int`, *optional*): shuffle the controls of each context before they are cut into sentences.

        Returns:
            [`CellSentences`]: `control_cells` (B, S, feature_dim), `perturbation_ids` (B, K), `context_ids` (B,),
            `cell_mask` (B, S), and where they apply `perturbation_doses` (B, K) and `batch_ids` (B, S). Every control
            cell stands in one sentence per perturbation; sentences of a context have sizes that differ by one at most.

        Raises:
            KeyError: an unknown perturbation or context, a missing gene, column or entry.
            ValueError: no control cells in a context, NaN or negative values, counts where log1p is expected.
        """
        names = [perturbation] if isinstance(perturbation, str) else list(dict.fromkeys(perturbation))
        if not names:
            raise ValueError("perturbation: expected at least one name, found an empty list")
        ids = self.encode_perturbations(names)
        if doses is not None and len(doses) != ids.shape[1]:
            raise ValueError(f"doses: expected {ids.shape[1]} (one for each perturbation together), found {len(doses)}")
        labels = self.labels(adata)
        groups = self.control_groups(labels, context)
        cut = {name: self.cut(rows, seed) for name, rows in groups.items()}
        size = max(len(rows) for sentences in cut.values() for rows in sentences)
        cells = {}
        for name, sentences in cut.items():
            rows = np.sort(np.concatenate(sentences))
            values = self.features(adata, rows, missing_genes, input)
            cells[name] = [values[np.searchsorted(rows, sentence)] for sentence in sentences]

        batch: dict[str, list] = {CONTROL_CELLS: [], CELL_MASK: [], PERTURBATION_IDS: [], CONTEXT_IDS: []}
        if self.batch_key is not None:
            batch[BATCH_IDS] = []
        obs = []
        for name, encoded in zip(names, ids):
            for context_name, sentences in cut.items():
                for rows, values in zip(sentences, cells[context_name]):
                    real = np.arange(size) < len(rows)
                    batch[CONTROL_CELLS].append(np.pad(values, ((0, size - len(rows)), (0, 0))))
                    batch[CELL_MASK].append(real)
                    batch[PERTURBATION_IDS].append(encoded)
                    batch[CONTEXT_IDS].append(self.encode_contexts([context_name])[0])
                    frame = {self.perturbation_key: name, self.context_key: context_name}
                    if self.batch_key is not None:
                        of_cells = labels["batch"].to_numpy()[rows]
                        frame[self.batch_key] = of_cells
                        batch[BATCH_IDS].append(np.pad(self.encode_batches(of_cells), (0, size - len(rows))))
                    frame["control_barcode"] = adata.obs_names[rows].to_numpy()
                    obs.append(pd.DataFrame(frame))
        tensors = {key: torch.from_numpy(np.stack(value)) for key, value in batch.items()}
        if doses is not None:
            tensors[PERTURBATION_DOSES] = torch.tensor([doses] * len(tensors[CELL_MASK]), dtype=torch.float32)
        sentences = CellSentences(tensors)
        sentences.obs = pd.concat(obs, ignore_index=True)
        sentences.controls = "; ".join(f"{name}: {len(rows)} control cells" for name, rows in groups.items())
        return sentences

    def control_groups(self, labels: pd.DataFrame, context: str | list[str] | None = None) -> dict[str, np.ndarray]:
        """Context to the row numbers of its control cells. ValueError for a context without any."""
        present = pd.unique(labels["context"])
        wanted = list(present) if context is None else [context] if isinstance(context, str) else list(context)
        if not wanted:
            raise ValueError(
                "the data hold no cells, so no control cells" if context is None else "context: found an empty list"
            )
        unknown = [name for name in wanted if name not in present]
        if unknown:
            raise KeyError(f"context {unknown[0]!r} is not in the data; {closest(unknown[0], present)}")
        is_control = (labels["perturbation"] == self.control).to_numpy()
        groups = {}
        for name in wanted:
            rows = np.flatnonzero(is_control & (labels["context"] == name).to_numpy())
            if len(rows) == 0:
                raise ValueError(
                    f"context {name!r} has no control cells (obs[{self.perturbation_key!r}] == {self.control!r}); add "
                    "some, or leave the context out with context="
                )
            groups[name] = rows
        return groups

    def cut(self, rows: np.ndarray, seed: int | None = None) -> list[np.ndarray]:
        """Row numbers in sentences of at most `set_size`, of nearly equal sizes."""
        if seed is not None:
            rows = np.random.default_rng(seed).permutation(rows)
        return np.array_split(rows, -(-len(rows) // self.set_size))

    def decode(self, outputs: PerturbationOutput, sentences: CellSentences, checkpoint: str | None = None):
        r"""
        Predicted cells as an AnnData.

        Args:
            outputs ([`PerturbationOutput`]): what `model(**sentences)` returned.
            sentences ([`CellSentences`]): what this processor returned.
            checkpoint (`str`, *optional*): name of the model, to be recorded.

        Returns:
            `AnnData`: X holds the predicted cells, padding left out, named by gene (of an embedding with a gene
            decoder: the decoded expression in X, the embedding in `obsm["embedding"]`); `layers["control"]` (an
            embedding: `obsm["control"]`) the control cells that went in; obs the perturbation, context, batch and
            barcode of the control cell; `uns["cellstate"]` says what X holds.
        """
        mask = sentences[CELL_MASK].cpu().numpy().astype(bool)
        predictions = outputs.predictions.detach().float().cpu().numpy()
        if predictions.shape[:2] != mask.shape or mask.sum() != len(sentences.obs):
            raise ValueError(f"outputs of shape {predictions.shape} do not belong to sentences of shape {mask.shape}")
        controls = sentences[CONTROL_CELLS].float().cpu().numpy()[mask]
        genes = outputs.gene_predictions
        genes = None if genes is None else genes.detach().float().cpu().numpy()[mask]
        obs = sentences.obs.copy()
        obs.index = obs["control_barcode"].astype(str) + "|" + obs[self.perturbation_key].astype(str)
        return self.to_anndata(predictions[mask], controls, genes, obs, sentences.controls, checkpoint)

    def to_anndata(self, predictions, controls, genes, obs, controls_note: str, checkpoint: str | None) -> ad.AnnData:
        """An AnnData of predicted cells, laid out as [`StateProcessor.decode`] says."""
        uns = {"cellstate": self.describe_output(genes is not None, controls_note, checkpoint)}
        if self.values == "embedding":
            obsm = {"control": controls}
            if genes is not None:
                var = pd.DataFrame(index=self.vocabulary.genes)
                return ad.AnnData(genes, obs=obs, var=var, obsm={**obsm, "embedding": predictions}, uns=uns)
            var = pd.DataFrame(index=[f"dim_{i}" for i in range(predictions.shape[1])])
            return ad.AnnData(predictions, obs=obs, var=var, obsm=obsm, uns=uns)
        var = pd.DataFrame(index=self.vocabulary.genes)
        return ad.AnnData(predictions, obs=obs, var=var, layers={"control": controls}, uns=uns)

    def describe_output(self, decoded: bool, controls_note: str, checkpoint: str | None) -> dict[str, str]:
        """What a predicted AnnData says of itself in `uns["cellstate"]`."""
        log1p = "log1p expression" + (
            f" ({self.target_sum:g} counts per cell)" if self.normalize == "log1p_cp10k" else ""
        )
        holds = log1p if decoded else {"log1p": log1p, "counts": "counts", "embedding": "embedding"}[self.values]
        return {
            "X": holds,
            "checkpoint": checkpoint or "not recorded",
            "controls": controls_note,
            # How to read real cells so that they compare with these.
            "processor": json.dumps({name: getattr(self, name) for name in _SETTINGS}, sort_keys=True),
        }


_SETTINGS = (
    "perturbation_key",
    "control",
    "context_key",
    "batch_key",
    "input",
    "gene_input",
    "values",
    "normalize",
    "target_sum",
    "combination_separator",
    "set_size",
)


StateProcessor.register_for_auto_class()

__all__ = ["CellSentences", "StateProcessor", "Vocabulary"]
