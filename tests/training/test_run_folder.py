"""The folder of a run of the command: who may write it, what is continued, and what is refused before data are read."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import launches
import pytest
import torch
from safetensors.torch import load_file

import pertstate.cli
from pertstate.data import simulate_screen
from pertstate.hub.unfinished import checkpoints_of
from pertstate.training.staging import missing_of


CONFIG = """
data: {{datasets: {{screen: {folder}/screen.h5ad}}, test_contexts: [type_2]}}
model: {{preset: tiny, set_size: 12, hidden_dropout: 0.1}}
training:
  {{output_dir: {folder}/run, max_steps: 6, logging_steps: 1, save_steps: 2, per_device_train_batch_size: 4,
  learning_rate: 1.0e-3, disable_tqdm: true, use_cpu: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    simulate_screen(num_contexts=3, num_perturbations=2, num_genes=40, cells_per_group=24, seed=1).write_h5ad(
        folder / "screen.h5ad"
    )
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder


def train(folder, *flags):
    return launches.run([launches.TRAIN, folder / "run.yaml", *flags])


@pytest.fixture
def run(folder, tmp_path):
    """A finished run, in a folder of its own."""
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def into(run: Path, *flags):
    return ["--output_dir", run, *flags]


def bits(run: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "config.json", "vocabulary.json", "processor_config.json")
    return {name: (run / name).read_bytes() for name in names}


def scores(run: Path) -> list[str]:
    return [line for line in (run / "README.md").read_text().splitlines() if line.startswith("|")]


def test_a_finished_run_is_finished_again_and_no_weight_changes(folder, run):
    for _ in range(2):
        done = train(folder, *into(run, "--resume_from_checkpoint", "last"))
        assert done.returncode == 0, done.stderr
        assert "all 6 steps are done: no weight changes, what is missing is finished" in done.stderr
        assert bits(run) == bits(folder / "run") and scores(run) == scores(folder / "run")
        assert [path.name for path in checkpoints_of(run)] == ["checkpoint-4", "checkpoint-6"]
        assert "Trained for 6 steps, on" in (run / "README.md").read_text()


def test_killed_after_its_last_checkpoint_what_is_missing_is_finished(folder, run):
    expected = scores(run)
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
    assert train(folder, *into(run, "--resume_from_checkpoint", "last")).returncode == 0
    assert bits(run) == bits(folder / "run") and scores(run) == expected
    assert {path.name for path in run.iterdir()} == {path.name for path in (folder / "run").iterdir()}


def error(capsys) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def refused(capsys, folder, *flags) -> str:
    assert pertstate.cli.main(["train", str(folder / "run.yaml"), *map(str, flags)]) == 1
    return error(capsys)


def test_a_folder_that_holds_a_run_is_not_trained_into(folder, run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = f"{run} holds a run; continue it with --resume_from_checkpoint last, replace it with --overwrite, or name another"
    assert said in refused(capsys, folder, *into(run))
    # A checkpoint of another run does not make it a continuation. Neither does a model alone, or a checkpoint alone.
    assert said in refused(capsys, folder, *into(run, "--resume_from_checkpoint", folder / "run" / "checkpoint-4"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    shutil.move(run / "checkpoint-4", tmp_path / "alone" / "checkpoint-4")
    assert "alone holds a run" in refused(capsys, folder, *into(tmp_path / "alone"))
    shutil.rmtree(run / "checkpoint-6")
    assert said in refused(capsys, folder, *into(run))
    said = f"{run} holds a model, but no checkpoint to continue from; leave it out and train anew with --overwrite"
    assert said in refused(capsys, folder, *into(run, "--resume_from_checkpoint", "last"))


def test_an_earlier_checkpoint_of_the_run_may_be_continued(folder, run):
    done = train(folder, *into(run, "--resume_from_checkpoint", run / "checkpoint-4"))
    assert done.returncode == 0 and bits(run) == bits(folder / "run"), done.stderr


def test_overwrite_removes_the_checkpoints_when_training_starts_and_the_model_when_there_is_another(
    folder, run, capsys
):
    (run / "notes.txt").write_text("mine")
    before = bits(run)
    flags = into(run, "--overwrite", "--learning_rate", "0.01")
    said = refused(capsys, folder, *flags, "--datasets", "gone.h5ad")
    assert "gone.h5ad: no such file" in said and len(checkpoints_of(run)) == 2 and bits(run) == before
    assert "leave one of them out" in refused(capsys, folder, *flags, "--resume_from_checkpoint", "last")
    process = launches.start([launches.TRAIN, folder / "run.yaml", *flags, "--max_steps", "100000"])
    for line in process.stderr:
        if "  loss " in line:
            break
    process.kill()
    # The folder holds the old model, and only the new run's checkpoints.
    assert bits(run) == before
    rates = [
        json.loads((path / "trainer_state.json").read_text())["log_history"][0]["learning_rate"]
        for path in checkpoints_of(run)
    ]
    assert set(rates) <= {0.01} and all(missing_of(path) is None for path in checkpoints_of(run))
    done = train(folder, *flags)
    assert done.returncode == 0 and bits(run) != before, done.stderr
    assert (run / "notes.txt").read_text() == "mine" and "overwrite:" not in (run / "README.md").read_text()
    assert os.listdir(run.parent) == ["run"] and not list(run.rglob("*.partial"))


def test_the_second_training_in_a_folder_is_told_of_the_first(folder, tmp_path, capsys):
    run = tmp_path / "run"
    process = launches.start([launches.TRAIN, folder / "run.yaml", *into(run, "--max_steps", "100000")])
    for line in process.stderr:
        if "  loss " in line:
            break
    for flags in ([], ["--overwrite"], ["--resume_from_checkpoint", "last"]):
        said = refused(capsys, folder, *into(run, *flags))
        assert re.search(rf"{run} is being written by process {process.pid} on .*train.py.*, since 20\d\d-", said), said
    assert process.kill().returncode == -signal.SIGKILL
    # A process that died holds no lock.
    assert train(folder, *into(run, "--resume_from_checkpoint", "last", "--max_steps", "6")).returncode == 0
    assert os.listdir(tmp_path) == ["run"]


WRONG = [
    (["--learning_rate", ".nan"], "learning_rate must be at least 0 and finite, found nan"),
    (["--learning_rate", "-1e-3"], "learning_rate must be at least 0 and finite, found -0.001"),
    (["--learning_rate", ".inf"], "learning_rate must be at least 0 and finite, found inf"),
    (["--weight_decay", ".nan"], "weight_decay must be at least 0 and finite, found nan"),
    (["--max_grad_norm", "-1"], "max_grad_norm must be at least 0 and finite, found -1"),
    (["--adam_beta1", "1"], "adam_beta1 must be at least 0 and below 1, found 1"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, found 0"),
    (["--per_device_eval_batch_size", "-2"], "per_device_eval_batch_size must be at least 1, found -2"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, found 0"),
    (["--max_steps", "-5"], "max_steps must be at least 1, or -1 where num_train_epochs is set, found -5"),
    (["--max_steps", "0"], "max_steps must be at least 1, or -1 where num_train_epochs is set, found 0"),
    (["--num_train_epochs", ".nan"], "num_train_epochs must be above 0 and finite, found nan"),
    (["--save_steps", "-1"], "save_steps must be a number of steps, or a share of all below 1, found -1"),
    (["--save_steps", "1.5"], "save_steps must be a number of steps, or a share of all below 1, found 1.5"),
    (["--logging_steps", "0"], "logging_steps must be a number of steps, or a share of all below 1, found 0"),
    (["--save_total_limit", "0"], "save_total_limit must be at least 1, found 0"),
    (["--warmup_steps", "-1"], "warmup_steps must be at least 0, found -1"),
    (["--seed", "-1"], "seed must be at least 0 and below 2^32, found -1"),
    (["--dataloader_num_workers", "-1"], "dataloader_num_workers must be at least 0, found -1"),
    (["--lr_decay_epochs", ".inf", "--lr_scheduler_type", "constant"], "lr_decay_epochs must be above 0, found inf"),
    (["--fp16"], "fp16: a CPU does not train in float16; leave it out, or use bf16"),
    (["--seed", "99999999999"], "seed must be at least 0 and below 2^32, found 99999999999"),
    (["--bf16_full_eval"], "bf16_full_eval=True has no meaning here: with bf16: true, evaluations compute in half"),
    (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1 has no meaning here: targets are cells, not"),
    (["--neftune_noise_alpha", "5"], "neftune_noise_alpha=5 has no meaning here: there are no embeddings of tokens"),
    (["--train_sampling_strategy", "group_by_length"], "train_sampling_strategy='group_by_length' has no meaning here"),
    (["--remove_unused_columns"], "remove_unused_columns=True has no meaning here: all of a batch is read; leave it"),
    (["--debug", "underflow_overflow"], "debug='underflow_overflow' has no meaning here: a loss or a gradient"),
    (["--ddp_backend", "gloo"], "ddp_backend='gloo' is for several processes, found one; leave it out, or start them"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_an_argument_out_of_range_is_one_line_before_data_are_read(folder, tmp_path, capsys, flags, message):
    said = refused(capsys, folder, *into(tmp_path / "run"), "--datasets", "gone.h5ad", *flags)
    assert said.startswith(f"pertstate train: error: {message}"), said
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_the_run_goes_on_elsewhere(folder, run, tmp_path):
    """The disk is full while a checkpoint is written, and then while the model takes the place of an older one."""
    code = "import resource, sys; limit = int(sys.argv.pop(1)); from pertstate.cli import main\n"
    code += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); raise SystemExit(main(['train', *sys.argv[1:]]))"
    )
    size = (run / "model.safetensors").stat().st_size
    for limit, name in ((size // 2, "fresh"), (size + 1000, "fresh"), (size // 2, "run")):
        output = tmp_path / name
        flags = ["--resume_from_checkpoint", "last"] if name == "run" else []
        done = launches.run(["-c", code, limit, folder / "run.yaml", *into(output, *flags)])
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "cannot be written, nothing is left of it: " in last and str(output) in last, last
        assert "File too large" in last or "the disk is full, or a limit on the size of files is met" in last
        if name == "fresh":
            assert not output.exists()
    assert bits(run) == bits(folder / "run") and not list(tmp_path.rglob("*.partial"))
    loaded = load_file(run / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in loaded.values())
