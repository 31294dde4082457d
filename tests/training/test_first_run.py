"""`pertstate train FILE.h5ad`: a run without a run file."""

import json

import anndata as ad
import launches
import pandas as pd
import pytest
from transformers import AutoModel, AutoProcessor

import pertstate.cli
from pertstate import predict
from pertstate.data import simulate_screen
from pertstate.training.first_run import is_data
from pertstate.training.run import read_run


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """A screen whose columns have other names than the defaults."""
    path = tmp_path_factory.mktemp("first") / "my screen.h5ad"
    adata = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=24, seed=1)
    adata.obs = adata.obs.rename(columns={"perturbation": "gene", "cell_type": "cell_line"})
    adata.obs["gene"] = adata.obs["gene"].cat.rename_categories({"control": "non-targeting"})
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("word", ["a.h5ad", "b/a.H5AD", "a.h5", "a.h5ad.gz", "a.zarr", "a.zarr/", "runs/*.h5ad"])
def test_these_words_name_cells(word):
    assert is_data(word)


@pytest.mark.parametrize("word", ["run.yaml", "a.yml", "state", "a.h5ad.yaml"])
def test_these_words_name_run_files(word):
    assert not is_data(word)


def test_a_folder_of_cells_is_data(tmp_path):
    assert is_data(str(tmp_path))


def test_columns_and_controls_are_found_and_what_is_open_is_auto(screen):
    run = read_run([str(screen), "--test_contexts", "type_3"])
    data = run.data
    assert (data.perturbation_key, data.context_key, data.batch_key) == ("gene", "cell_line", "batch")
    assert data.control == "non-targeting" and data.genes == "auto" and data.validation == "none"
    assert data.datasets == {"my-screen": str(screen)} and data.test_contexts == ["type_3"]
    assert run.model["residual"] == "anchor" and {run.model["preset"], run.model["set_size"]} == {"auto"}
    assert run.training["output_dir"] == "runs/my-screen"
    assert {run.training[name] for name in ("max_steps", "per_device_train_batch_size", "early_stopping_patience")} == {
        "auto"
    }
    assert run.notes == [
        "found in my screen.h5ad by their names: perturbation_key: gene, context_key: cell_line, batch_key: batch, "
        "control: non-targeting; flags of these names set others"
    ]


def test_flags_win_and_steps_that_are_given_are_validated(screen):
    run = read_run([str(screen), "--context_key", "batch", "--max_steps", "9", "--genes", "20", "--preset", "tiny"])
    assert (run.data.context_key, run.data.genes, run.data.validation) == ("batch", 20, "auto")
    assert run.data.batch_key is None  # that column is the context here
    assert (run.training["max_steps"], run.model) == (9, {"residual": "anchor", "preset": "tiny", "set_size": "auto"})
    assert read_run([str(screen), "--residual", "output"]).data.validation == "auto"
    with_epochs = read_run([str(screen), "--num_train_epochs", "2"])
    assert "max_steps" not in with_epochs.training and with_epochs.data.validation == "auto"
    other = read_run([str(screen), "--model_type", "state-cpa"])
    assert other.data.validation == "auto" and other.model["preset"] == "auto"
    fitted = read_run([str(screen), "--model_type", "state-linear"])
    assert "preset" not in fitted.model and "max_steps" not in fitted.training


def test_what_cannot_be_found_is_one_error_that_says_what_to_do(tmp_path, capsys):
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=10, cells_per_group=5, seed=1)
    adata.obs = adata.obs[["perturbation", "cell_type"]].rename(columns={"cell_type": "c"})
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert pertstate.cli.main(["train", str(tmp_path / "a.h5ad")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        "no column found for context_key; obs has " in said and "or with --context where all cells are of one" in said
    )
    run = read_run([str(tmp_path / "a.h5ad"), "--context", "K562"])
    assert run.data.context == "K562" and run.data.perturbation_key == "perturbation"
    assert pertstate.cli.main(["train", str(tmp_path / "a.h5ad"), "--context_key", "cc"]) == 1
    assert "obs has no column 'cc' (context_key)" in capsys.readouterr().err
    assert pertstate.cli.main(["train", str(tmp_path / "gone.h5ad")]) == 1
    assert "gone.h5ad" in capsys.readouterr().err


def test_one_command_trains_validates_scores_and_leaves_a_whole_run(screen, tmp_path):
    words = [
        screen,
        "--test_contexts",
        "type_3",
        "--max_steps",
        "40",
        "--preset",
        "tiny",
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--early_stopping_patience", "40"]
    done = launches.run([launches.TRAIN, *words, "--use_cpu", "true"])
    assert done.returncode == 0, done.stderr
    run, said = tmp_path / "run", done.stderr
    assert "found in my screen.h5ad by their names: perturbation_key: gene" in said
    assert "validation: auto: 3 training groups held out: " in said
    assert "auto: genes all 40" in said and "Verdict on the model, from 3 groups." in said
    assert "step 1/40  loss " in said and "  (the best so far)" in said and "device: 1 x CPU" in said
    assert {"history.csv", "trainer_state.json", "curves.png", "model.safetensors", "scores"} <= {
        path.name for path in run.iterdir()
    }
    history = pd.read_csv(run / "history.csv")
    assert list(history.columns[:4]) == ["step", "epoch", "loss", "eval_loss"]
    # Twenty evaluations, at even steps.
    assert history.loc[history["eval_loss"].notna(), "step"].tolist() == list(range(2, 41, 2))
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 40
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # What was left open is in the checkpoint, decided.
    saved = json.loads((run / "training_args.json").read_text())
    assert (saved["max_steps"], saved["early_stopping_patience"]) == (40, 40)
    assert json.loads((run / "processor_config.json").read_text())["perturbation_key"] == "gene"
    assert "auto" not in [value for name, value in saved.items() if not name.startswith("hub_")]
    assert "datasets:\n    my-screen: my screen.h5ad" in (run / "README.md").read_text()
    model = AutoModel.from_pretrained(run, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(run, trust_remote_code=True)
    predict(model, processor, screen, tmp_path / "out.h5ad", perturbations=["pert_0"], contexts=["type_3"])
    assert set(ad.read_h5ad(tmp_path / "out.h5ad").obs["cell_line"]) == {"type_3"}


def test_a_store_needs_no_run_file_either(screen, tmp_path):
    keys = "perturbation_key: gene, context_key: cell_line, control: non-targeting"
    (tmp_path / "data.yaml").write_text(f"data: {{datasets: {{screen: {screen}}}, {keys}}}\n")
    words = ["--config", tmp_path / "data.yaml", "--output", tmp_path / "store", "--quiet"]
    assert pertstate.cli.main(["prepare", *map(str, words)]) == 0
    run = read_run([str(tmp_path / "store"), "--test_contexts", "type_3"])
    assert run.data.store == str(tmp_path / "store") and run.data.datasets is None and run.notes == []
    assert run.training["output_dir"] == "runs/store"
