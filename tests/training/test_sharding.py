"""Several processes over gloo, with whole weights (DDP) and with parts of them (FSDP2): what they learn, save and continue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launches
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModel

import pertstate
from pertstate.data import simulate_screen


ROOT = Path(__file__).parents[2]
CONFIG = """
data:
  datasets: {{screen: {folder}/screen.h5ad}}
  test_contexts: [type_3]
  val_contexts: [type_2]
model:
  preset: tiny
  set_size: 12
  hidden_dropout: 0.0
training:
  output_dir: {folder}/run
  max_steps: 8
  logging_steps: 1
  save_steps: 4
  eval_steps: 4
  eval_strategy: steps
  load_best_model_at_end: false
  learning_rate: 1.0e-3
  disable_tqdm: true
  use_cpu: true
"""
# Sums of several processes have another order. Float32, weights after eight steps of AdamW.
CLOSE = {"rtol": 0, "atol": 1e-5}
# In full: two processes with four sentences, one with eight; packed: two batches for a step, by two processes or one after another.
GLOBAL = {
    "full": (["--per_device_train_batch_size", "4"], ["--per_device_train_batch_size", "8"]),
    "packed": (["--cells_per_batch", "40"], ["--cells_per_batch", "40", "--gradient_accumulation_steps", "2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    adata = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=60, cells_per_group=24, seed=1)
    adata.write_h5ad(folder / "screen.h5ad")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file` gives its processes for the file that comes with the package."""
    words = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"), "x.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return {
        name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(("ACCELERATE", "FSDP"))
    }


def train(folder, name, *flags, processes=1, fsdp=False) -> Path:
    program = ROOT / "tests" / "fsdp_on_cpus.py" if fsdp else launches.TRAIN
    words = [program, folder / "run.yaml", "--output_dir", folder / name, *flags]
    extra = fsdp_environment() if fsdp else {}
    done = launches.run(words) if processes == 1 else launches.run_together(words, processes, **extra)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name


def figures(run: Path) -> pd.DataFrame:
    """All that a run logged, but for times."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "grad_norm")
    return pd.DataFrame([{name: v for name, v in entry.items() if not name.endswith(timed)} for entry in log])


@pytest.fixture(scope="module", params=GLOBAL)
def runs(request, folder) -> dict[str, Path]:
    two, one = GLOBAL[request.param]
    return {
        "one": train(folder, f"one-{request.param}", *one),
        "ddp": train(folder, f"ddp-{request.param}", *two, processes=2),
        "fsdp": train(folder, f"fsdp-{request.param}", *two, processes=2, fsdp=True),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_and_score_what_one_does(runs, kind):
    one, two = figures(runs["one"]), figures(runs[kind])
    assert list(one) == list(two) and one["loss"].notna().sum() == 8 and one["eval_pearson"].notna().sum() == 2
    np.testing.assert_allclose(two.to_numpy(float), one.to_numpy(float), rtol=1e-5, atol=1e-6)
    expected, found = (load_file(run / "model.safetensors") for run in (runs["one"], runs[kind]))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **CLOSE)
    expected, found = (pd.read_csv(run / "scores" / "scores.csv") for run in (runs["one"], runs[kind]))
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_was_trained_in_parts_is_an_ordinary_checkpoint(runs):
    run = runs["fsdp"]
    for folder in (run, run / "checkpoint-4"):
        model = AutoModel.from_pretrained(folder)
        assert type(model) is pertstate.StateForPerturbation
        assert model.config.architectures == ["StateForPerturbation"]
    # What the training continues from is in parts, one a process.
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        names = [path.name for path in (run / "checkpoint-4" / part).glob("*.distcp")]
        assert sorted(names) == ["__0_0.distcp", "__1_0.distcp"]
    assert not [*run.glob("*fsdp*")]


@pytest.mark.slow
def test_a_training_in_parts_is_continued_exactly(folder, runs):
    flags = ["--resume_from_checkpoint", runs["fsdp"] / "checkpoint-4"]
    flags += GLOBAL["packed" if "packed" in runs["fsdp"].name else "full"][0]
    again = train(folder, f"again-{runs['fsdp'].name}", *flags, processes=2, fsdp=True)
    expected, found = (load_file(run / "model.safetensors") for run in (runs["fsdp"], again))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_training_goes_on_with_another_number_of_processes(folder, runs):
    """With as many sentences a step, and no dropout, it learns what it would have learned with the same number."""
    two, one = GLOBAL["packed" if "packed" in runs["ddp"].name else "full"]
    expected = load_file(runs["one"] / "model.safetensors")
    for begun, flags, processes in (("one", two, 2), ("ddp", one, 1)):
        resumed = ["--resume_from_checkpoint", runs[begun] / "checkpoint-4", *flags]
        again = train(folder, f"from-{runs[begun].name}", *resumed, processes=processes)
        found = load_file(again / "model.safetensors")
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, **CLOSE)


def test_what_cannot_be_in_parts_is_refused(folder):
    words = [folder / "run.yaml", "--output_dir", folder / "refused"]
    done = launches.run_together([launches.TRAIN, *words], 2, **fsdp_environment())
    assert done.returncode == 1 and "accelerate was asked for FSDP, which it has for two or more" in done.stderr
    program = ROOT / "tests" / "fsdp_on_cpus.py"
    done = launches.run_together([program, *words, "--average_decay", "0.9"], 2, **fsdp_environment())
    assert done.returncode == 1 and "found average_decay; use DDP instead" in done.stderr


@pytest.mark.slow
def test_a_killed_process_fails_the_job_and_the_run_goes_on(folder):
    run, of_ddp = folder / "killed", ROOT / "configs" / "accelerate" / "ddp.yaml"
    accelerate = Path(sys.executable).with_name("accelerate")
    launch = [
        accelerate,
        "launch",
        "--config_file",
        of_ddp,
        "--main_process_port",
        "0",
        launches.TRAIN,
        folder / "run.yaml",
    ]
    flags = ["--output_dir", run, "--eval_strategy", "no"]
    words = [str(word) for word in [*launch, *flags, "--max_steps", "100000"]]
    with subprocess.Popen(words, env=launches.environment(), stderr=subprocess.PIPE, text=True) as job:
        until = time.monotonic() + 120
        while not [*run.glob("checkpoint-*/files.json")] and job.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        killed, start = int(children[-1]), time.monotonic()
        os.kill(killed, signal.SIGKILL)
        said = job.communicate(timeout=60)[1]
    assert job.returncode == 1 and time.monotonic() - start < 60
    assert f"failed (exitcode: -9) local_rank: 1 (pid: {killed})" in said
    last = max(int(path.name[11:]) for path in run.glob("checkpoint-*"))
    more = ["--eval_strategy", "no", "--resume_from_checkpoint", "last", "--max_steps", str(last + 4)]
    train(folder, "killed", *more, processes=2)
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == last + 4
