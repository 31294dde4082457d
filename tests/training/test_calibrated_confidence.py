"""A run calibrates its confidence on validation groups: test groups choose nothing, and outputs say what it expects."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.data.record import RunRecord
from pertstate.evaluation.metrics import MODEL


MODEL_FIELDS = {"confidence_token": True, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL_FIELDS |= {"intermediate_size": 32, "set_size": 8}


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    simulate_screen(num_contexts=4, num_perturbations=6, num_genes=20, cells_per_group=10, seed=1).write_h5ad(path)
    return path


def run(screen, folder, **fields):
    options = {"max_steps": 4, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, **MODEL_FIELDS}
    return pertstate.fit(screen, folder, quiet=True, test_contexts=["type_3"], **options, **fields)


def rows_of_model(scores):
    return scores.table[scores.table["method"] == MODEL]


def test_it_is_the_line_of_the_validation_groups_and_an_output_says_it(screen, tmp_path):
    trained = run(screen, tmp_path / "run", val_contexts=["type_2"])
    line = trained.record.calibration
    # The same figures by the path of an evaluation, which the validation context is asked of.
    rows = rows_of_model(trained.evaluate(screen, contexts=["type_2"]))
    assert len(rows) == 6
    expected = ConfidenceCalibration.of_groups(rows["confidence"], rows["energy"])
    np.testing.assert_allclose(list(line.to_dict().values()), list(expected.to_dict().values()), rtol=2e-3, atol=1e-4)
    assert RunRecord.load(tmp_path / "run").calibration == line
    test = rows_of_model(trained.scores)
    np.testing.assert_allclose(test["expected_energy"], line.expected(test["confidence"]))
    assert "Calibrated on validation groups, the energy distance that it expects is off by" in trained.scores.verdict
    words = ["predict", "--model", tmp_path / "run", "--adata", screen, "--output", tmp_path / "out.h5ad", "--quiet"]
    assert pertstate.cli.main([str(word) for word in words]) == 0
    said = json.loads(ad.read_h5ad(tmp_path / "out.h5ad").uns["pertstate"]["confidence"])
    assert said["calibration"] == "energy distance from 6 validation groups"
    of_group = said["groups"]["type_3"]["pert_0"]
    assert of_group["expected_energy"] == pytest.approx(float(line.expected(of_group["expected_loss"])))
    words[words.index("--output") : words.index("--quiet")] = ["--summary", tmp_path / "summary.parquet"]
    assert pertstate.cli.main([str(word) for word in words]) == 0
    summary = pd.read_parquet(tmp_path / "summary.parquet").groupby(["context", "perturbation"])
    for name in ("expected_loss", "expected_energy"):
        assert (summary[name].nunique() == 1).all()
        of_cells = {(c, p): of[name] for c, groups in said["groups"].items() for p, of in groups.items()}
        assert summary[name].first().to_dict() == pytest.approx(of_cells, rel=1e-5)


def test_without_validation_groups_it_is_not_calibrated(screen, tmp_path):
    trained = run(screen, tmp_path / "run", validation="none")
    assert trained.record.calibration is None and "expected_energy" not in trained.scores.table
    assert "It is not calibrated: there were no validation groups" in trained.scores.verdict
