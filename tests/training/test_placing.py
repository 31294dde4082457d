"""Trainings whose cells stay on the device: the same sentences, the same losses, and what is said of it."""

import numpy as np
import pytest
import torch
from trainers import make_trainer, simulated_cells

from pertstate.base.constants import Split
from pertstate.data import SentenceDataset, Splits, load_store, prepare
from pertstate.data import cells_on_device as module
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.streaming import SentenceStream
from pertstate.training import placing


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def stored(screen, tmp_path_factory):
    """The same cells in a store."""
    folder = tmp_path_factory.mktemp("store")
    path = folder / "screen.h5ad"
    cells, _ = simulated_cells(folder)
    assert len(cells) == len(screen[0])
    store = prepare(DataArguments(datasets={"screen": str(path)}), folder / "store", PrepareArguments(), quiet=True)
    held_out = {("screen", "type_2"): "val", ("screen", "type_3"): "test"}
    return load_store(store, Splits({"screen": []}, {"screen"}, held_out))


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(screen, folder, **options):
    """A trained trainer, the batches that it saw, and what its evaluation found."""
    trainer, batches = make_trainer(screen, folder, max_steps=-1, num_train_epochs=2, **options), []
    compute = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        batches.append({key: value.clone() for key, value in inputs.items()})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    found = trainer.evaluate()
    return (
        trainer,
        batches,
        {name: value for name, value in found.items() if "time" not in name and "per_second" not in name},
    )


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("options", [{}, {"cells_per_batch": 150}, {"per_device_train_batch_size": 3}])
def test_cells_on_the_device_are_the_same_batches_to_the_bit(screen, tmp_path, options, share, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: int(share * (1 << 30)))
    host, batches, found = run(screen, tmp_path / "host", cells_on_device=False, **options)
    # What does not fit is sent batch by batch.
    monkeypatch.setattr("pertstate.training.arguments.StateTrainingArguments.keeps_cells_on_device", True)
    there, others, again = run(screen, tmp_path / "there", **options)
    kept = there.placing._placed[1].kept
    assert kept == (len(there.placing._placed[1].rows) if share else 0)
    assert len(batches) == len(others) > 4
    for one, other in zip(batches, others):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key])
    assert logged(host, "loss") == logged(there, "loss") and found == again
    for one, other in zip(host.model.parameters(), there.model.parameters()):
        assert torch.equal(one, other)


def test_a_store_on_the_device_gives_the_same_losses(stored, tmp_path):
    host, batches, found = run(stored, tmp_path / "host", cells_on_device=False, cells_per_batch=150)
    there, others, again = run(stored, tmp_path / "there", cells_on_device=True, cells_per_batch=150)
    assert there.placing._placed[1].features.layout == "dense int16" and host.placing._placed is None
    for one, other in zip(batches, others, strict=True):
        torch.testing.assert_close(one["labels"], other["labels"], rtol=3e-7, atol=0)
        torch.testing.assert_close(one["control_cells"], other["control_cells"], rtol=3e-7, atol=0)
    np.testing.assert_allclose(logged(host, "loss"), logged(there, "loss"), rtol=1e-5)
    assert again == pytest.approx(found, rel=1e-3)


def test_the_log_says_how_many_cells_stay_and_in_what(screen, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(placing.logger, "info", said.append)
    monkeypatch.setattr(module, "free_memory", lambda device: 1 << 30)
    trainer = make_trainer(screen, tmp_path, max_steps=1, cells_on_device=True)
    trainer.train()
    groups = screen[0].groups
    run_cells = groups[groups["split"].isin([Split.CONTROL, Split.TRAIN, Split.VAL, Split.TEST])]
    number = int((run_cells["stop"] - run_cells["start"]).sum())
    there = trainer.placing._placed[1]
    size = f"{there.nbytes / 2**20:.1f} MiB"
    assert said == [
        f"cells_on_device: {number} of {number} cells stay on cpu (sparse float32), in {size} of 1.0 GiB free"
    ]
    # The cells of the validation data are there, too, once and for all.
    trainer.evaluate()
    assert len(said) == 1 and trainer.eval_dataset._there is there


def test_cells_that_do_not_fit_are_counted_or_refused(screen, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 40_000)
    whole = module.CellsOnDevice(screen[0], torch.device("cpu"), whole=False)
    rest = len(whole.rows) - whole.kept
    assert 0 < rest < len(whole.rows) and whole.nbytes <= 20_000
    assert str(whole).endswith(f"; {rest} cells are sent to it batch by batch")
    trainer = make_trainer(screen, tmp_path, cells_on_device=True)
    with pytest.raises(
        ValueError, match=r"cells_on_device=true: the \d+ cells of the run take .* MiB on cpu, expected at most 90%"
    ):
        trainer.train()


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_cells_on_device_is_true_false_or_auto(screen, tmp_path, value):
    with pytest.raises(ValueError, match="cells_on_device must be true, false or auto, found"):
        make_trainer(screen, tmp_path, cells_on_device=value)


def test_batches_on_the_device_are_made_without_workers(screen, tmp_path):
    with pytest.raises(ValueError, match="cells_on_device=true: .* found 2 dataloader workers"):
        make_trainer(screen, tmp_path, cells_on_device=True, dataloader_num_workers=2)


def test_auto_keeps_cells_in_memory_on_a_cpu(screen, tmp_path):
    assert make_trainer(screen, tmp_path).args.keeps_cells_on_device is False


def test_a_stream_has_no_cells_to_keep(tmp_path, screen):
    trainer = make_trainer(screen, tmp_path, cells_on_device=True)
    with pytest.raises(
        ValueError, match="cells_on_device=true: expected cells in memory or in a store, found a stream"
    ):
        trainer.placing.place(SentenceStream.__new__(SentenceStream))


def test_a_run_with_cells_on_the_device_is_continued_exactly(screen, tmp_path):
    options = {"cells_on_device": True, "save_total_limit": 3}
    whole = make_trainer(screen, tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3, **options)
    whole.train()
    parts = make_trainer(screen, tmp_path / "parts", max_steps=6, save_steps=3, **options)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(parts, "loss") == logged(whole, "loss")


def test_one_sentence_of_cells_on_the_device_is_as_on_the_host(screen):
    data = SentenceDataset(*screen, "train", 12)
    expected = data[3]
    data.place_cells(module.CellsOnDevice(screen[0], torch.device("cpu"), whole=True))
    found = data[3]
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])
