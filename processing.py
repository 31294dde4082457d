"""StateProcessor: AnnData to cell sentences, and predictions back to AnnData."""

import os
import warnings
from dataclasses import fields

import anndata as ad
import numpy as np
import pandas as pd
from transformers import ProcessorMixin

from .base.anndata_source import AnnDataSource, Part
from .base.cell_ids import cell_ids, order_of
from .base.cell_sentences import CellSentences, SentenceLayout
from .base.cell_source import fit_processor
from .base.cell_values import (
    TARGET_SUM,
)
from .base.checkpoint_files import HUB_ARGUMENTS, hub_arguments
from .base.constants import (
    BATCH_IDS,
    CELL_MASK,
    CONTEXT_IDS,
    CONTROL_CELLS,
    PERTURBATION_DOSES,
    PERTURBATION_FEATURES,
    PERTURBATION_IDS,
    Normalize,
    Values,
)
from .base.doses import DoseScale, check_weights
from .base.experiments import NO_DOSES, Experiments
from .base.finite import check_predicted
from .base.labels import LabelReader, LabelSettings, control_settings
from .base.messages import given
from .base.model_features import ModelFeatures, carried_columns
from .base.modeling_perturbation import PerturbationOutput
from .base.origin import Origin
from .base.predicted_cells import PredictedCells
from .base.processor_files import PROCESSOR_SETTINGS, is_default, read_processor_tables, read_settings
from .base.travelling import Travelling
from .base.value_scale import Scale
from .base.vocabulary import (
    PERTURBATION_FEATURES_FILE,
    VOCABULARY_FILE,
    PerturbationFeatures,
    Vocabulary,
    control_rows,
    encode_ids,
)


# Arguments with which transformers says who loads a processor.
_ASKED_BY = ("_from_auto", "_from_pipeline")


