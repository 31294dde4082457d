"""The folder of a run that was stopped: its last whole checkpoint is the model."""

import logging
import shutil

import anndata as ad
import pytest

import pertstate
import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.hub.unfinished import checkpoints_of, model_folder, wrong_files


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run as it is before its model is written."""
    folder = tmp_path_factory.mktemp("stopped")
    screen = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=30, cells_per_group=24, seed=1)
    screen.write_h5ad(folder / "screen.h5ad")
    fields = {"preset": "tiny", "set_size": 12, "max_steps": 4, "save_steps": 2, "use_cpu": True, "quiet": True}
    pertstate.fit(folder / "screen.h5ad", folder / "run", test_contexts=["type_2"], validation="none", **fields)
    for path in (folder / "run").iterdir():
        if path.is_file():
            path.unlink()
    shutil.rmtree(folder / "run" / "scores")
    return folder


def test_its_last_whole_checkpoint_predicts_and_is_named(stopped, tmp_path, caplog):
    run = stopped / "run"
    with caplog.at_level(logging.WARNING):
        assert model_folder(run) == run / "checkpoint-4"
    assert [r.message for r in caplog.records] == [
        f"{run} holds a run that did not end: its last whole checkpoint is used, checkpoint-4"
    ]
    words = [
        "predict",
        "--model",
        run,
        "--adata",
        stopped / "screen.h5ad",
        "--output",
        tmp_path / "out.h5ad",
        "--quiet",
    ]
    assert pertstate.cli.main([*map(str, words)]) == 0
    predicted = ad.read_h5ad(tmp_path / "out.h5ad")
    assert predicted.uns["pertstate"]["checkpoint"] == "run/checkpoint-4" and predicted.n_obs > 0
    trained = pertstate.load(run)
    assert trained.folder == run / "checkpoint-4" and trained.scores is None and trained.record is not None


def test_a_checkpoint_that_is_not_whole_is_passed_over(stopped, tmp_path):
    run = shutil.copytree(stopped / "run", tmp_path / "run")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    assert wrong_files(run / "checkpoint-4") == "optimizer.pt is missing"
    assert model_folder(run) == run / "checkpoint-2"
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    size = weights.stat().st_size
    with pytest.raises(
        ValueError, match=f"without a whole checkpoint: checkpoint-2: model.safetensors has {size} of {size + 1}"
    ):
        model_folder(run)


def test_a_finished_run_is_its_own_model_and_another_folder_stays_what_it_is(stopped, tmp_path, caplog):
    assert model_folder(tmp_path) == tmp_path and model_folder(tmp_path / "gone") == tmp_path / "gone"
    run = shutil.copytree(stopped / "run", tmp_path / "run")
    for path in (run / "checkpoint-2").iterdir():
        shutil.copyfile(path, run / path.name)
    with caplog.at_level(logging.WARNING):
        assert model_folder(run) == run
    assert not caplog.records
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint-2", "checkpoint-4"]


def test_a_model_beside_the_checkpoints_of_a_later_run_is_used_and_said(stopped, tmp_path, caplog):
    run = tmp_path / "run"
    fields = {"preset": "tiny", "set_size": 12, "max_steps": 2, "save_strategy": "no", "use_cpu": True, "quiet": True}
    pertstate.fit(stopped / "screen.h5ad", run, test_contexts=["type_1"], validation="none", **fields)
    shutil.copytree(stopped / "run" / "checkpoint-4", run / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert model_folder(run) == run
    assert [r.message for r in caplog.records] == [
        f"{run} holds the model of an earlier run, which is used, and checkpoint-4 of a later one that did not end; name "
        f"{run}/checkpoint-4 to use that"
    ]
