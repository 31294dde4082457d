"""What an anchor is fitted to, and a training that starts from it."""

import numpy as np
import pytest
import torch
import yaml
from trainers import make_trainer, simulated_cells
from transformers import AutoModel

from pertstate import train
from pertstate.base.cell_sentences import SentenceLayout
from pertstate.data import simulate_screen
from pertstate.data.group_means import GroupMeans
from pertstate.training.anchoring import added_rows, rows_of


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("anchored"))


def test_a_perturbation_measured_alone_keeps_its_change_whatever_its_combinations_do():
    changes = np.array([[1.0, 2.0], [3.0, -1.0], [9.0, 9.0]])
    design = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]])
    rows = rows_of(design, changes)
    np.testing.assert_allclose(rows[:2], changes[:2])
    np.testing.assert_allclose(rows[2], changes[2] - changes[0])  # what its combination leaves for it
    np.testing.assert_allclose(rows[3], changes[:2].mean(axis=0))  # of no training cell: the mean of the others


def test_a_change_is_proportional_to_the_dose():
    design, changes = np.array([[1.0], [2.0], [4.0]]), np.array([[1.1], [1.9], [4.0]])
    slope = (design * changes).sum() / (design**2).sum()
    np.testing.assert_allclose(rows_of(design, changes), [[slope]])


def test_parts_that_are_never_alone_share_what_they_do_together():
    rows = rows_of(np.array([[1.0, 1.0]]), np.array([[4.0, -2.0]]))
    np.testing.assert_allclose(rows, [[2.0, -1.0], [2.0, -1.0]])


def test_a_training_without_steps_predicts_half_and_half(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path, config={"residual": "anchor"})
    trainer.args.max_steps = 0  # as a run that chose no step
    trainer.train()
    cells, processor = screen
    means: GroupMeans = trainer.learned_means()
    rows = cells.groups.query("context == 'type_3' and perturbation == 'control'")[["start", "stop"]].to_numpy()[0]
    x = cells.features[rows[0] : rows[0] + 6]
    layout = SentenceLayout([6])
    for name in processor.vocabulary.perturbations:
        batch = layout.batch({"control_cells": layout.spread(x), **processor.encode([name])})
        found = trainer.model.eval()(**batch).predictions[0].detach().numpy()
        change, fold = means.changes()[name], means.log_folds()[name]
        wanted = (np.maximum(x + change, 0) + np.log1p(np.expm1(x) * np.exp(fold))) / 2
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    scores = trainer.test(trainer.eval_dataset, split="val")
    assert scores.value("model", "mae") == pytest.approx(scores.value("half and half", "mae"), abs=1e-5)


def test_held_out_cells_do_not_enter_the_anchor(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path, config={"residual": "anchor"})
    trainer.args.max_steps = 0  # as a run that chose no step
    trainer.train()
    changes = []
    cells, processor = screen
    for context in ("type_0", "type_1"):
        of = cells.groups[cells.groups["context"] == context].set_index("perturbation")
        mean = {
            name: cells.features[start:stop].mean(axis=0) for name, start, stop in of[["start", "stop"]].itertuples()
        }
        changes.append(np.stack([mean[name] - mean["control"] for name in processor.vocabulary.perturbations]))
    np.testing.assert_allclose(trainer.model.anchor.change, np.mean(changes, axis=0), atol=1e-5)


def test_the_anchor_of_a_checkpoint_stays_as_it_is(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path, config={"residual": "anchor"}, max_steps=2)
    trainer.model.anchor.change.fill_(0.5)
    trainer.train()
    assert (trainer.model.anchor.change == 0.5).all()
    assert torch.equal(trainer.model.anchor.log_fold, torch.zeros_like(trainer.model.anchor.log_fold))


def test_an_added_perturbation_has_its_own_row_and_the_others_stay():
    rows = np.array([[1.0, 1.0], [5.0, 5.0], [0.0, 0.0], [7.0, 7.0], [3.0, 3.0]])
    new = np.array([False, False, True, True, True])
    design = np.array([[1.0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 1, 1, 0]])
    changes = np.array([[9.0, 9.0], [2.0, -1.0], [4.0, 0.0], [5.0, -2.0]])
    found = added_rows(design, changes, rows, new)
    np.testing.assert_array_equal(
        found[:2], rows[:2]
    )  # the data show 9 for the first, which has a row of the checkpoint
    np.testing.assert_allclose(found[2], changes[1])
    np.testing.assert_allclose(
        found[3], [3, -1]
    )  # (4, 0) less the row of the first, and (5, -2) less that of the third
    np.testing.assert_array_equal(found[4], rows[4])  # not measured


TRAINING = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
    "use_cpu": True,
}


def trained(folder, name: str, data: str, model: dict, **more):
    """The anchor of a run whose steps change nothing."""
    section = {"datasets": {"screen": str(folder / data)}}
    content = {"data": section, "model": model, "training": {**TRAINING, "output_dir": str(folder / name), **more}}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    train.main([str(folder / "run.yaml")])
    return AutoModel.from_pretrained(folder / name).anchor


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    """A checkpoint that knows two perturbations of three, and the anchor of a run on all."""
    folder = tmp_path_factory.mktemp("further")
    made = simulate_screen(num_contexts=3, num_perturbations=3, num_genes=30, cells_per_group=20, seed=2)
    made.write_h5ad(folder / "all.h5ad")
    made[made.obs["perturbation"] != "pert_2"].copy().write_h5ad(folder / "first.h5ad")
    fields = {"preset": "tiny", "set_size": 10, "residual": "anchor"}
    return folder, trained(folder, "base", "first.h5ad", fields), trained(folder, "whole", "all.h5ad", fields)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["whole", "adapter"])
def test_a_checkpoint_that_is_trained_further_anchors_the_perturbations_that_are_new_to_it(anchors, options):
    folder, base, whole = anchors
    further = trained(folder, f"further{len(options)}", "all.h5ad", {"pretrained": str(folder / "base")}, **options)
    for table in ("change", "log_fold"):
        old, alone, found = (getattr(anchor, table) for anchor in (base, whole, further))
        assert torch.equal(found[:2], old)
        torch.testing.assert_close(found[2], alone[2], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[2], old.mean(dim=0), atol=0.1)
