"""StateTrainer: what it logs, accumulation, evaluation beside baselines, and errors."""

import json
import os

import numpy as np
import pytest
import torch
from trainers import make_trainer, simulated_cells
from transformers import EvalPrediction, Trainer

from pertstate import StateForPerturbation
from pertstate.configuration_state import StateConfig
from pertstate.data import (
    SentenceDataset,
    Splits,
    load_cells,
    simulate_screen,
)
from pertstate.evaluation.group_scores import LOGGED, GroupScores, logged_figures
from pertstate.evaluation.scoring import ControlCells, Predicted, score_group
from pertstate.training import StateTrainer, StateTrainingArguments


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulated_cells(tmp_path_factory.mktemp("screen"))


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_the_trainer_overrides_the_minimum():
    overridden = {name for name in vars(StateTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    public = {"train", "get_train_dataloader", "create_scheduler", "compute_loss", "evaluate", "push_to_hub"}
    public |= {"set_initial_training_values", "training_step", "save_model"}
    assert overridden == {*public, "_save", "_save_checkpoint"}


def test_every_parameter_moves(screen, tmp_path):
    options = {"confidence_token": True, "l1_weight": 0.01, "loss": "combined"}
    trainer = make_trainer(screen, tmp_path, config=options)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, value in trainer.model.named_parameters() if torch.equal(before[name], value)]
    assert still == []


def test_training_brings_predictions_of_another_context_nearer(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path, max_steps=150, learning_rate=2e-3, lr_scheduler_type="linear")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # A new model predicts no change.
    assert before["eval_energy"] == pytest.approx(before["eval_no_change_energy"], rel=1e-5)
    assert after["eval_energy"] < 0.95 * before["eval_energy"]
    assert after["eval_pearson"] > 0.3


def test_each_term_is_logged_and_weighs_in(screen, tmp_path):
    options = {"confidence_token": True, "l1_weight": 0.05, "loss": "combined"}
    trainer = make_trainer(screen, tmp_path, config=options)
    trainer.train()
    weights = {"energy": 1.0, "sinkhorn": 0.01, "confidence": 0.01, "l1": 0.05}
    for step in range(6):
        total = sum(weight * logged(trainer, name)[step] for name, weight in weights.items())
        assert logged(trainer, "loss")[step] == pytest.approx(total, rel=1e-5)
    assert all(value > 0 for value in logged(trainer, "cells_per_second"))


def test_accumulation_4_times_2_is_a_batch_of_8(screen, tmp_path):
    whole = make_trainer(screen, tmp_path / "whole", multiple_of=8, per_device_train_batch_size=8)
    parts = make_trainer(
        screen, tmp_path / "parts", multiple_of=8, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    whole.train(), parts.train()
    np.testing.assert_allclose(logged(whole, "loss"), logged(parts, "loss"), rtol=1e-5)
    np.testing.assert_allclose(logged(whole, "energy"), logged(parts, "energy"), rtol=1e-5)
    np.testing.assert_allclose(logged(whole, "grad_norm"), logged(parts, "grad_norm"), rtol=1e-4)
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def seen_sentences(trainer):
    """The cells of each sentence of each batch that is trained on, as their sums."""
    seen, compute = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        if model.training:
            mask = inputs.get("cell_mask", torch.ones(inputs["labels"].shape[:2], dtype=torch.bool))
            cells = (inputs["labels"].double().sum(dim=-1) * mask).sum(dim=1)
            seen.append([(round(float(of), 6), int(n)) for of, n in zip(cells, mask.sum(dim=1))])
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    return seen


def test_batches_by_cells_hold_the_same_sentences_in_the_same_order(screen, tmp_path):
    by_count = seen_sentences(make_trainer(screen, tmp_path / "count", max_steps=-1, num_train_epochs=2))
    by_cells = seen_sentences(
        make_trainer(screen, tmp_path / "cells", max_steps=-1, num_train_epochs=2, cells_per_batch=150)
    )
    assert [s for batch in by_cells for s in batch] == [s for batch in by_count for s in batch]
    assert max(sum(n for _, n in batch) for batch in by_cells) <= 150
    assert len(by_cells) < len(by_count)


def test_automatic_batches_by_cells_have_as_many_as_full_sentences(screen, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("pertstate.training.trainer.logger.info", said.append)
    trainer = make_trainer(screen, tmp_path, cells_per_batch="auto", per_device_train_batch_size=7)
    assert trainer.args.cells_of_batch(12) == 84
    assert max(sum(n for _, n in batch) for batch in seen_sentences(trainer)) in range(73, 85)
    assert "cells_per_batch: batches of up to 84 cells on each device" in said


def test_a_run_by_cells_is_continued_exactly(screen, tmp_path):
    options = {"cells_per_batch": 100, "gradient_accumulation_steps": 2, "lr_decay_epochs": 1, "save_total_limit": 3}
    whole = make_trainer(screen, tmp_path / "whole", max_steps=9, save_strategy="steps", save_steps=4, **options)
    assert whole.steps_per_epoch < 8
    whole.train()
    parts = make_trainer(screen, tmp_path / "parts", max_steps=9, save_steps=4, **options)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(parts, "loss") == logged(whole, "loss")
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [0, -3, "many", 2.5])
def test_cells_per_batch_is_a_whole_number_or_auto(screen, tmp_path, value):
    with pytest.raises(ValueError, match="cells_per_batch must be at least 1, or auto, found"):
        make_trainer(screen, tmp_path, cells_per_batch=value)


def test_evaluation_scores_groups_beside_the_baselines(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path)
    trainer.train()
    metrics = trainer.evaluate()
    dataset, model = trainer.eval_dataset, trainer.model.eval()
    scores = []
    for index, group in enumerate(dataset.groups):
        cells, given = [], []
        for i in range(len(dataset)):
            of_group, _, controls = dataset.rows(i)
            if of_group == index:
                given.append(controls)
                batch = trainer.data_collator([dataset[i]])
                with torch.no_grad():
                    cells.append(model(**batch).predictions[0].numpy())
        features = dataset.cells.features
        scores.append(
            score_group(
                (group.dataset, group.context, group.perturbation),
                Predicted(np.concatenate(cells), of_controls=True),
                features[group.rows],
                ControlCells(features[np.concatenate(given)], (group.dataset, group.context)),
                trainer.baselines(),
            )
        )
    assert len(scores) == 3
    expected = {f"eval_{name}": figure for name, figure in logged_figures(scores, LOGGED).items()}
    assert {"eval_pearson", "eval_no_change_energy", "eval_perturbation_mean_mae"} <= set(expected)
    assert "eval_no_change_pearson" not in expected
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_streamed_evaluation_keeps_a_group_at_most_and_gives_the_figures_of_one_that_keeps_all(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path)
    dataset, baselines = trainer.eval_dataset, trainer.baselines(LOGGED)
    predictions = torch.randn(len(dataset), 12, dataset.cells.features.shape[1], generator=torch.manual_seed(0))

    def streamed(of_batch):
        scores, kept, found = GroupScores(dataset, baselines, False), 0, {}
        for start in range(0, len(dataset), of_batch):
            last = start + of_batch >= len(dataset)
            found = scores(EvalPrediction(predictions[start : start + of_batch], None), last)
            kept = max(kept, sum(len(waiting) for waiting in scores._waiting.values()))
        assert [result.group[2] for result in scores.results] == ["pert_0", "pert_1", "pert_2"]
        return found, kept

    # Groups of 24 cells: two sentences each, of which the first waits for the second.
    assert len(dataset) == 6
    whole, _ = streamed(6)
    assert "pearson" in whole
    for of_batch, waiting in ((1, 1), (2, 0), (4, 0), (5, 1)):
        assert streamed(of_batch) == (whole, waiting)


def test_the_size_of_an_evaluation_batch_changes_no_figure(screen, tmp_path):
    figures = []
    for size in (1, 8):
        trainer = make_trainer(screen, tmp_path, per_device_eval_batch_size=size)
        found = trainer.evaluate()
        figures.append({name: of for name, of in found.items() if "time" not in name and "per_second" not in name})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_baselines_know_the_training_split_alone(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path)
    cells, _ = screen
    changes = []
    for context in ("type_0", "type_1"):
        here = (cells.obs["context"] == context).to_numpy()
        treated = cells.features[here & (cells.obs["perturbation"] == "pert_1").to_numpy()]
        controls = cells.features[here & (cells.obs["perturbation"] == "control").to_numpy()]
        changes.append(treated.mean(axis=0) - controls.mean(axis=0))
    np.testing.assert_allclose(trainer.learned_means().changes()["pert_1"], np.mean(changes, axis=0), atol=1e-5)


def test_an_infinite_loss_stops_the_run(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path, learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(FloatingPointError, match=r"energy.* became NaN or infinite in the 1 batches up to step"):
        trainer.train()


def test_the_saved_folder_holds_no_pickle(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path / "run")
    trainer.card = "# a card"
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "anndata_source.py",
        "bounded_text.py",
        "cell_ids.py",
        "cell_sentences.py",
        "cell_source.py",
        "cell_values.py",
        "checkpoint_files.py",
        "config.json",
        "configuration_perturbation.py",
        "configuration_state.py",
        "constants.py",
        "doses.py",
        "experiments.py",
        "files.py",
        "finite.py",
        "gene_names.py",
        "gene_view.py",
        "labels.py",
        "messages.py",
        "model.safetensors",
        "model_features.py",
        "modeling_anchor.py",
        "modeling_finetuning.py",
        "modeling_layers.py",
        "modeling_perturbation.py",
        "modeling_state.py",
        "origin.py",
        "pipeline_perturbation.py",
        "predicted_cells.py",
        "printable.py",
        "processing.py",
        "processor_config.json",
        "processor_files.py",
        "public.py",
        "training_args.json",
        "travelling.py",
        "value_evidence.py",
        "value_scale.py",
        "vocabulary.json",
        "vocabulary.py",
    ]
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["learning_rate"] == 1e-3
    again = StateForPerturbation.from_pretrained(tmp_path / "out")
    for one, other in zip(again.parameters(), trainer.model.parameters()):
        assert torch.equal(one, other)


def test_gene_decoder_and_batches_train_from_embeddings(tmp_path):
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=40, cells_per_group=24, seed=2)
    rng = np.random.default_rng(0)
    adata.obsm["X_emb"] = np.log1p(adata.X.toarray()) @ rng.normal(0, 0.2, (40, 16)).astype(np.float32)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    splits = Splits({"screen": [tmp_path / "screen.h5ad"]}, {"screen"})
    cells, processor = load_cells(splits, input="obsm/X_emb", gene_input="X", genes=30, batch_key="batch")
    config = StateConfig.from_preset(
        "tiny",
        input_dim=16,
        num_perturbations=2,
        gene_dim=30,
        decoder_hidden_sizes=[32, 32],
        num_batches=2,
        batch_encoder=True,
        batch_token=True,
        detach_decoder=True,
    )
    assert not config.nonnegative_output
    train = SentenceDataset(cells, processor, "train", 12, control_matching="batch")
    arguments = StateTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=60, learning_rate=3e-3
    )
    torch.manual_seed(0)
    trainer = StateTrainer(StateForPerturbation(config), arguments, train, processing_class=processor)
    trainer.train()
    decoder = logged(trainer, "decoder")
    assert decoder[-1] < 0.7 * decoder[0]
    assert logged(trainer, "batch_token")[-1] < np.log(2)


