"""A model with its processor and what is known of its training, for work in Python."""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad
import pandas as pd
import torch

from pertstate.base.modeling_perturbation import PerturbationPreTrainedModel
from pertstate.base.public import last_part
from pertstate.data.in_memory import CellData
from pertstate.data.record import RunRecord
from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.prediction import predict_in_memory
from pertstate.evaluation.report import write_report
from pertstate.evaluation.report_data import SCORES_FOLDER, read_log
from pertstate.evaluation.scores import Scores
from pertstate.hub.checkpoints import check_name, load_whole
from pertstate.hub.publish import claimed_checkpoint, whole_checkpoint_folder
from pertstate.hub.push import fetch_checkpoint
from pertstate.hub.unfinished import read_model_folder
from pertstate.processing import StateProcessor


@dataclass(repr=False)
class TrainedModel:
    """
    A model, its processor, and what is known of its training. [`fit`] and [`load`] make it.

    Args:
        model ([`PerturbationPreTrainedModel`]): in evaluation mode.
        processor ([`StateProcessor`]): of the same checkpoint.
        folder (`Path`): the checkpoint.
        name (`str`): the last part of the folder, or the name and commit on the Hub.
        record ([`RunRecord`], *optional*): what it learned from.
        scores ([`Scores`], *optional*): of the test groups of its run.
    """

    model: PerturbationPreTrainedModel
    processor: StateProcessor
    folder: Path
    name: str
    record: RunRecord | None = None
    scores: Scores | None = None
    _temporary: TemporaryDirectory | None = None

    def __repr__(self) -> str:
        what = f"{self.model.config.model_type}, {self.model.num_parameters():,} parameters, from {self.name}"
        return f"TrainedModel({what}; " + ("no scores)" if self.scores is None else f"{self.scores.verdict})")

    def predict(
        self,
        adata: CellData,
        perturbations: list[str] | str | None = None,
        contexts: list[str] | None = None,
        **options: Any,
    ) -> ad.AnnData:
        """
        Predict perturbations from control cells.

        Args:
            adata (`AnnData` or path): holds the control cells.
            perturbations, contexts: see [`predict`].
            options: further arguments of [`predict`] that write no file.

        Returns:
            `AnnData`: one predicted cell for each control cell and perturbation.

        Raises:
            see [`predict`].
        """
        options = {"checkpoint": self.name, "quiet": True, **options}
        return predict_in_memory(
            self.model, self.processor, adata, perturbations=perturbations, contexts=contexts, **options
        )

    def evaluate(self, real: CellData, **options: Any) -> Scores:
        """
        Score the model on real cells, beside all baselines.

        Args:
            real (`AnnData` or path): real perturbed cells, and control cells to predict from.
            options: further arguments of [`evaluate`].
        """
        options = {"name": "the model", "quiet": True, **options}
        return evaluate(None, real, model=self.model, processor=self.processor, record=self.record, **options)

    @property
    def history(self) -> pd.DataFrame:
        """The log of its training: one row for each entry; empty where there is none."""
        return pd.DataFrame(read_log(self.folder))

    def report(self, output: str | os.PathLike, overwrite: bool = False):
        """
        Write the page of its run, see [`write_report`].

        Raises:
            FileNotFoundError: the run held out no test groups, so that there are no scores.
        """
        write_report(self.folder, output, overwrite)

    def save(self, folder: str | os.PathLike, overwrite: bool = False):
        """
        Write the checkpoint, with its card and scores, to another folder, whole or not at all.

        Args:
            folder: where to.
            overwrite (`bool`): replace a checkpoint that is there.

        Raises:
            FileExistsError, InUseError: see [`claimed_checkpoint`].
            OSError: the disk is full; nothing is left of it.
        """
        with claimed_checkpoint(folder, overwrite), whole_checkpoint_folder(folder) as place:
            for file in self.folder.iterdir():
                if file.is_file():
                    shutil.copyfile(file, place / file.name)
            if (self.folder / SCORES_FOLDER).is_dir():
                shutil.copytree(self.folder / SCORES_FOLDER, place / SCORES_FOLDER)


def load(
    name: str | os.PathLike, revision: str | None = None, device: str | torch.device | None = None
) -> TrainedModel:
    """
    Load a model with all that is known of it.

    Args:
        name: the folder of a checkpoint or of a run, or a repository on the Hub. Of a run that has not ended, its last whole
            checkpoint is taken.
        revision (`str`, *optional*): commit, tag or branch on the Hub.
        device (*optional*): by default the accelerator, where there is one.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or there is no such device.
    """
    opened = open_checkpoint(str(name), revision, "load")
    scores = Scores.load(opened.folder / SCORES_FOLDER) if (opened.folder / SCORES_FOLDER).is_dir() else None
    return dataclasses.replace(opened, model=on_device(opened.model, device).eval(), scores=scores)


def open_checkpoint(name: str, revision: str | None, asked_by: str) -> TrainedModel:
    """
    A model, its processor and its record, all of one checkpoint, whatever is written meanwhile.

    Args:
        name (`str`), revision (`str`, *optional*): see [`load`].
        asked_by (`str`): the start of an error about the name.
    """
    check_name(name, asked_by)

    def read(folder: Path):
        return *load_whole(str(folder)), RunRecord.load(folder)

    if Path(name).is_dir():
        (model, processor, record), folder = read_model_folder(name, read)
        called = last_part(name) if folder == Path(name) else f"{last_part(name)}/{folder.name}"
    else:
        folder = fetch_checkpoint(name, revision)
        (model, processor, record), called = read(folder), f"{name}@{folder.name}"
    return TrainedModel(model, processor, folder, called, record)


def on_device(
    model: PerturbationPreTrainedModel, device: str | torch.device | None, asked_by: str = "device"
) -> PerturbationPreTrainedModel:
    """
    A model on a device, by default on the accelerator, where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    moved: Any = model  # the library's `to` is wrapped so that no argument fits its type
    try:
        return moved.to(device)
    except (RuntimeError, AssertionError) as error:
        # torch raises one or the other for a device that it does not know or was not built for.
        raise ValueError(f"{asked_by} {device}: {error}") from error
