"""SIGINT and SIGTERM end a training after the running step, with a whole checkpoint of it."""

import json
import os
import signal
import time

import launches
import pytest
import torch
from safetensors.torch import load_file

from pertstate.base.stopped import SAME_SIGNAL
from pertstate.data import simulate_screen
from pertstate.hub.unfinished import checkpoints_of
from pertstate.training.staging import missing_of


CONFIG = """
data: {{datasets: {{screen: {folder}/screen.h5ad}}, test_contexts: [type_3]}}
model: {{preset: tiny, set_size: 12, hidden_dropout: 0.1}}
training:
  {{output_dir: {folder}/whole, max_steps: 30, logging_steps: 1, save_steps: 1000, per_device_train_batch_size: 4,
  learning_rate: 1.0e-3, disable_tqdm: true, use_cpu: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    screen = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=60, cells_per_group=24, seed=1)
    screen.write_h5ad(folder / "screen.h5ad")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    done = launches.run([launches.TRAIN, folder / "run.yaml"])
    assert done.returncode == 0, done.stderr
    return folder


def started(folder, *flags):
    """A training that has taken a step and has many left."""
    process = launches.start([launches.TRAIN, folder / "run.yaml", "--max_steps", "1000000", *flags])
    for line in process.stderr:
        if "  loss " in line:
            return process
    raise AssertionError(process.communicate().stderr)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_running_step_is_saved_and_the_run_goes_on_to_the_same_bits(folder, tmp_path, number, code, workers):
    """A signal to all processes of the run, as a terminal and a scheduler send it."""
    flags = ["--output_dir", tmp_path / "run", "--dataloader_num_workers", workers]
    process = started(folder, *flags)
    os.killpg(process.pid, number)
    done = process.communicate()
    assert done.returncode == code, done.stderr
    [checkpoint] = checkpoints_of(tmp_path / "run")
    step = int(checkpoint.name[11:])
    assert done.stderr.endswith(
        f"pertstate train: stopped by {signal.Signals(number).name}; step {step} of 1000000 is saved in {checkpoint}: go on with "
        "the same command and --resume_from_checkpoint last\n"
    )
    assert "Traceback" not in done.stderr and missing_of(checkpoint) is None and step < 30
    assert sorted(os.listdir(tmp_path / "run")) == [checkpoint.name] and os.listdir(tmp_path) == ["run"]
    again = launches.run([launches.TRAIN, folder / "run.yaml", *flags, "--resume_from_checkpoint", "last"])
    assert again.returncode == 0, again.stderr
    expected, found = (load_file(run / "model.safetensors") for run in (folder / "whole", tmp_path / "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_second_signal_ends_it_at_once(folder, tmp_path):
    """It ends even if a step waits for ever."""
    code = "import sys, time, pertstate.train\nfrom pertstate.training.trainer import StateTrainer\n"
    code += ""
    code += "def wait(*args, **kwargs): print('waiting', flush=True); [time.sleep(0.05) for _ in range(10000)]\n"
    code += "StateTrainer.compute_loss = wait\nfrom pertstate.cli import main\nraise SystemExit(main(sys.argv[1:]))"
    process = launches.start(["-c", code, "train", folder / "run.yaml", "--output_dir", tmp_path / "run"])
    assert process.stdout.readline() == "waiting\n"
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)  # at the same time, so it is the first one passed on
    time.sleep(SAME_SIGNAL + 0.1)
    assert os.path.exists(f"/proc/{process.pid}")
    os.kill(process.pid, signal.SIGINT)
    done = process.communicate()
    assert done.returncode == 130 and checkpoints_of(tmp_path / "run") == []


def test_of_two_processes_both_stop_at_one_step(folder, tmp_path):
    """They do, whichever of them gets the signal."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, world_size=2, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
    }
    words = [launches.TRAIN, folder / "run.yaml", "--output_dir", tmp_path / "run", "--max_steps", "1000000"]
    ranks = [launches.start(words, launches.environment(RANK=str(i), LOCAL_RANK=str(i), **common)) for i in range(2)]
    for line in ranks[0].stderr:
        if "  loss " in line:
            break
    os.kill(ranks[1].pid, signal.SIGTERM)
    ended = [rank.communicate() for rank in ranks]
    assert [done.returncode for done in ended] == [143, 143], ended
    [checkpoint] = checkpoints_of(tmp_path / "run")
    assert missing_of(checkpoint) is None and (checkpoint / "rng_state_1.pth").is_file()
    assert all(f"is saved in {checkpoint}" in done.stderr for done in ended)


def test_before_the_first_step_there_is_nothing_to_save(folder, tmp_path):
    code = "import sys, time, pertstate.training.whole_run as t\n"
    code += "def slow(*args): print('reading', flush=True); [time.sleep(0.05) for _ in range(10000)]\n"
    code += "t.from_cells = slow\nfrom pertstate.cli import main\nraise SystemExit(main(sys.argv[1:]))"
    process = launches.start(["-c", code, "train", folder / "run.yaml", "--output_dir", tmp_path / "run"])
    assert process.stdout.readline() == "reading\n"
    os.kill(process.pid, signal.SIGTERM)
    done = process.communicate()
    assert done.returncode == 143 and done.stderr.startswith(
        "pertstate train: stopped by SIGTERM; nothing is left of what"
    )
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


def test_where_the_model_alone_is_saved_the_stop_saves_all(folder, tmp_path):
    process = started(folder, "--output_dir", tmp_path / "run", "--save_only_model", "true", "--save_steps", "1")
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate().returncode == 130
    *others, last = checkpoints_of(tmp_path / "run")
    assert missing_of(last) is None and all("the model alone" in str(missing_of(path)) for path in others)
    assert json.loads((last / "training_args.json").read_text())["save_only_model"] is True
