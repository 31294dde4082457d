"""From cells to a model, its scores and its card, in Python."""

import gc

import anndata as ad
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file
from transformers.utils.notebook import NotebookProgressCallback

import pertstate
from pertstate.data import simulate_screen


OPTIONS = {
    **{"test_contexts": ["type_3"], "preset": "tiny", "set_size": 12, "max_steps": 8, "per_device_train_batch_size": 4},
    **{"use_cpu": True, "quiet": True, "early_stopping_patience": 40},
}


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=24, seed=1)


@pytest.fixture(scope="module")
def trained(screen):
    return pertstate.fit(screen, **OPTIONS)


def test_from_an_object_to_scores_and_predictions(screen, trained, tmp_path):
    before = screen.copy()
    assert sorted(trained.scores.groups) == [("screen", "type_3", f"pert_{i}") for i in range(3)]
    predicted = trained.predict(screen, perturbations=["pert_1"], contexts=["type_3"])
    controls = (screen.obs["cell_type"] == "type_3") & (screen.obs["perturbation"] == "control")
    assert predicted.n_obs == controls.sum() and set(predicted.obs["perturbation"]) == {"pert_1"}
    assert predicted.uns["pertstate"]["checkpoint"] == "run"
    # The figures of the run, of the model and of its predictions are the same.
    evaluated = trained.evaluate(screen)
    assert evaluated.averages.equals(trained.scores.averages)
    assert evaluated.notes == trained.scores.notes
    assert "note: control cells of the scored contexts were among the training cells: type_3" in repr(evaluated)
    everything = trained.predict(screen, contexts=["type_3"])
    again = pertstate.evaluate(everything, screen, record=trained.record)
    for metric in ("pearson", "mae", "energy"):
        assert again.value("model", metric) == pytest.approx(trained.scores.value("model", metric), abs=1e-6)
    trained.report(tmp_path / "report.html")
    assert "Verdict" in (tmp_path / "report.html").read_text() and trained.history["step"].max() == 8
    assert repr(trained).startswith("TrainedModel(state, ") and trained.scores.verdict in repr(trained)
    assert (before.X != screen.X).nnz == 0 if hasattr(before.X, "nnz") else np.array_equal(before.X, screen.X)
    assert before.obs.equals(screen.obs) and list(screen.uns) == list(before.uns)


def test_a_quiet_run_shows_nothing_in_a_notebook_either(screen, monkeypatch, capfd):
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    options = OPTIONS | {"max_steps": 2, "validation": "auto"}
    pertstate.fit(screen, **options)
    assert capfd.readouterr() == ("", "")
    pertstate.fit(screen, **{**options, "quiet": False})
    assert "<IPython.core.display.HTML object>" in capfd.readouterr().out


def test_an_object_and_its_file_give_the_same_run(screen, trained, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    of_file = pertstate.fit(tmp_path / "screen.h5ad", tmp_path / "run", **OPTIONS)
    weights = [load_file(place / "model.safetensors") for place in (trained.folder, of_file.folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert of_file.scores.averages.equals(trained.scores.averages)
    # The card and the record are there, and say where the cells came from.
    for place, source in ((trained.folder, "object in memory, not hashed"), (of_file.folder, "screen.h5ad")):
        card = (place / "README.md").read_text()
        assert source in card and trained.scores.verdict in " ".join(card.split())
    assert trained.record.groups == of_file.record.groups and (trained.record.hashes == of_file.record.hashes).all()
    assert "screen: the AnnData in memory" in (trained.folder / "README.md").read_text()
    # A second run into the folder is refused, as in the shell.
    with pytest.raises(FileExistsError, match="holds a run; continue it with"):
        pertstate.fit(screen, tmp_path / "run", **OPTIONS)


def test_it_is_kept_where_it_is_saved_and_gone_with_the_model_otherwise(screen, tmp_path):
    trained = pertstate.fit(screen, **{**OPTIONS, "max_steps": 1})
    folder, verdict = trained.folder, trained.scores.verdict
    trained.save(tmp_path / "kept")
    with pytest.raises(FileExistsError):
        trained.save(tmp_path / "kept")
    trained.save(tmp_path / "kept", overwrite=True)
    assert folder.is_dir()
    del trained
    gc.collect()
    assert not folder.exists()
    kept = pertstate.load(tmp_path / "kept")
    assert kept.scores.verdict == verdict and kept.name == "kept" and kept.record is not None
    assert not list((tmp_path / "kept").glob("checkpoint-*"))
    assert kept.predict(screen, contexts=["type_3"]).n_obs > 0


def test_several_datasets_files_and_objects(screen, tmp_path):
    screen[screen.obs["cell_type"] != "type_3"].copy().write_h5ad(tmp_path / "a.h5ad")
    cells = {"one": tmp_path / "a.h5ad", "two": screen[screen.obs["cell_type"] == "type_3"]}  # a view
    trained = pertstate.fit(cells, **OPTIONS)
    assert {group.dataset for group in trained.record.groups} == {"one", "two"}
    assert [group[0] for group in trained.scores.groups] == ["two"] * 3


def test_a_run_file_is_run_with_fields_that_win(screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    data = f"data: {{datasets: {{s: {tmp_path}/screen.h5ad}}, test_contexts: [type_2]}}\n"
    (tmp_path / "run.yaml").write_text(data + "training: {max_steps: 50, output_dir: elsewhere}\n")
    trained = pertstate.fit(tmp_path / "run.yaml", tmp_path / "run", **{**OPTIONS, "validation": "auto"})
    assert {context for _, context, _ in trained.scores.groups} == {"type_3"}
    assert trained.history["step"].max() == 8 and trained.folder == tmp_path / "run"


def test_what_cannot_be_is_one_clear_error(screen, tmp_path):
    with pytest.raises(TypeError, match=r"cells\['a'\]: expected an AnnData or a path, found int"):
        pertstate.fit({"a": 1})
    with pytest.raises(TypeError, match="cells: expected an AnnData or a path, found DataFrame"):
        pertstate.fit(screen.obs)
    with pytest.raises(TypeError, match="cells: expected an AnnData or a path, found ndarray"):
        pertstate.evaluate(np.zeros((2, 3)), screen)
    with pytest.raises(ValueError, match="unknown flag --tset_contexts; .*test_contexts"):
        pertstate.fit(screen, tset_contexts=["type_3"])
    with pytest.raises(ValueError, match="data: held-out context 'type_9' is not in the data"):
        pertstate.fit(screen, test_contexts=["type_9"])
    with pytest.raises(ValueError, match="dry_run trains no model"):
        pertstate.fit(screen, dry_run=True)
    with pytest.raises(FileNotFoundError, match=r"gone.h5ad: no such file"):
        pertstate.fit(tmp_path / "gone.h5ad")
    with pytest.raises(FileNotFoundError, match="load .*nothing: no such checkpoint folder"):
        pertstate.load(tmp_path / "nothing")
    screen.write_h5ad(tmp_path / "backed.h5ad")
    with pytest.raises(ValueError, match=r"found one that is backed by .*backed.h5ad; give the path of that file"):
        pertstate.fit(ad.read_h5ad(tmp_path / "backed.h5ad", backed="r"))
