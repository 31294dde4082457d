"""Checkpoints of a training are whole or not there, and are checked before a run continues. A finished run is not trained on."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from kills import killed_at_each_change
from safetensors.torch import load_file
from trainers import make_trainer, simulated_cells
from transformers import TrainerControl, TrainerState

from pertstate.hub.unfinished import FILES, checkpoints_of
from pertstate.training import staging
from pertstate.training.staging import last_whole_checkpoint, missing_of, recover_run, unfit_of


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("screen"))


SAVING = {"save_strategy": "steps", "save_steps": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(screen, tmp_path_factory):
    """A run of 6 steps with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(screen, folder, **SAVING).train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def steps(folder: Path) -> list[int]:
    return [int(path.name[11:]) for path in checkpoints_of(folder)]


def test_a_checkpoint_lists_its_files(run):
    content = json.loads((run / "checkpoint-6" / FILES).read_text())
    files = {path.name: path.stat().st_size for path in (run / "checkpoint-6").iterdir() if path.name != FILES}
    assert content == {"resumable": True, "files": files}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files.keys()
    assert steps(run) == [4, 6] and missing_of(run / "checkpoint-6") is None
    assert not (run / ".partial").exists()


BROKEN = [
    ("optimizer.pt", None, "optimizer.pt is missing"),
    ("scheduler.pt", None, "scheduler.pt is missing"),
    ("rng_state.pth", None, "rng_state.pth is missing"),
    ("trainer_state.json", None, "trainer_state.json is missing"),
    ("optimizer.pt", b"cut", r"optimizer.pt has 3 of \d+ bytes"),
    ("model.safetensors", b"", r"model.safetensors has 0 of \d+ bytes"),
    (FILES, None, "it has no list of its files, files.json: it is cut short, or an older version wrote it"),
    (FILES, b"{", "it has no list of its files"),
    (FILES, b"[]", "it has no list of its files"),
]


@pytest.mark.parametrize("name, content, message", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused(screen, copy, name, content, message, caplog):
    path = copy / "checkpoint-6" / name
    path.unlink() if content is None else path.write_bytes(content)
    trainer = make_trainer(screen, copy, **SAVING)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"checkpoint-6 is not whole: {message}.*; name another checkpoint, or last"):
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-6"))
    assert same(before, trainer.model.state_dict())
    # `last` is the last that is whole.
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(copy) == str(copy / "checkpoint-4")
    assert "checkpoint-6 is not whole: " in caplog.text and "; resuming from checkpoint-4" in caplog.text


@pytest.mark.parametrize(
    "name, value",
    [
        *[
            ("save_steps", []),
            ("logging_steps", "x"),
            ("train_batch_size", []),
            ("total_flos", float("nan")),
            ("epoch", -1),
        ],
        *[
            ("global_step", 10**30),
            ("max_steps", True),
            ("best_metric", "x"),
            ("log_history", {}),
            ("log_history", [{"loss": 1}]),
        ],
        *[("stateful_callbacks", []), ("stateful_callbacks", {}), ("\x1b[2J", 1)],
    ],
)
def test_a_state_that_no_trainer_writes_is_refused(copy, name, value):
    checkpoint = checkpoints_of(copy)[-1]
    assert unfit_of(checkpoint) is None
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    listed = json.loads((checkpoint / FILES).read_text())
    listed["files"][path.name] = path.stat().st_size
    (checkpoint / FILES).write_text(json.dumps(listed))
    assert f"trainer_state.json: {name if name.isprintable() else 'found an unknown entry'} " in unfit_of(checkpoint)


def test_a_run_continues_from_the_last_whole_checkpoint_to_the_same_weights(screen, run, copy):
    (copy / "checkpoint-6" / "optimizer.pt").unlink()
    make_trainer(screen, copy, **SAVING).train(resume_from_checkpoint=True)
    assert same(weights(copy / "checkpoint-6"), weights(run / "checkpoint-6"))
    assert steps(copy) == [4, 6] and missing_of(copy / "checkpoint-6") is None