def test_the_learning_rate_decays_by_epochs_and_resumes_in_step(screen, tmp_path):
    settings = {"lr_decay_epochs": 1.5, "lr_decay_factor": 0.5, "per_device_train_batch_size": 2, "save_steps": 5}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_total_limit": None, "max_steps": 11}
    whole = make_trainer(screen, tmp_path / "whole", multiple_of=4, **settings)
    # 2 x 3 perturbed groups of 24 cells, and 4 x 48 control cells, in sentences of 12: 28, 4 to a step.
    assert whole.steps_per_epoch == 7
    whole.train()
    # 1.5 epochs are 10.5 steps, rounded to 10.
    assert logged(whole, "learning_rate") == [1e-3] * 10 + [5e-4]
    parts = make_trainer(screen, tmp_path / "parts", multiple_of=4, **settings)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert logged(parts, "learning_rate") == logged(whole, "learning_rate")
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"l2_weight_decay": True, "optim": "sgd"}, "turns AdamW into Adam, found optim='sgd'; use optim: adamw_torch"),
        ({"lr_decay_epochs": 0}, "lr_decay_epochs must be above 0, found 0"),
        ({"lr_decay_factor": 0.5}, "has no effect without lr_decay_epochs"),
        ({"lr_decay_epochs": 2, "lr_decay_factor": 1.5}, r"lr_decay_factor must lie in \(0, 1\], found 1.5"),
        (
            {"lr_decay_epochs": 2, "lr_scheduler_type": "linear"},
            "constant learning rate, found lr_scheduler_type='linear'",
        ),
    ],
)
def test_an_option_that_cannot_be_meant_is_an_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StateTrainingArguments(output_dir=str(tmp_path), **options)


