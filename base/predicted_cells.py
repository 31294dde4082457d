"""Predicted cells as an AnnData: what they are, and whose they are."""

import json
from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd

from .cell_values import cell_totals, describe_values, normalize_counts
from .constants import Normalize, Values
from .doses import dose_text
from .labels import LabelReader
from .messages import some
from .origin import Origin
from .processor_files import PROCESSOR_SETTINGS
from .public import public
from .vocabulary import Vocabulary


class PredictedCells:
    """What a processor says of predictions; a part of [`StateProcessor`], whose attributes these are."""

    vocabulary: Vocabulary
    perturbation_key: str | None
    context_key: str | list[str] | None
    batch_key: str | list[str] | None
    control: str
    combination_separator: str | None
    dose_key: str | None
    label_reader: LabelReader
    input: str
    values: str
    normalize: str
    target_sum: float | None
    predicts: str | None
    origin: Origin | None
    unseen_doses: Callable[[list[str]], list[str]]
    split_combination: Callable[[str], list[str]]

    def output_columns(self) -> dict[str, str]:
        """The columns of obs in an output that hold perturbation, context and batch: those of the data, where each is one."""
        keys = {"perturbation": self.perturbation_key, "context": self.context_key, "batch": self.batch_key}
        return {name: key if isinstance(key, str) else name for name, key in keys.items()}

    def of_output(self) -> dict:
        """The settings that read the labels of an output: no cell is left out, and no label is renamed."""
        columns = self.output_columns()
        return {
            "perturbation_key": columns["perturbation"],
            "context_key": columns["context"],
            "control": self.control,
            "combination_separator": self.combination_separator,
            "dose_key": self.dose_key,
        }

    def output_obs(
        self,
        names,
        contexts,
        barcodes,
        batches=None,
        doses: list[float] | None = None,
        carried: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """
        The obs of predicted cells.

        Args:
            names (sequence of `str`): the canonical name of each cell's perturbation.
            contexts, barcodes, batches (sequences of `str`): the context of each cell; barcode and batch of its control cell.
            doses (`list[float]`, *optional*): weights of a model without doses, the same for all cells.
            carried (`pandas.DataFrame`, *optional*): further columns of the control cells, one row for each cell.

        Raises:
            ValueError: such a column is one of the output already.
        """
        columns = self.output_columns()
        codes, unique = pd.factorize(np.asarray(names, dtype=object))
        plain, dosed, labels = [], [], []
        for name in unique:
            parts = self.label_reader.parts(name)
            weights = doses if doses is not None else [dose for _, dose in parts if dose is not None]
            plain.append((self.combination_separator or "").join(part for part, _ in parts) or name)
            dosed.append(";".join(map(dose_text, weights)))
            labels.append(name if doses is None else f"{name}@{dosed[-1]}")
        frame = {columns["perturbation"]: np.array(plain, dtype=object)[codes], columns["context"]: contexts}
        if batches is not None:
            frame[columns["batch"]] = batches
        if self.dose_key is not None or doses is not None:
            # Numbers, where there is one for each perturbation; control cells have none.
            single = all(";" not in text and (text or name == self.control) for text, name in zip(dosed, unique))
            values = np.array([float(text or "nan") for text in dosed] if single else dosed)
            frame[self.dose_key or "dose"] = values.astype(float if single else object)[codes]
        obs = pd.DataFrame(frame)
        obs["control_barcode"] = np.asarray(barcodes)
        for name, values in () if carried is None else carried.items():
            if name in obs:
                raise ValueError(
                    f"obs_columns: {name!r} is a column of the output already ({list(obs.columns)}); leave it out"
                )
            obs[name] = values.array
        obs.index = pd.Index(
            obs["control_barcode"].astype(str).to_numpy() + "|" + np.array(labels, dtype=object)[codes]
        )
        return obs

    # Units of the predictions

    def predict_log1p(self, target_sum: float | None):
        """
        Record that a model on counts predicts log1p expression. Real cells are converted alike before they are compared.

        Args:
            target_sum (`float`, *optional*): total counts of a cell, over the model's genes, that expression is scaled to.
                None: it is not scaled.
        """
        self.check_counts()
        self.predicts, self.target_sum = Values.LOG1P, target_sum

    def check_counts(self):
        """ValueError where the model's features are not raw counts, which some families need."""
        if self.values != Values.COUNTS:
            raise ValueError(
                f"this model is trained on raw counts, found {self.values} (input={self.input!r}, normalize="
                f"{self.normalize!r}); set normalize: none, and input: to where the counts are (X or layers/NAME)"
            )

    def as_predicted(self, features: np.ndarray) -> np.ndarray:
        """Features of real cells `(cells, feature_dim)` in the units of the predictions, to compare with them."""
        if self.predicts is None:
            return features
        if self.target_sum is None:
            return np.log1p(features)
        return normalize_counts(features, cell_totals(features), self.target_sum)

    # Outputs

    def to_anndata(
        self,
        predictions: np.ndarray,
        controls: np.ndarray,
        genes: np.ndarray | None,
        obs: pd.DataFrame,
        uns: dict[str, str],
        var: pd.DataFrame | None = None,
    ) -> ad.AnnData:
        """An AnnData of predicted cells, laid out as [`StateProcessor.decode`] says."""
        var = pd.DataFrame(index=self.vocabulary.genes) if var is None else var
        said = {"pertstate": uns}
        if self.values == Values.EMBEDDING:
            obsm = {"control": controls}
            if genes is not None:
                return ad.AnnData(genes, obs=obs, var=var, obsm={**obsm, "embedding": predictions}, uns=said)
            dimensions = pd.DataFrame(index=self.output_names(predictions.shape[1]))
            return ad.AnnData(predictions, obs=obs, var=dimensions, obsm=obsm, uns=said)
        return ad.AnnData(predictions, obs=obs, var=var, layers={"control": controls}, uns=said)

    def output_names(self, width: int) -> list[str]:
        """The names of the features that are predicted: genes, or the dimensions of an embedding."""
        return [f"dim_{i}" for i in range(width)] if self.values == Values.EMBEDDING else self.vocabulary.genes

    def predicted_values(self, decoded: bool) -> str:
        """In words, what a model predicts, or (`decoded`) what its gene decoder makes of the prediction."""
        scaled = self.normalize == Normalize.COUNTS_TO_LOG1P or self.predicts is not None
        return describe_values(Values.LOG1P if decoded else self.predicts or self.values, scaled, self.target_sum)

    def describe_output(
        self,
        decoded: bool,
        controls_note: str,
        checkpoint: str | None,
        groups: list[tuple[str, str]],
        weights: list[float] | None = None,
    ) -> dict[str, str]:
        """
        What a predicted AnnData says of itself in `uns["pertstate"]`; of the checkpoint's path, the last part.

        Args:
            decoded (`bool`): X holds what a gene decoder made of the prediction.
            controls_note (`str`): which control cells went in.
            checkpoint (`str`, *optional*): the model's name; by default that of the checkpoint of this processor.
            groups (`list[tuple[str, str]]`): each (context, perturbation), with canonical names.
            weights (`list[float]`, *optional*): see [`CellSentences`].
        """
        origin = self.origin
        if checkpoint is None and origin is not None:
            checkpoint = origin.name
        said = {} if origin is None else origin.describe(groups)
        if "groups" in said:
            said["groups"] = json.dumps(said["groups"])
        if origin is not None and origin.change_tests:
            names = origin.indistinguishable([name for _, name in groups], self.split_combination)
            said["indistinguishable"] = json.dumps(names)
        return {
            "X": self.predicted_values(decoded),
            "checkpoint": public(checkpoint or "not recorded"),
            "controls": public(controls_note),
            **said,
            **self._describe_doses([name for _, name in groups], weights),
            # How to read real cells, so that they can be compared with these.
            "processor": self.reading_settings(),
        }

    def reading_settings(self) -> str:
        """The settings of this processor as JSON, as predictions record them."""
        return json.dumps({name: getattr(self, name) for name in PROCESSOR_SETTINGS}, sort_keys=True)

    def _describe_doses(self, names: list[str], weights: list[float] | None) -> dict[str, str]:
        """The doses of some perturbations in words; nothing where there are none."""
        if weights is not None:
            texts = ", ".join(map(dose_text, weights))
            return {"doses": f"{texts}: weights of the effect, of a model that was trained without doses"}
        if self.dose_key is None:
            return {}
        names = list(dict.fromkeys(names))
        doses = sorted({dose for name in names for _, dose in self.label_reader.parts(name) if dose is not None})
        new = self.unseen_doses(names)
        told = f"; no training cell had: {some(new)}" if new else "; all of them in training"
        return {"doses": f"{', '.join(map(dose_text, doses))} (obs[{self.dose_key!r}]){told}"}


__all__ = ["PredictedCells"]