def test_without_a_whole_checkpoint_nothing_is_trained(screen, copy):
    for path in checkpoints_of(copy):
        (path / "scheduler.pt").unlink()
    with pytest.raises(
        ValueError, match=r"no whole checkpoint to resume from: checkpoint-6: scheduler.pt is missing; check"
    ):
        make_trainer(screen, copy, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="checkpoint-8: no such checkpoint folder"):
        make_trainer(screen, copy, **SAVING).train(resume_from_checkpoint=str(copy / "checkpoint-8"))
    for path in checkpoints_of(copy):
        shutil.rmtree(path)
    assert last_whole_checkpoint(copy) is None and last_whole_checkpoint(copy / "none") is None
    with pytest.raises(ValueError, match="has no checkpoint; leave it out"):
        make_trainer(screen, copy, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_with_only_the_model_is_not_continued(screen, tmp_path):
    make_trainer(screen, tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-6 is not whole: it holds the model alone \(save_only_model\)"):
        make_trainer(screen, tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("length", [{}, {"max_steps": -1, "num_train_epochs": 1}, {"max_steps": 8}], ids=str)
def test_a_finished_run_is_not_trained_on(screen, tmp_path, length):
    settings = {**SAVING, "save_steps": 1, **length}
    first = make_trainer(screen, tmp_path, **settings)
    done = first.train()
    expected, kept = weights(tmp_path / f"checkpoint-{done.global_step}"), steps(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for _ in range(3):
        again = make_trainer(screen, tmp_path, **settings)
        assert again.train(resume_from_checkpoint=True).global_step == done.global_step
        assert same(expected, again.model.state_dict()) and steps(tmp_path) == kept
        assert [entry for entry in again.state.log_history if "train_runtime" in entry] == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    # More steps are trained if they are asked for.
    more = make_trainer(screen, tmp_path, **{**settings, "max_steps": done.global_step + 1})
    assert more.train(resume_from_checkpoint=True).global_step == done.global_step + 1
    assert not same(expected, more.model.state_dict())


BEST = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}


@pytest.fixture(scope="module")
def best(screen, tmp_path_factory):
    """A run whose best step is not its last, and the weights of that step."""
    folder = tmp_path_factory.mktemp("best")
    trainer = make_trainer(screen, folder, **BEST, learning_rate=0.03)
    trainer.train()
    assert trainer.state.best_global_step < 6
    return folder, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_finished_run_loads_its_best_checkpoint_again(screen, best, tmp_path):
    folder, expected = best
    # The best and the last are both kept although one is asked for, and they are found after the folder is moved.
    assert len(steps(folder)) == 2 and steps(folder)[-1] == 6
    moved = shutil.copytree(folder, tmp_path / "moved")
    hidden = folder.rename(folder.with_name("hidden"))
    try:
        again = make_trainer(screen, moved, **BEST)
        again.train(resume_from_checkpoint=True)
    finally:
        hidden.rename(folder)
    assert same(expected, again.model.state_dict())


def test_the_best_must_be_whole_too(screen, best, tmp_path):
    moved = shutil.copytree(best[0], tmp_path / "moved")
    name = checkpoints_of(moved)[0].name
    (moved / name / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"the best checkpoint .*{name} is not whole: model.safetensors is missing"):
        make_trainer(screen, moved, **BEST).train(resume_from_checkpoint=True)


def test_checkpoints_that_are_not_whole_are_removed_first_and_later_ones_next(tmp_path):
    def made(step, whole=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            TrainerState(stateful_callbacks=[TrainerControl()]).save_to_json(str(folder / "trainer_state.json"))
            (folder / FILES).write_text('{"resumable": true, "files": {}}')

    for step in (2, 4, 30):
        made(step)
    made(5, whole=False)
    (tmp_path / "checkpoint-old").mkdir()
    made(6)
    newest = tmp_path / "checkpoint-6"
    left = []
    for limit in (4, 3, 2, 1):
        staging._make_room(tmp_path, newest, None, limit)
        left.append(steps(tmp_path))
    assert left == [[2, 4, 6, 30], [2, 4, 6], [4, 6], [6]]
    assert (tmp_path / "checkpoint-old").is_dir() and not (tmp_path / ".partial").exists()


@pytest.mark.slow
def test_killed_at_any_moment_every_checkpoint_is_whole(screen, tmp_path):
    """Every folder with the name of a checkpoint is whole, and one is removed only to make room for newer ones."""
    seen = set()

    def work():
        make_trainer(screen, tmp_path, **{**SAVING, "save_steps": 1, "max_steps": 4}).train()

    def check():
        assert all(missing_of(path) is None for path in checkpoints_of(tmp_path))
        recover_run(tmp_path)
        left = steps(tmp_path)
        assert (
            all(missing_of(path) is None for path in checkpoints_of(tmp_path)) and not (tmp_path / ".partial").exists()
        )
        assert left == sorted(left) and 0 <= len(left) <= 3
        seen.add(tuple(left))
        for path in checkpoints_of(tmp_path):
            shutil.rmtree(path)

    kills = killed_at_each_change(work, check, tmp_path, stride=13)
    assert kills > 10 and {(), (1,), (1, 2), (2, 3), (3, 4)} <= seen


def test_a_checkpoint_that_takes_the_place_of_another_is_never_gone(screen, run, tmp_path):
    copy = tmp_path / "run"

    def renew():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)

    def work():
        make_trainer(screen, copy, **SAVING).train(resume_from_checkpoint=str(copy / "checkpoint-4"))

    def check():
        assert steps(copy) == [4, 6] and missing_of(copy / "checkpoint-6") is None
        renew()

    renew()
    assert killed_at_each_change(work, check, copy, stride=9) > 5


def test_a_full_disk_says_so_and_leaves_the_other_checkpoints(screen, tmp_path):
    """The optimiser's state is larger than the model. Torch writes it, and does not say why it fails."""
    import resource

    trainer = make_trainer(screen, tmp_path, **{**SAVING, "max_steps": 2})
    trainer.train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
    for limit in (size // 2, size + 1000):
        again = make_trainer(screen, tmp_path, **{**SAVING, "max_steps": 4})
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                again.train(resume_from_checkpoint=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = str(caught.value)
        assert (
            "cannot be written, nothing is left of it: " in said and "checkpoint-4" in said and ".partial" not in said
        )
        assert os.listdir(tmp_path) == ["checkpoint-2"]
