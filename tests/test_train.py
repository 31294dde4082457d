"""`pertstate train` and `accelerate launch train.py` as a user runs them: processes, kills, full disks, and the folder left."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import launches
import numpy as np
import pytest
import torch
from launches import environment
from safetensors.torch import load_file

import pertstate.cli
from pertstate.data import simulate_screen


ROOT = Path(__file__).parents[1]
CONFIG = """
data:
  datasets: {{screen: {folder}/screen.h5ad}}
  test_contexts: [type_3]
  heldout_controls: true
model:
  preset: tiny
  set_size: 12
training:
  output_dir: {folder}/run
  max_steps: 20
  logging_steps: 1
  save_steps: 5
  per_device_train_batch_size: 4
  learning_rate: 1.0e-3
  disable_tqdm: true
  use_cpu: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    adata = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=60, cells_per_group=24, seed=1)
    adata.write_h5ad(folder / "screen.h5ad")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def command(folder, *flags, processes=1):
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_machines", "1"]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # A free port each time, so that runs at the same time do not meet.
    launch += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    return [*launch, str(ROOT / "train.py"), "--config", str(folder / "run.yaml"), *flags]


def train(folder, *flags, processes=1):
    words = [launches.TRAIN, "--config", folder / "run.yaml", *flags]
    done = launches.run(words) if processes == 1 else launches.run_together(words, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def accelerate_launch(folder, *flags, processes=1):
    """The same with the command itself, which starts processes of its own."""
    done = subprocess.run(
        command(folder, *flags, processes=processes), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(output_dir):
    [last] = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:]))[-1:]
    return [entry["loss"] for entry in json.loads(last.read_text())["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def unbroken(folder):
    accelerate_launch(folder, "--output_dir", str(folder / "unbroken"))
    return folder / "unbroken"


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(folder):
    accelerate_launch(folder, "--output_dir", str(folder / "two"), "--hidden_dropout", "0", processes=2)
    train(folder, "--output_dir", str(folder / "one"), "--hidden_dropout", "0", "--per_device_train_batch_size", "8")
    one, two = losses(folder / "one"), losses(folder / "two")
    assert len(one) == 20
    np.testing.assert_allclose(two, one, rtol=1e-4)
    weights = [load_file(folder / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-3)


def test_processes_share_out_a_store_as_they_do_files(folder):
    """Two processes with two workers each learn the same bits from a store as from files whose cells are on their device."""
    assert pertstate.cli.main(["prepare", "--config", str(folder / "run.yaml"), "--output", str(folder / "store")]) == 0
    flags = ["--max_steps", "10", "--save_steps", "10"]
    there = ["--cells_on_device", "true"]
    train(folder, "--output_dir", str(folder / "from_files"), *flags, *there, processes=2)
    store = ["--store", str(folder / "store"), "--dataloader_num_workers", "2"]
    train(folder, "--output_dir", str(folder / "from_store"), *flags, *store, processes=2)
    files, stored = (load_file(folder / name / "model.safetensors") for name in ("from_files", "from_store"))
    assert losses(folder / "from_files") == losses(folder / "from_store")
    assert all(torch.equal(files[name], stored[name]) for name in files)


@pytest.mark.slow
def test_missing_processes_of_accelerate_are_an_error(folder):
    flags = [
        "--cpu",
        "--num_machines",
        "1",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        [accelerate, "launch", *flags, str(ROOT / "train.py"), "--config", str(folder / "run.yaml")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_with_the_same_weights(folder, unbroken):
    output = folder / "killed"
    process = launches.start([launches.TRAIN, "--config", folder / "run.yaml", "--output_dir", output])
    for line in process.stderr:
        # After the checkpoint of step 10, before that of 15.
        if "  loss " in line and (output / "checkpoint-10").exists():
            break
    assert process.kill().returncode == -signal.SIGKILL
    assert not (output / "config.json").exists()
    done = train(folder, "--output_dir", str(output), "--resume_from_checkpoint", "last")
    assert "resuming from" in done.stderr
    expected, found = (load_file(run / "model.safetensors") for run in (unbroken, output))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert losses(output) == losses(unbroken)


# Kills the process when it opens the n-th file for writing below the output folder.
SABOTAGE = """
import os, sys
count, limit, where = [0], int(os.environ["KILL_AT"]), os.environ["KILL_BELOW"]
def audit(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(where) and "r" != args[1] and args[1]:
        count[0] += 1
    if event in ("os.rename", "os.remove", "shutil.rmtree") and str(args[0]).startswith(where):
        count[0] += 1
    if count[0] >= limit:
        os._exit(137)
sys.addaudithook(audit)
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def loads(folder: Path) -> bool:
    """Whether a folder loads as a checkpoint; if it does, it must be whole."""
    from transformers import AutoModel, AutoProcessor

    try:
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    except Exception:  # noqa: BLE001 - whatever a part of a checkpoint makes the library raise
        return False
    assert processor.feature_dim == model.config.input_dim
    names = {path.name for path in folder.iterdir()}
    needed = {"training_args.json", "README.md", "vocabulary.json", "modeling_state.py", "processing.py"}
    if folder.name.startswith("checkpoint-"):
        needed |= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert needed <= names, needed - names
    return True


def checkpoints_below(output: Path) -> list[Path]:
    return [path.parent for path in output.rglob("config.json")] if output.exists() else []


@pytest.mark.slow
def test_killed_during_a_save_no_folder_is_a_part(folder):
    script = folder / "sabotage.py"
    script.write_text(textwrap.dedent(SABOTAGE))
    flags = ["--config", str(folder / "run.yaml"), "--max_steps", "2", "--save_steps", "1"]
    seen, kill_at, finished = set(), 1, False
    while not finished:
        output = folder / f"kill_{kill_at}"
        done = launches.run(
            [script, launches.TRAIN, *flags, "--output_dir", output],
            environment(KILL_AT=str(kill_at), KILL_BELOW=str(output)),
        )
        finished = done.returncode == 0
        assert finished or done.returncode == 137, done.stderr[-2000:]
        loadable = checkpoints_below(output)
        for path in loadable:
            assert loads(path) or ".partial" in path.parts, path
        seen.add(len(loadable))
        # Every moment of the first save, then in strides through the rest.
        kill_at += 3 if kill_at < 18 else 7
    assert {0, 1} <= seen and max(seen) >= 2
    assert kill_at > 30


def test_a_full_disk_leaves_no_part_and_one_clear_error(folder):
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limit += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    output = folder / "full"
    words = [launches.TRAIN, "--config", folder / "run.yaml", "--max_steps", "2", "--output_dir", output]
    done = launches.run(["-c", limit, *words])
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert checkpoints_below(output) == []
    assert not output.exists()


# What a user does who has only transformers and anndata.
CLEAN = """
import sys
import anndata as ad, numpy as np, torch
from transformers import AutoModel, AutoProcessor
folder, screen, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
sentences = processor(ad.read_h5ad(screen), perturbation="pert_1", context="type_3")
with torch.no_grad():
    predicted = processor.decode(model(**sentences), sentences)
np.save(output, predicted.X)
"""


def test_the_folder_predicts_alone_in_a_clean_process(folder, unbroken, tmp_path, alone):
    import anndata as ad

    from pertstate import StateForPerturbation, StateProcessor

    alone.run(CLEAN, unbroken, folder / "screen.h5ad", tmp_path / "predicted.npy")
    torch.set_num_threads(1)
    processor = StateProcessor.from_pretrained(unbroken)
    model = StateForPerturbation.from_pretrained(unbroken).eval()
    sentences = processor(ad.read_h5ad(folder / "screen.h5ad"), perturbation="pert_1", context="type_3")
    with torch.no_grad():
        expected = processor.decode(model(**sentences), sentences).X
    np.testing.assert_array_equal(np.load(tmp_path / "predicted.npy"), expected)


def test_the_card_tells_what_was_trained_and_how_it_scored(unbroken):
    from huggingface_hub import ModelCard

    card = ModelCard.load(unbroken / "README.md")
    assert card.data.library_name == "transformers"
    for text in (
        "`type_0`, `type_1`, `type_2`",
        "test contexts: `type_3`",
        "| perturbation mean |",
        "| no change | undefined |",
    ):
        assert text in card.text, text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning_rat", "1"], r"unknown flag --learning_rat; did you mean 'learning_rate'"),
        (["--test_contexts", "type_33"], r"'type_33' is not in the data; did you mean 'type_3'"),
        (["--load_best_model_at_end", "true"], r"expected validation data, found none"),
        (["--perturbation_key", "gene"], r"obs has no column 'gene'"),
        (["--input_dim", "3"], r"model.input_dim follows from the data"),
    ],
)
def test_a_wrong_run_is_one_clear_error(folder, flags, message):
    import pertstate.train

    with pytest.raises((ValueError, KeyError), match=message):
        pertstate.train.main(["--config", str(folder / "run.yaml"), *flags])


def test_a_held_out_context_may_have_batches_of_its_own(folder, tmp_path):
    import pertstate.train

    adata = simulate_screen(num_contexts=3, num_perturbations=2, num_genes=40, cells_per_group=24, seed=3)
    adata.obs["plate"] = adata.obs["cell_type"].astype(str) + "_" + adata.obs["batch"].astype(str)
    adata.write_h5ad(tmp_path / "plates.h5ad")
    run = [
        "--config",
        str(folder / "run.yaml"),
        "--datasets",
        str(tmp_path / "plates.h5ad"),
        "--test_contexts",
        "type_2",
    ]
    run += [
        "--batch_key",
        "plate",
        "--control_matching",
        "batch",
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    metrics = pertstate.train.main(run)
    assert np.isfinite(metrics["test_energy"])
    with pytest.raises(ValueError, match=r"control cells of batches without training cells: .*'type_2_b0'"):
        pertstate.train.main([*run, "--batch_encoder", "true", "--overwrite"])


def test_without_validation_data_there_is_no_best_checkpoint(folder, unbroken):
    done = train(folder, "--output_dir", str(folder / "short"), "--max_steps", "1")
    assert "no validation data: the last step is kept, there is no 'best' checkpoint" in done.stderr
    [state] = (folder / "short").glob("checkpoint-*/trainer_state.json")
    assert json.loads(state.read_text())["best_model_checkpoint"] is None


def test_with_validation_data_the_best_step_is_kept(folder):
    output = folder / "best"
    train(
        folder,
        *("--output_dir", str(output), "--val_contexts", "type_2", "--save_steps", "5", "--eval_steps", "5"),
        *("--learning_rate", "0.05", "--save_total_limit", "10"),
    )
    state = json.loads(next(output.glob("checkpoint-20/trainer_state.json")).read_text())
    scores = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(scores, key=scores.get)
    assert Path(state["best_model_checkpoint"]) == output / f"checkpoint-{best}"
    kept, chosen = (
        load_file(output / "model.safetensors"),
        load_file(output / f"checkpoint-{best}" / "model.safetensors"),
    )
    assert all(torch.equal(kept[name], chosen[name]) for name in kept)


def test_the_config_may_come_without_its_flag(folder):
    import pertstate.train

    run = pertstate.train.read_run([str(folder / "run.yaml"), "--learning_rate", "1e-5"])
    assert run.training["learning_rate"] == 1e-5 and run.model["preset"] == "tiny"


def test_the_command_in_another_folder_learns_what_a_launch_does(folder, unbroken, tmp_path):
    command = [
        str(Path(sys.executable).with_name("pertstate")),
        "train",
        str(folder / "run.yaml"),
        "--output_dir",
        "run",
    ]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (load_file(run / "model.safetensors") for run in (unbroken, tmp_path / "run"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "run") == losses(unbroken)


LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--num_machines", "1"]
LAUNCH += ["--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [[sys.executable, str(ROOT / "train.py")], [*LAUNCH, str(ROOT / "train.py")], [*LAUNCH, "-m", "pertstate.train"]],
    ids=["script", "launched script", "launched module"],
)
def test_an_error_is_one_line_however_the_run_is_started(folder, start):
    command = [*start, str(folder / "run.yaml"), "--test_contexts", "type_33"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    message = "pertstate train: error: data: held-out context 'type_33' is not in the data; did you mean 'type_3'"
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
