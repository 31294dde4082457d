"""The columns and controls of a file, found by their names."""

import pytest

from pertstate.data import simulate_screen
from pertstate.data.columns import find_columns
from pertstate.data.reading import AnnDataFile


def found(tmp_path, names, control=None, **given):
    screen = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=10, cells_per_group=5, seed=1)
    screen.obs = screen.obs[["perturbation", "cell_type"]].rename(columns=names)
    screen.obs["plate"] = "a"
    screen.write_h5ad(tmp_path / "screen.h5ad")
    with AnnDataFile(tmp_path / "screen.h5ad") as file:
        return find_columns(file, control, **given), file.obs_columns


def test_columns_of_known_names_are_found_and_labels_that_look_like_controls(tmp_path):
    columns, names = found(tmp_path, {"perturbation": "gene", "cell_type": "cell_line"})
    assert columns.keys == {"perturbation_key": "gene", "context_key": "cell_line", "batch_key": "plate"}
    assert columns.control == "control" and sorted(columns.labels) == ["control", "pert_0", "pert_1"]
    assert columns.missing_columns(names) == columns.missing_control() == []
    assert columns.reader().perturbation_key == "gene"


def test_a_column_has_one_part(tmp_path):
    # `treatment` says what was done, so it is not looked for as anything else.
    columns, _ = found(tmp_path, {"cell_type": "treatment"}, perturbation_key="treatment", context_key="perturbation")
    assert columns.keys["perturbation_key"] == "treatment" and columns.keys["context_key"] == "perturbation"


def test_what_is_not_found_is_said(tmp_path):
    columns, names = found(tmp_path, {"perturbation": "p", "cell_type": "c"})
    assert columns.keys["perturbation_key"] is columns.keys["context_key"] is None
    assert columns.missing_columns(names) == [
        "no column found for perturbation_key; obs has ['c', 'p', 'plate']",
        "no column found for context_key; obs has ['c', 'p', 'plate']",
    ] or columns.missing_columns(names) == [
        "no column found for perturbation_key; obs has ['p', 'c', 'plate']",
        "no column found for context_key; obs has ['p', 'c', 'plate']",
    ]
    columns, _ = found(tmp_path, {}, perturbation_key="cell_type")
    assert columns.control is None
    assert columns.missing_control() == [
        "no label looks like the control, found ['type_0', 'type_1']; name it with control="
    ]


def test_a_column_that_is_given_must_be_there(tmp_path):
    with pytest.raises(KeyError, match=r"obs has no column 'perturbatoin' \(perturbation_key\), found .*perturbation"):
        found(tmp_path, {}, perturbation_key="perturbatoin")