def test_a_term_that_is_not_the_loss_stops_the_run_too(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path)
    batch = {"control_cells": torch.zeros(2, 3, 60)}
    trainer.terms.add({"loss": torch.tensor(1.0), "energy": torch.tensor(float("inf")), "l1": torch.tensor(0.0)}, batch)
    with pytest.raises(FloatingPointError, match=r"^energy became NaN or infinite in the 1 batches up to step 0"):
        trainer.log({"loss": 1.0})


def test_terms_are_means_over_the_batches_since_the_last_log(screen, tmp_path):
    trainer = make_trainer(screen, tmp_path)
    masked = {"control_cells": torch.zeros(2, 3, 60), "cell_mask": torch.tensor([[True] * 3, [True, False, False]])}
    whole = {"control_cells": torch.zeros(2, 3, 60)}
    for value, batch in ((1.0, masked), (4.0, whole)):
        trainer.terms.add({"loss": torch.tensor(9.0), "energy": torch.tensor(value)}, batch)
    logs = {"loss": 9.0}
    trainer.log(logs)
    assert logs["energy"] == 2.5 and logs["cells_per_second"] > 0
    # Callbacks that print or report a log get the terms, and the history keeps them.
    assert trainer.state.log_history[-1].items() >= logs.items()
    trainer.log(other := {"loss": 9.0})
    assert "energy" not in other


