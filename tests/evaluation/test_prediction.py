"""Predictions of whole files."""

import subprocess
import sys

import anndata as ad
import launches
import numpy as np
import pytest
import torch

from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.data import simulate_screen
from pertstate.evaluation import controls_of
from pertstate.evaluation.prediction import predict


@pytest.fixture(scope="module")
def trained():
    screen = simulate_screen(num_contexts=3, num_perturbations=6, num_genes=40, cells_per_group=9, seed=5)
    processor = StateProcessor.fit(screen, set_size=8, batch_key="batch")
    sizes = {"input_dim": 40, "num_perturbations": 6, "num_contexts": 3, "num_batches": 2, "batch_encoder": True}
    torch.manual_seed(0)
    model = StateForPerturbation(StateConfig.from_preset("tiny", set_size=8, **sizes)).eval()
    return screen, processor, model


@pytest.mark.parametrize("cells", [1, 3, None])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_pass_over_many_perturbations_predicts_what_a_pass_for_each_does(tmp_path, trained, cells, batch_size):
    screen, processor, model = trained
    screen.write_h5ad(tmp_path / "screen.h5ad")
    names = [*processor.vocabulary.perturbations, "pert_0+pert_3"]
    options = {"cells_per_perturbation": cells, "quiet": True}
    predict(model, processor, tmp_path / "screen.h5ad", tmp_path / "all.h5ad", names, batch_size=batch_size, **options)
    found = ad.read_h5ad(tmp_path / "all.h5ad")
    rows = 0
    for name in names:
        predict(
            model,
            processor,
            tmp_path / "screen.h5ad",
            tmp_path / "one.h5ad",
            [name],
            batch_size=1,
            overwrite=True,
            **options,
        )
        one = ad.read_h5ad(tmp_path / "one.h5ad")
        same = found[one.obs_names]
        np.testing.assert_array_equal(controls_of(same), controls_of(one))
        np.testing.assert_allclose(same.X, one.X, rtol=1e-4, atol=1e-5)
        assert same.obs["perturbation"].unique().tolist() == [name]
        rows += one.n_obs
    assert found.n_obs == rows == 7 * 3 * (18 if cells is None else cells)
    assert found.obs_names.is_unique


FULL = """
import os, resource, sys
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd
from pertstate.evaluation.whole_hdf5 import whole_hdf5

table = pd.DataFrame({"name": [str(i) for i in range(300)]}, index=[f"cell{i}" for i in range(300)])
cells = ad.AnnData(obs=table, uns={"said": {str(i): str(i) for i in range(30)}})
output, ended, limits = Path(sys.argv[1]), [], range(500, 60_000, 1100)
for limit in limits:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            with whole_hdf5(output) as (file, check):
                ad.io.write_elem(file, "/", cells)
                values = file.create_dataset("X", (300, 200), chunks=(64, 200), dtype="f4")
                for start in range(0, 300, 64):
                    values[start : start + 64] = 1.0
                    check()
        except OSError as error:
            os._exit(7 if "File too large" in str(error) else 8)
        os._exit(0)
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print([(limit, code) for limit, code in zip(limits, ended) if code != 7])
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_byte_is_one_error_and_no_crash(tmp_path):
    # The system fills memory that nobody has written, so that reading it shows at once.
    command = [sys.executable, "-c", FULL, str(tmp_path / "out.h5ad")]
    done = subprocess.run(command, env=launches.environment(MALLOC_PERTURB_="100"), capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    assert not list(tmp_path.iterdir())