class StateProcessor(ModelFeatures, PredictedCells, Experiments, Travelling, ProcessorMixin):
    r"""
    Turns control cells of an AnnData into cell sentences, and a model's output into an AnnData.

    [`StateProcessor.fit`] makes one from training data, `from_pretrained` from a checkpoint. The arguments below are what
    a checkpoint stores of it.

    Args:
        vocabulary ([`Vocabulary`]): names of genes, perturbations, contexts and batches.
        perturbation_key (`str`): obs column with the name of each cell's perturbation.
        control (`str`): the name of unperturbed cells in that column.
        context_key (`str`): obs column with each cell's context (cell type or line).
        batch_key (`str`, *optional*): obs column with each cell's experimental batch.
        input (`str`): where the cells are read from.

            - `"X"`: the main matrix
            - `"raw/X"`: that of `raw`, with its genes
            - `"layers/NAME"`: a layer
            - `"obsm/NAME"`: an embedding
        gene_input (`str`, *optional*): for an embedding with a gene decoder, where expression is read from (`"X"` or
            `"layers/NAME"`).
        values (`str`): what a model's features are.

            - `"log1p"`: log1p expression
            - `"counts"`: raw counts
            - `"embedding"`: dimensions of an embedding
        normalize (`str`): what is done to the values that are read.

            - `"counts_to_log1p"`: they are counts; scaled to `target_sum` counts a cell (summed over all genes of the
              data, not only the model's), then log1p
            - `"none"`: nothing
        target_sum (`float`, *optional*): total counts of a cell after scaling. None: not scaled, which predictions alone
            can be.
        predicts (`str`, *optional*): what a model on counts predicts, if not counts; see
            [`StateProcessor.predict_log1p`].

            - `"log1p"`: log1p expression, scaled to `target_sum` counts a cell over the model's genes
        control_labels, context, perturbation_map, unlabelled, exclude, include, dose_key, batch_datasets, dataset: see
            [`LabelSettings`].
        dose_encoding (`str`): how a dose becomes the weight of a perturbation, `"log"` or `"linear"`; see [`DoseScale`].
        doses (`dict[str, list[float]]`, *optional*): the doses of each perturbation in the training cells.
        dose_span (`list[float]`, *optional*): the doses that `dose_encoding` goes by, where they are not those of `doses`.
        scale (`dict`, *optional*): what log1p values of the training cells sum to (`total`) after `expm1`, where that is
            certain; and that counts were not whole (`values`).
        gene_key (`str`, *optional*), ignore_gene_versions (`bool`), duplicate_genes (`str`): see [`view_of`].
        combination_separator (`str`, *optional*): joins the names of perturbations applied together. None where there
            are no combinations, or where names contain the character.
        control_expression (`bool`): batches that are predicted say what all control cells of a context express, see
            [`ModelFeatures.control_values`]; for a model that reads it.
        feature_dim (`int`): features of a cell.
        set_size (`int`): cells of a sentence.
        perturbation_features ([`PerturbationFeatures`], *optional*): a vector for each perturbation, for a model that
            takes those instead of ids; it predicts every perturbation that has one. The control is zeros.
    """

    loaded_by = "AutoProcessor"
    _written_first = (".py", VOCABULARY_FILE, PERTURBATION_FEATURES_FILE)

    def __init__(
        self,
        vocabulary: Vocabulary | None = None,
        perturbation_key: str = "perturbation",
        control: str = "control",
        context_key: str = "cell_type",
        batch_key: str | None = None,
        input: str = "X",
        gene_input: str | None = None,
        values: str = Values.LOG1P,
        normalize: str = Normalize.NONE,
        target_sum: float | None = TARGET_SUM,
        combination_separator: str | None = "+",
        feature_dim: int | None = None,
        set_size: int = 128,
        perturbation_features: PerturbationFeatures | None = None,
        predicts: str | None = None,
        control_labels: list[str] | dict[str, list[str]] | None = None,
        context: str | None = None,
        perturbation_map: dict[str, str] | None = None,
        unlabelled: str = "error",
        exclude: dict[str, list] | None = None,
        include: dict[str, list] | None = None,
        dose_key: str | None = None,
        dose_encoding: str = "log",
        doses: dict[str, list[float]] | None = None,
        scale: dict | None = None,
        gene_key: str | None = None,
        ignore_gene_versions: bool = False,
        batch_datasets: list[str] | None = None,
        dataset: str | None = None,
        dose_span: list[float] | None = None,
        duplicate_genes: str = "error",
        control_expression: bool = False,
    ):
        self.vocabulary = vocabulary if vocabulary is not None else Vocabulary()
        self.perturbation_key = perturbation_key
        self.control, self.control_labels = control, control_labels
        if control_labels is None:
            self.control, self.control_labels = control_settings(control).values()
        self.context_key = None if context is not None else context_key
        self.context = context
        self.batch_key = batch_key
        self.perturbation_map, self.unlabelled = perturbation_map, unlabelled
        self.exclude, self.include = exclude, include
        self.dose_key, self.dose_encoding, self.doses, self.dose_span = dose_key, dose_encoding, doses, dose_span
        self.gene_key, self.ignore_gene_versions = gene_key, ignore_gene_versions
        self.duplicate_genes = duplicate_genes
        self.control_expression = control_expression
        self.batch_datasets, self.dataset = batch_datasets, dataset
        self.scale = scale
        self.trained_scale = None if scale is None else Scale(**scale)
        self._scales: tuple[Scale, Scale] | None = None
        self.input = input
        self.gene_input = gene_input
        self.values = values
        self.normalize = normalize
        self.target_sum = target_sum
        self.predicts = predicts
        self.combination_separator = combination_separator
        self.feature_dim = feature_dim if feature_dim is not None else len(self.vocabulary.genes)
        self.set_size = set_size
        if perturbation_features is not None:
            perturbation_features.check_control(self.control)
        self.perturbation_features = perturbation_features
        self.chat_template = None  # the inherited save looks for it
        self.origin: Origin | None = None  # of a loaded one
        self._ids = {
            kind: {name: i for i, name in enumerate(getattr(self.vocabulary, kind))}
            for kind in ("perturbations", "contexts", "batches")
        }
        known = self._ids["perturbations"] if perturbation_features is None else perturbation_features.index
        settings = {field.name: getattr(self, field.name) for field in fields(LabelSettings)}
        self.label_reader = LabelReader(LabelSettings(**settings), whole=known)
        self._scale = DoseScale(dose_encoding, doses or {}, dose_span)

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
        normalize: str = Normalize.AUTO,
        combination_separator: str | None = "+",
        gene_input: str | None = None,
        set_size: int = 128,
        target_sum: float | str | None = None,
        perturbation_features: PerturbationFeatures | None = None,
        **reading,
    ) -> "StateProcessor":
        r"""
        Learn gene order, normalisation and vocabularies from training cells (one AnnData or several).

        Args:
            adata (`AnnData` or list of them): training cells, those of held-out contexts and perturbations left out.
                Several are joined on the genes that all have.
            genes (`int`, `list[str]` or None): the model's genes: this many highly variable ones (scanpy, flavour
                "seurat", on the cells given), the ones listed, or all. With an embedding as `input`: those of the
                gene decoder.
            normalize (`str`): what is done to the values that are read.

                - `"auto"`: `"counts_to_log1p"` where the values are counts, `"none"` where they are log1p already
                - `"counts_to_log1p"`: scale counts to `target_sum` a cell, then log1p
                - `"none"`: keep the values as they are, counts included
            target_sum (`float`, `"median"` or None): total counts that each cell is scaled to: 10,000 where None; the
                number given; or the median total of the training cells that have counts, which is stored as a number.
                Only for counts.
            perturbation_features ([`PerturbationFeatures`], *optional*): vectors of at least the perturbations of the
                training cells. The model takes them instead of ids.

            reading: further arguments of the class that say how labels and values are read, `dose_key` for one.

            The other arguments are those of the class.

        Raises:
            KeyError: a column, layer or obsm entry is missing; what exists is listed.
            ValueError: values are NaN, negative, neither counts nor log1p, or contradict `normalize`; no cell is a
                control; a label is missing; a perturbation has no vector; `target_sum` is given and not for counts.
        """
        adatas = list(adata) if isinstance(adata, (list, tuple)) else [adata]
        if not adatas:
            raise ValueError("expected training cells, found an empty list of AnnData")
        reader = cls(
            perturbation_key=perturbation_key,
            control=control,
            context_key=context_key,
            batch_key=batch_key,
            input=input,
            gene_input=gene_input,
            combination_separator=combination_separator or None,
            set_size=set_size,
            perturbation_features=perturbation_features,
            **reading,
        )
        source = AnnDataSource([Part("", data) for data in adatas], reader)
        everything = np.ones(len(source.groups), dtype=bool)
        return fit_processor(source, reader, everything, genes, normalize, target_sum)

    def with_vocabulary(self, vocabulary: Vocabulary, **settings) -> "StateProcessor":
        """
        The same processor with other names, for a model that was resized to them
        ([`FineTunablePreTrainedModel.resize_vocabulary`]).

        Args:
            vocabulary ([`Vocabulary`]): the other names.
            settings: further arguments of the class that change.
        """
        kept = {name: getattr(self, name) for name in (*PROCESSOR_SETTINGS, "perturbation_features")}
        if self.values == Values.EMBEDDING:
            kept["feature_dim"] = self.feature_dim
        return type(self)(vocabulary=vocabulary, **{**kept, **settings})

    def for_datasets(self, datasets: list[str]) -> "StateProcessor":
        """The processor that reads cells of these datasets: it tells their batches apart where there are several."""
        found = sorted({*datasets, *(self.batch_datasets or ())})
        if self.batch_key is None or len(found) < 2 or found == self.batch_datasets:
            return self
        return self.with_vocabulary(self.vocabulary, batch_datasets=found)

    # Saving and loading

    def to_dict(self) -> dict:
        output = super().to_dict()
        output.pop("vocabulary")
        output.pop("perturbation_features")
        # What is at its default is not written: older versions read such a checkpoint too.
        for name in [name for name, value in output.items() if is_default(name, value)]:
            output.pop(name)
        # So that a checkpoint whose perturbation features are missing differs from one that never had any.
        if self.perturbation_features is not None:
            output["perturbation_dim"] = self.perturbation_features.dim
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write `processor_config.json`, the vocabulary, any perturbation features and this code; push them if asked."""
        os.makedirs(save_directory, exist_ok=True)
        self.vocabulary.save(os.path.join(save_directory, VOCABULARY_FILE))
        if self.perturbation_features is not None:
            self.perturbation_features.save(os.path.join(save_directory, PERTURBATION_FEATURES_FILE))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> "StateProcessor":
        """
        As in [`ProcessorMixin`].

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged, or does not agree with another one; see [`read_processor_tables`].
        """
        tables, commit = read_processor_tables(pretrained_model_name_or_path, hub_arguments(kwargs))
        origin = Origin.of(pretrained_model_name_or_path, hub_arguments(kwargs), commit)
        if commit is not None:
            kwargs["revision"] = commit
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **(kwargs | tables))
        processor.origin = origin
        return processor

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """
        The settings, and those of the arguments that do not say where files are found. The inherited method also reads chat
        templates, and a file that names a model of another repository or folder, which it loads.
        """
        rest = {name: value for name, value in kwargs.items() if name not in (*HUB_ARGUMENTS, *_ASKED_BY)}
        return read_settings(pretrained_model_name_or_path, hub_arguments(kwargs)), rest

    # Labels

    def labels(self, adata: ad.AnnData, dataset: str | None = None) -> pd.DataFrame:
        """
        Columns `perturbation`, `context` and (with a `batch_key`) `batch` of each cell, as plain strings; None in cells that
        are left out. A perturbation has its canonical name, see [`LabelReader`].

        Args:
            dataset (`str`, *optional*): the cells' dataset, where the labels of controls differ between datasets.
        """
        return self.labels_of(adata.obs, dataset)

    def labels_of(self, obs: pd.DataFrame, dataset: str | None = None) -> pd.DataFrame:
        """[`StateProcessor.labels`] of the cells of a table; of its columns, only `label_columns` are read."""
        return self.label_reader.read(obs, dataset)

    @property
    def label_columns(self) -> list[str]:
        """The columns of obs that labels are read from."""
        return self.label_reader.columns

    def canonical(self, name: str) -> str:
        """The canonical name of a perturbation, as [`StateProcessor.labels`] gives it."""
        return self.label_reader.named(str(name))

    def split_combination(self, name: str) -> list[str]:
        """The perturbations in a name: none for the control, several for a combination. Doses are left out."""
        return [part for part, _ in self._parts(name)]

    def _parts(self, name: str) -> list[tuple[str, float | None]]:
        if name == self.control and name in self._ids["perturbations"]:
            return [(name, None)]  # a converted checkpoint, in which the control has weights of its own
        return self.label_reader.parts(name)

    def encode(self, names, doses: list[float] | None = None) -> dict[str, np.ndarray]:
        """
        Labels of perturbations as the model takes them, by batch key.

        Args:
            names (sequence of `str`): labels; `"A+B"` is a combination, `"A@0.1"` has a dose where the model knows doses.
            doses (`list[float]`, *optional*): weight of each perturbation of a combination, 1 by default, for a model that was
                trained without doses.

        Returns:
            For a model on ids `perturbation_ids` (N, K) int64, padded with -1, all -1 being the control, and with
            doses `perturbation_doses` (N, K) float32. For a model on features `perturbation_features` (N, P) float32:
            the sum of the vectors of a combination, each times its dose; the control is zeros.

        Raises:
            KeyError: a perturbation is not in the vocabulary, or has no vector; the error names the nearest ones.
            ValueError: the number of doses is not that of the perturbations applied together; a dose is missing, or no number
                above 0.
        """
        found = [self._parts(str(name)) for name in names]
        parts = [[part for part, _ in of_name] for of_name in found]
        together = max([1, *map(len, parts)])
        if self.dose_key is not None:
            weights = [[self._scale.weight(*part) for part in of_name] for of_name in found]
        elif doses is not None:
            check_weights(doses)
            if len(doses) != together:
                raise ValueError(f"doses: expected {together} (one for each perturbation together), found {len(doses)}")
            weights = [list(doses) for _ in found]
        else:
            weights = None
        if self.perturbation_features is not None:
            return {PERTURBATION_FEATURES: self.perturbation_features.encode(parts, weights)}
        encoded = {PERTURBATION_IDS: encode_ids(parts, self._ids["perturbations"])}
        if weights is not None:
            padded = [of_name + [0.0] * (together - len(of_name)) for of_name in weights]
            encoded[PERTURBATION_DOSES] = np.array(padded, dtype=np.float32).reshape(-1, together)
        return encoded

    def unseen_doses(self, names) -> list[str]:
        """Those of some names of perturbations that have a dose which no training cell had."""
        if self.dose_key is None:
            return []
        return [name for name in names if any(self._scale.is_new(*part) for part in self._parts(name))]

    def add_perturbation_features(self, names, vectors):
        """
        Add vectors of further perturbations. A model on perturbation features then predicts these too.

        Args:
            names (sequence of `str`), vectors (array of shape `(len(names), perturbation_dim)`): see
                [`PerturbationFeatures`].

        Raises:
            ValueError: the model takes perturbation ids; the width differs; a known name has another vector.
        """
        if self.perturbation_features is None:
            raise ValueError(
                "this model was trained on perturbation ids, so features cannot be added to it; train one with "
                "perturbation_features"
            )
        further = PerturbationFeatures(names, vectors)
        further.check_control(self.control)
        self.perturbation_features = self.perturbation_features.extended(further)

    def encode_contexts(self, names) -> np.ndarray:
        """Contexts to ids, int64; -1 for one that was not seen in training."""
        return np.array([self._ids["contexts"].get(str(name), -1) for name in names], dtype=np.int64)

    def encode_batches(self, names) -> np.ndarray:
        """Batches to ids, int64; -1 for one that was not seen in training, which only a model without batches takes."""
        return np.array([self._ids["batches"].get(str(name), -1) for name in names], dtype=np.int64)

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
        convert_scale: bool = False,
        obs_columns: list[str] | None = None,
    ) -> CellSentences:
        r"""
        Sentences of control cells for virtual experiments: the controls of each context with each perturbation.

        Args:
            adata (`AnnData`): holds control cells (`obs[perturbation_key] == control`); other cells are not used.
            perturbation (`str` or `list[str]`): what to predict; `"A+B"` is a combination.
            context (`str` or `list[str]`, *optional*): these contexts, all of the data by default.
            doses (`list[float]`, *optional*): dose of each perturbation of a combination, in the order of the name. A model that
                was trained without doses takes them as weights (1 by default), with a warning.
            missing_genes (`str`): `"error"`, or `"zero"` to read genes that the data lack as unexpressed.
            input (`str`, *optional*): read cells from here instead of the processor's `input`.
            seed (`int`, *optional*): shuffle the controls of each context before they are cut into sentences.
            convert_scale (`bool`): convert log1p values whose cells sum to another total than those of the training cells.
            obs_columns (`list[str]`, *optional*): columns of obs of the control cells that the predicted cells get.

        Returns:
            [`CellSentences`]: `control_cells` (B, S, feature_dim), `perturbation_ids` (B, K) or
            `perturbation_features` (B, P), `context_ids` (B,), `cell_mask` (B, S), and where they apply
            `perturbation_doses` (B, K), `batch_ids` (B, S), and `control_expression` (B, feature_dim) with
            `control_counts` (B,). Each control cell is in one sentence per perturbation.
            The sizes of a context's sentences differ by one at most.

        Raises:
            KeyError: an unknown perturbation or context, a missing gene, column or entry.
            ValueError: no control cells in a context, NaN or negative values, counts where log1p is expected.
        """
        given_names = [perturbation] if isinstance(perturbation, str) else list(perturbation)
        if not given_names:
            raise ValueError("perturbation: expected at least one name, found an empty list")
        if doses is not None and self.dose_key is not None:
            names = [self.label_reader.at_doses(name, doses) for name in given_names]
        else:
            # Weights follow the order in which a name is written.
            names = [self.canonical(name) if doses is None else str(name) for name in given_names]
        names = list(dict.fromkeys(names))
        weights = doses if self.dose_key is None else None
        if weights is not None:
            warnings.warn(NO_DOSES, stacklevel=2)
        encoded = self.encode(names, weights)
        self.check_scale(adata, input, convert_scale)
        labels = self.labels(adata)
        groups = self.control_groups(labels, context)
        if seed is not None:
            orders = {name: order_of(cell_ids(adata.obs_names[rows]), len(rows), seed) for name, rows in groups.items()}
            groups = {name: rows[orders[name]] for name, rows in groups.items()}
        cut = {name: self.cut(rows) for name, rows in groups.items()}

        def read(rows: np.ndarray) -> np.ndarray:
            return self.features(adata, rows, missing_genes, input)

        values = {name: read(np.sort(rows)) for name, rows in groups.items()}

        # Every sentence of every context, once for each perturbation.
        drawn = [(name, rows) for name, sentences in cut.items() for rows in sentences]
        layout = SentenceLayout([len(rows) for _, rows in drawn] * len(names))
        controls = [values[name][np.searchsorted(np.sort(groups[name]), rows)] for name, rows in drawn]
        of_perturbation = np.repeat(np.arange(len(names)), len(drawn))
        contexts = self.encode_contexts([name for name, _ in drawn])
        batch = {
            CONTROL_CELLS: layout.spread(np.concatenate(controls * len(names))),
            **{key: of_names[of_perturbation] for key, of_names in encoded.items()},
            CONTEXT_IDS: np.tile(contexts, len(names)),
            **self.control_values([name for name, _ in drawn] * len(names), read, groups.__getitem__, {}),
        }
        rows = np.concatenate([rows for _, rows in drawn])
        batches = None
        if self.batch_key is not None:
            batches = np.tile(labels["batch"].to_numpy()[rows], len(names))
            batch[BATCH_IDS] = layout.spread(self.encode_batches(batches))
        made = CellSentences(layout.batch(batch, masked=True))
        made.obs = self.output_obs(
            np.repeat(names, len(rows)),
            np.tile(labels["context"].to_numpy()[rows], len(names)),
            np.tile(adata.obs_names[rows].to_numpy(), len(names)),
            batches,
            weights,
            carried_columns(adata.obs, obs_columns, np.tile(rows, len(names))),
        )
        made.var = self.output_var(adata, input)
        made.controls = "; ".join(f"{name}: {len(rows)} control cells" for name, rows in groups.items())
        made.groups = [(of, name) for name in names for of in groups]
        made.weights = weights
        return made

    def control_groups(self, labels: pd.DataFrame, context: str | list[str] | None = None) -> dict[str, np.ndarray]:
        """Context to the row numbers of its control cells. ValueError for a context without any."""
        return control_rows(labels, self.control, self.perturbation_key, context)

    def cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Row numbers cut into sentences of at most `set_size` cells, of nearly equal sizes."""
        return np.array_split(rows, -(-len(rows) // self.set_size))

    def decode(self, outputs: PerturbationOutput, sentences: CellSentences, checkpoint: str | None = None):
        r"""
        Predicted cells as an AnnData.

        Args:
            outputs ([`PerturbationOutput`]): what `model(**sentences)` returned.
            sentences ([`CellSentences`]): what this processor returned.
            checkpoint (`str`, *optional*): name of the model, to be recorded; by default that of the checkpoint that this
                processor was loaded from.

        Returns:
            `AnnData`: X holds the predicted cells, padding left out, named by gene (of an embedding with a gene
            decoder: the decoded expression in X, the embedding in `obsm["embedding"]`); `layers["control"]` (an
            embedding: `obsm["control"]`) the control cells that went in, in the same units; obs the perturbation,
            context, batch and barcode of the control cell, and `obs_columns`; var the columns of the data; `uns["pertstate"]` says
            what X holds, which checkpoint predicted it, at which doses, and what its record says: the training data, and
            whether each group was trained on.

        Raises:
            FloatingPointError: a prediction is NaN or infinite; the error names the cell and the gene.
        """
        mask = sentences[CELL_MASK].cpu().numpy().astype(bool)
        predictions = given("predictions", outputs.predictions).detach().float().cpu().numpy()
        if predictions.shape[:2] != mask.shape or mask.sum() != len(sentences.obs):
            raise ValueError(f"outputs of shape {predictions.shape} do not belong to sentences of shape {mask.shape}")
        controls = self.as_predicted(sentences[CONTROL_CELLS].float().cpu().numpy()[mask])
        genes = outputs.gene_predictions
        genes = None if genes is None else genes.detach().float().cpu().numpy()[mask]
        for values, names in (
            (predictions[mask], self.output_names(predictions.shape[2])),
            (genes, self.vocabulary.genes),
        ):
            if values is not None:
                check_predicted(values, names, lambda row: f"cell {sentences.obs.index[row]!r}")
        uns = self.describe_output(
            genes is not None, sentences.controls, checkpoint, sentences.groups, sentences.weights
        )
        return self.to_anndata(predictions[mask], controls, genes, sentences.obs.copy(), uns, sentences.var)


__all__ = ["CellSentences", "PerturbationFeatures", "StateProcessor", "Vocabulary"]
