"""What predictions say of the checkpoint that made them: its name, its record, the doses."""

import json

import anndata as ad
import numpy as np
import pytest
import torch
from predictions import SET_SIZE, model_of, run, screen
from transformers import AutoModel, AutoProcessor

from pertstate import StateProcessor
from pertstate.data.record import Ancestor, RecordedGroup, RunRecord


RECORD = RunRecord(
    control="control",
    groups=[
        RecordedGroup("a", "type_0", "pert_0", "train", 10),
        RecordedGroup("b", "type_0", "pert_0", "unused", 10),
        RecordedGroup("a", "type_0", "control", "control", 10),
        RecordedGroup("a", "type_1", "pert_0", "test", 5),
        RecordedGroup("a", "type_1", "pert_1@2", "val", 5),
    ],
    sources=[
        {"name": "screen.h5ad", "what": "file of the dataset", "sha256": "ab" * 32},
        {"name": "lab/data", "what": "data set that was streamed", "commit": "c" * 40},
    ],
    ancestors=[Ancestor("base", [RecordedGroup("x", "type_1", "pert_0", "train", 4)]), Ancestor("older", None)],
)
SAID = {
    "checkpoint": "model",
    "training_data": f"screen.h5ad, file of the dataset ({'ab' * 32}); lab/data, data set that was streamed ({'c' * 40})",
    "started_from": "base; older",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    adata = screen()
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "control", 0.0, 2.0)
    adata.write_h5ad(folder / "screen.h5ad")
    for name, options in (("model", {}), ("dosed", {"dose_key": "dose"})):
        processor = StateProcessor.fit(adata, set_size=SET_SIZE, **options)
        model_of(processor).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        RECORD.save(folder / name)
    return folder


def six_lines(folder, perturbation, **options) -> ad.AnnData:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sentences = processor(ad.read_h5ad(folder.parent / "screen.h5ad"), perturbation=perturbation, **options)
    with torch.no_grad():
        return processor.decode(model(**sentences), sentences)


def test_the_six_lines_say_what_the_record_knows(folder):
    said = six_lines(folder / "model", ["pert_0", "pert_2"]).uns["pertstate"]
    assert {name: said[name] for name in SAID} == SAID and "doses" not in said
    assert json.loads(said["groups"]) == {
        "type_0": {"pert_0": "train and unused", "pert_2": "not in its data"},
        "type_1": {"pert_0": "test, trained on by base", "pert_2": "not in its data"},
    }
    assert "not recorded" not in str(said)


def test_files_say_the_same(folder, tmp_path):
    model, processor = AutoModel.from_pretrained(folder / "model"), AutoProcessor.from_pretrained(folder / "model")
    run(folder, (model, processor), tmp_path / "out.h5ad", ["pert_0", "pert_2"])
    found = ad.read_h5ad(tmp_path / "out.h5ad").uns["pertstate"]
    decoded = six_lines(folder / "model", ["pert_0", "pert_2"]).uns["pertstate"]
    assert {**found, "controls": "", "stored_controls": ""} == {**decoded, "controls": "", "stored_controls": ""}
    run(folder, (model, processor), tmp_path / "named.h5ad", ["pert_0"], checkpoint="lab/model@abc")
    assert ad.read_h5ad(tmp_path / "named.h5ad").uns["pertstate"]["checkpoint"] == "lab/model@abc"


def test_doses_are_said_and_those_that_are_new(folder):
    found = six_lines(folder / "dosed", ["pert_1@2", "pert_1@0.5"])
    assert found.uns["pertstate"]["doses"] == "0.5, 2 (obs['dose']); no training cell had: ['pert_1@0.5']"
    assert json.loads(found.uns["pertstate"]["groups"])["type_1"] == {
        "pert_1@2": "val",
        "pert_1@0.5": "not in its data",
    }
    assert sorted(set(found.obs["dose"])) == [0.5, 2.0]
    known = six_lines(folder / "dosed", "pert_1", doses=[2.0]).uns["pertstate"]["doses"]
    assert known == "2 (obs['dose']); all of them in training"
    with pytest.warns(UserWarning, match="trained without doses"):
        weighed = six_lines(folder / "model", "pert_0+pert_1", doses=[0.5, 2])
    assert (
        weighed.uns["pertstate"]["doses"] == "0.5, 2: weights of the effect, of a model that was trained without doses"
    )
    assert set(weighed.obs["dose"]) == {"0.5;2"}


def test_a_processor_that_was_changed_says_nothing_of_the_checkpoint(folder):
    processor = AutoProcessor.from_pretrained(folder / "model")
    assert processor.origin.name == "model"
    assert processor.with_vocabulary(processor.vocabulary).origin is None


SIX_LINES = """
import json, sys
import anndata as ad
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
sentences = processor(ad.read_h5ad(sys.argv[2]), perturbation="pert_0")
print(json.dumps(dict(processor.decode(model(**sentences), sentences).uns["pertstate"])))
"""


def test_they_say_it_without_the_package(folder, alone):
    said = json.loads(alone.run(SIX_LINES, folder / "model", folder / "screen.h5ad"))
    assert said == six_lines(folder / "model", "pert_0").uns["pertstate"]


@pytest.mark.parametrize("change", [{"format": 2}, {"groups": 3}, {"ancestors": [{}]}, {"sources": [[1]]}])
def test_a_damaged_record_is_one_error(folder, tmp_path, change):
    for path in (folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = tmp_path / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(ValueError, match="record.json: the record of the checkpoint is damaged"):
        StateProcessor.from_pretrained(tmp_path)
