"""The checkpoint and the cells that the tests of the app use."""

from pathlib import Path

from made_scores import made_scores
from predictions import SET_SIZE, model_of, screen

from pertstate import StateProcessor
from pertstate.data.record import RecordedGroup, RunRecord


def write_model(folder: Path):
    """
    `screen.h5ad`, and in `model` a checkpoint that gives a confidence, with the record of a run that trained on pert_0 in type_0 and
    held out pert_1 in type_1, and with scores.
    """
    adata = screen()
    adata.write_h5ad(folder / "screen.h5ad")
    processor = StateProcessor.fit(adata, set_size=SET_SIZE)
    model_of(processor, confidence_token=True).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    groups = [
        RecordedGroup("screen", "type_0", "pert_0", "train", 10),
        RecordedGroup("screen", "type_1", "pert_1", "test", 10),
    ]
    RunRecord(control="control", groups=groups).save(folder / "model")
    made_scores().save(folder / "model" / "scores")