def test_each_family_has_its_optimizer(screen, tmp_path):
    parameters = {"learning_rate": 2e-3, "weight_decay": 0.01}
    assert type(make_trainer(screen, tmp_path, **parameters).create_optimizer()) is torch.optim.AdamW
    optimizer = make_trainer(screen, tmp_path, l2_weight_decay=True, **parameters).create_optimizer()
    assert type(optimizer) is torch.optim.Adam
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(2e-3, 0.01), (2e-3, 0.0)]


def test_a_model_is_pushed_at_any_time(hub, screen, tmp_path):
    trainer = make_trainer(screen, tmp_path / "named", hub_token=os.environ["HF_TOKEN"], hub_private_repo=True)
    trainer.processor, trainer.card = screen[1], "---\nlicense: mit\n---\n# a card"
    assert not trainer.args.push_to_hub
    commit = trainer.push_to_hub("As it is")
    repository = hub.repository("ada/named")
    assert repository.private and [c.title for c in repository.history()] == ["As it is", "initial commit"]
    files = hub.read("ada/named", commit.oid)
    assert b"# a card" in files["README.md"] and {"model.safetensors", "modeling_state.py"} <= set(files)
    trainer.card += "\nwith more to say"
    trainer.push_to_hub("Once more", revision="other")
    assert [c.title for c in repository.history("other")] == ["Once more", "As it is", "initial commit"]
    assert len(repository.history()) == 2
