"""The record of a run: what it answers, and that it is saved and loaded as it was."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from pertstate.base.cell_ids import cell_ids, is_number
from pertstate.data.group_means import GroupMeans
from pertstate.data.record import (
    RECORD_ARRAYS,
    RECORD_FILE,
    Ancestor,
    RecordedGroup,
    RunRecord,
    hashes_of,
    lowest,
    recorded_groups,
)


def record(**changes) -> RunRecord:
    groups = [
        RecordedGroup("d", "c0", "A", "train", 10),
        RecordedGroup("d", "c0", "control", "control", 20),
        RecordedGroup("d", "c1", "A", "test", 5),
        RecordedGroup("d", "c1", "control", "control", 7),
        RecordedGroup("d", "c2", "A/B = 1", "val", 3),
    ]
    keys = [("d", "c0", "A"), ("d", "c0", "control")]
    means = GroupMeans("control", keys, np.array([10, 20]), np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32))
    hashes, whole = lowest([hashes_of(cell_ids([f"AAC{i}-1" for i in range(10)]), "A")])
    fields = {
        "control": "control",
        "groups": groups,
        "learned_controls": [("d", "c0"), ("d", "c1")],
        "sources": [{"name": "screen.h5ad", "what": "file", "sha256": "ab" * 32}],
        "settings": {"training.seed": 0, "model.preset": "tiny"},
        "ancestors": [Ancestor("base", [RecordedGroup("old", "c1", "B", "train", 4)]), Ancestor("older", None)],
        "means": means,
        "hashes": hashes,
        "whole": whole,
    }
    return RunRecord(**{**fields, **changes})


def test_a_record_is_loaded_as_it_was_saved(tmp_path):
    saved = record()
    saved.save(tmp_path)
    found = RunRecord.load(tmp_path)
    assert found.to_dict() == saved.to_dict() and found.ancestors == saved.ancestors
    assert sorted(found.groups, key=str) == sorted(saved.groups, key=str)
    np.testing.assert_array_equal(found.hashes, saved.hashes)
    for name in ("counts", "means", "expression"):
        np.testing.assert_array_equal(getattr(found.means, name), getattr(saved.means, name))
    assert RunRecord.load(tmp_path.parent) is None


# JSON says so with any number that is too large, as 1e999.
INFINITE = {"groups": {"d": {"c0": {"test": {"A": float("inf")}}}}}


def test_a_damaged_record_is_one_error(tmp_path):
    record().save(tmp_path)
    content = json.loads((tmp_path / RECORD_FILE).read_text())
    for change in ({"format": 9}, {"groups": [1]}, {"means": [["d", "c0", "A"]]}, {"ancestors": [{}]}, INFINITE):
        (tmp_path / RECORD_FILE).write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match="the record of the checkpoint is damaged"):
            RunRecord.load(tmp_path)
    (tmp_path / RECORD_FILE).write_text(json.dumps(content))
    arrays = load_file(tmp_path / RECORD_ARRAYS)
    for name, array, message in (
        ("counts", np.array([10, -20]), "numbers of cells above 0"),
        ("counts", np.array([10.0, np.nan]), "numbers of cells above 0, found an array of float64"),
        ("counts", np.array([10]), "2 numbers of cells"),
        ("means", np.full((2, 3), 1e300), "finite means"),
        ("means", np.ones((2, 3), bool), "2 rows of means, found an array of bool"),
        ("expression", np.ones((2, 4), np.float32), "2 rows of means"),
        ("cells", arrays["cells"][::-1].copy(), "sorted hashes of cells"),
        ("cells", arrays["cells"].astype(np.float64), "sorted hashes of cells, found an array of float64"),
        ("cells", arrays["cells"][None], "sorted hashes of cells"),
    ):
        save_file({**arrays, name: array}, tmp_path / RECORD_ARRAYS)
        with pytest.raises(ValueError, match=f"the record of the checkpoint is damaged .*{message}"):
            RunRecord.load(tmp_path)
    (tmp_path / RECORD_ARRAYS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="the record of the checkpoint is damaged"):
        RunRecord.load(tmp_path)


def test_what_was_trained_on_is_seen_and_what_ancestors_were_too():
    of = record()
    assert of.seen("d", "c0", "A") == of.seen(None, "c0", "A") == "trained on"
    assert of.seen("other", "c0", "A") == "" and of.seen(None, "c1", "A") == ""
    assert of.seen(None, "c1", "B") == "trained on by base"


def test_cells_are_known_by_their_barcodes_whatever_their_context_is_called():
    of = record()
    same, others = (cell_ids([f"AAC{i}-1" for i in of_cells]) for of_cells in (range(5), range(100, 120)))
    assert of.seen_cells("A", same) and not of.seen_cells("A", others) and not of.seen_cells("B", same)
    # Files that number their cells share numbers, not cells.
    numbers = cell_ids([str(i) for i in range(10)])
    assert is_number(numbers).all()
    numbered = record(hashes=lowest([hashes_of(numbers, "A")])[0])
    assert not numbered.seen_cells("A", numbers)
    assert not record(hashes=None).seen_cells("A", same)


def test_a_sample_of_the_hashes_finds_the_cells_of_the_whole():
    ids = cell_ids([f"cell_{i}x" for i in range(20_000)])
    kept, whole = lowest((hashes_of(part, "A") for part in np.split(ids, 10)), at_most=500)
    assert len(kept) == 500 and not whole and (np.diff(kept.astype(object)) > 0).all()
    of = record(hashes=kept, whole=whole)
    assert of.seen_cells("A", ids[:2000])
    assert not of.seen_cells("A", cell_ids([f"other_{i}x" for i in range(2000)]))


def test_warnings_beside_scores():
    said = record().warnings({("d", "c1", "A")})
    assert said == [
        "control cells of the scored contexts were among the training cells: c1",
        "the baselines do not know what base, from which training started, was trained on, as the model does",
        "what older, from which training started, was trained on is not recorded: it may have seen the scored groups",
    ]
    chose = "scored groups were the validation groups that chose the checkpoint: c2 / A/B = 1"
    for dataset in ("d", None):
        assert record(learned_controls=[], ancestors=[]).warnings({(dataset, "c2", "A/B = 1")}) == [chose]
    assert "highly variable genes were chosen on all cells" in record(chosen_on_all=True).warnings([])[0]


def test_another_run_is_told_by_what_differs():
    of = record()
    assert of.difference(record(notes=["said"])) is None
    assert "training.seed differs: recorded 0, now 1" in of.difference(
        record(settings={"training.seed": 1, "model.preset": "tiny"})
    )
    groups = [*of.groups[:2], RecordedGroup("d", "c1", "A", "train", 5), *of.groups[3:]]
    assert "d / c1 / A (test, 5 cells)" in of.difference(record(groups=groups))
    assert "the data files differ" in of.difference(
        record(sources=[{"name": "screen.h5ad", "sha256": "cd", "what": ""}])
    )


def test_batches_of_a_group_are_counted_together():
    table = pd.DataFrame(
        [("d", "c", "A", "b0", "train", 0, 3), ("d", "c", "A", "b1", "train", 3, 10)],
        columns=["dataset", "context", "perturbation", "batch", "split", "start", "stop"],
    )
    assert recorded_groups(table) == [RecordedGroup("d", "c", "A", "train", 10)]
