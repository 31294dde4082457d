"""The compositional perturbation autoencoder: what it computes, its adversaries, its optimiser, and what it learns."""

import copy
import json

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from family_tests import FamilyTests, screen, wave  # noqa: F401
from safetensors.torch import load_file
from torch import nn

from pertstate import CPAConfig, CPAForPerturbation, train
from pertstate.base.count_distributions import zero_inflated_negative_binomial_log_prob
from pertstate.data import SentenceDataset, Splits, load_cells
from pertstate.training import StateTrainer, StateTrainingArguments, objective_for


COUNTS = {"input": "layers/counts", "normalize": "none"}
# All phases of the schedule in a few steps.
SCHEDULE = {"adversary_warmup_steps": 2, "adversary_ramp_steps": 2}


class TestCPA(FamilyTests):
    model_type = "state-cpa"
    model_section = SCHEDULE
    golden = [0.0, 0.668154, 0.0, 0.0]
    golden_mean = 0.360195


class TestCPAOnCounts(FamilyTests):
    model_type = "state-cpa"
    fields = {"likelihood": "zinb", "doser": "sigmoid"}
    data = COUNTS
    model_section = {**SCHEDULE, **fields}
    golden = [2.578789, 1.434579, 1.933226, 1.149631]
    golden_mean = 2.260311

    def batch(self):
        batch = super().batch()
        return batch | {name: (5 * batch[name]).round() for name in ("control_cells", "labels")}


def make(**fields) -> tuple[CPAForPerturbation, dict[str, torch.Tensor]]:
    """A small model without dropout, and a batch with a padded sentence, a combination and unknown ids."""
    torch.manual_seed(0)
    sizes = {"input_dim": 6, "num_perturbations": 4, "num_contexts": 3, "num_batches": 2, "hidden_size": 8}
    sizes |= {"latent_dim": 3, "adversary_hidden_size": 5, "hidden_dropout": 0.0, "adversary_dropout": 0.0}
    model = CPAForPerturbation(CPAConfig.from_preset("tiny", **{**sizes, **SCHEDULE, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    counts = model.config.reads_counts
    draw = (lambda *shape: torch.poisson(2 * torch.rand(*shape)) + 1) if counts else torch.rand
    batch = {
        "control_cells": draw(3, 4, 6),
        "labels": draw(3, 4, 6),
        "perturbation_ids": torch.tensor([[0, 2], [3, -1], [-1, -1]]),
        "context_ids": torch.tensor([1, -1, 2]),
        "batch_ids": torch.tensor([[0, 1, 1, 0], [-1, 1, 0, 0], [-1, -1, -1, -1]]),
        "cell_mask": torch.arange(4) < torch.tensor([[4], [2], [4]]),
    }
    return model, batch


def terms_of(model, batch, step=0, training=True):
    objective = objective_for(model.config).train(training)
    objective.set_progress(step, 0.0)
    return objective(model.train(training)(**batch), batch)


# The model


def test_predictions_are_what_the_formulas_give():
    model, batch = make()
    model.eval()
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def relu(x):
        return np.maximum(x, 0)

    z = batch["control_cells"].double().numpy()
    for i in range(2):
        z = linear(z, f"encoder.{i}.0")
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
        z = relu(z * weights[f"encoder.{i}.1.weight"] + weights[f"encoder.{i}.1.bias"])
    rows = weights["perturbation_embedding.weight"]
    z = z + np.stack([rows[0] + rows[2], rows[3], 0 * rows[0]])[:, None]
    rows = weights["context_embedding.weight"]
    z = z + np.stack([rows[1], rows.mean(0), rows[2]])[:, None]
    rows = np.concatenate([weights["batch_embedding.weight"], weights["batch_embedding.weight"].mean(0)[None]])
    z = z + rows[batch["batch_ids"].numpy()]
    for i in range(2):
        z = z @ weights[f"decoder.layers.{i}.weight"].T
        mean, variance = (weights[f"decoder.norms.{i}.running_{name}"] for name in ("mean", "var"))
        z = (z - mean) / np.sqrt(variance + 1e-5)
        z = relu(z * weights[f"decoder.norms.{i}.weight"] + weights[f"decoder.norms.{i}.bias"])
    mean = linear(z, "mean_head")
    variance = np.log1p(np.exp(linear(z, "variance_head"))) + 1e-4

    with torch.no_grad():
        outputs = model(**batch)
    np.testing.assert_allclose(outputs.mean.numpy(), mean, atol=1e-5)
    np.testing.assert_allclose(outputs.predictions.numpy(), relu(mean), atol=1e-5)
    np.testing.assert_allclose(outputs.variance.numpy(), variance, atol=1e-5)
    assert (mean < 0).any() and outputs.adversary_logits is None


def test_published_sizes_are_those_of_the_paper():
    sizes = {"input_dim": 2000, "num_perturbations": 25, "num_contexts": 7}
    with torch.device("meta"):
        model = CPAForPerturbation(CPAConfig.from_preset("published", **sizes))
    assert [tuple(layer[0].weight.shape) for layer in model.encoder] == [
        (1024, 2000),
        *[(1024, 1024)] * 3,
        (84, 1024),
    ]
    assert [tuple(layer.weight.shape) for layer in model.decoder.layers] == [(1024, 84), *[(1024, 1024)] * 3]
    assert tuple(model.mean_head.weight.shape) == tuple(model.variance_head.weight.shape) == (2000, 1024)
    shapes = [tuple(layer.weight.shape) for layer in model.adversaries["context"].layers.layers]
    assert shapes == [(128, 84), (128, 128), (128, 128)]
    assert {name: adversary.output.out_features for name, adversary in model.adversaries.items()} == {
        "perturbation": 26,
        "context": 7,
    }


@pytest.mark.parametrize("doser", ["linear", "sigmoid"])
def test_a_dose_moves_monotonely_from_nothing(doser):
    model, _ = make(doser=doser)
    doses = torch.linspace(0, 5, 40, requires_grad=True)
    ids = torch.ones(40, 1, dtype=torch.long)
    effects = model._perturbation(ids, doses[:, None], None)[:, 0]
    assert torch.equal(effects[0], torch.zeros(3))
    rows = model.perturbation_embedding.weight
    along = (effects / rows[1])[:, 0]  # one number scales the whole vector
    torch.testing.assert_close(effects, along[:, None] * rows[1])
    assert (along.diff() > 0).all()
    if doser == "linear":
        torch.testing.assert_close(along, doses)
    else:
        slope, offset = nn.functional.softplus(model.doser.slope[1]), model.doser.offset[1]
        torch.testing.assert_close(along, torch.sigmoid(slope * doses + offset) - torch.sigmoid(offset))
        effects.square().sum().backward()
        moved = model.doser.slope.grad != 0, model.doser.offset.grad != 0
        assert all(grad.tolist() == [False, True, False, False] for grad in moved)


def test_a_new_sigmoid_doser_has_slope_1():
    doser = CPAForPerturbation(CPAConfig(num_perturbations=2, doser="sigmoid")).doser
    torch.testing.assert_close(
        doser(torch.tensor([[2.0, 0.0]])), torch.tensor([[torch.tensor(2.0).sigmoid() - 0.5, 0]])
    )


@pytest.mark.parametrize("doser", ["linear", "sigmoid"])
def test_effects_of_a_combination_add_up_and_multi_hot_features_are_the_same(doser):
    model, batch = make(doser=doser)
    model.eval()
    batch |= {"perturbation_ids": torch.tensor([[0, 2], [3, -1], [1, 0]])}
    batch["perturbation_doses"] = torch.tensor([[0.5, 2.0], [3.0, 7.0], [1.0, 0.0]])
    ids, doses = batch["perturbation_ids"], batch["perturbation_doses"]
    singles = [model._perturbation(ids[:1, [k]], doses[:1, [k]], None) for k in (0, 1)]
    torch.testing.assert_close(model._perturbation(ids, doses, None)[:1], sum(singles))
    features = torch.tensor([[0.5, 0, 2.0, 0], [0, 0, 0, 3.0], [0, 1.0, 0, 0]])
    expected = model(**batch).predictions
    del batch["perturbation_ids"], batch["perturbation_doses"]
    torch.testing.assert_close(model(**batch, perturbation_features=features).predictions, expected)
    per_cell = features[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(model(**batch, perturbation_features=per_cell).predictions, expected)


def test_features_are_mapped_linearly_and_have_no_adversary():
    model, batch = make(num_perturbations=None, perturbation_dim=5)
    del batch["perturbation_ids"]
    features = torch.randn(3, 5)
    features[2] = 0
    outputs = model.train()(**batch, perturbation_features=features)
    assert sorted(outputs.adversary_logits) == ["batch", "context"]
    effects = model._perturbation(None, None, features)
    torch.testing.assert_close(effects[:, 0], features @ model.perturbation_embedding.weight)
    torch.testing.assert_close(model._perturbation(None, None, 2 * features), 2 * effects)
    assert terms_of(model, {**batch, "perturbation_features": features})["loss"].isfinite()


def test_a_single_context_or_batch_is_neither_embedded_nor_told():
    model, batch = make(num_contexts=1, num_batches=None)
    assert list(model.adversaries) == ["perturbation"]
    assert not [name for name, _ in model.named_parameters() if "context" in name or "batch_embedding" in name]
    model.eval()(control_cells=batch["control_cells"], perturbation_ids=batch["perturbation_ids"])


@pytest.mark.parametrize("key", ["context_ids", "batch_ids"])
def test_ids_that_the_model_was_trained_with_are_asked_for(key):
    model, batch = make()
    batch[key] = None
    with pytest.raises(ValueError, match=f"trained with {key} and needs them, found None; -1 is an unknown one"):
        model(**batch)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"doser": "log"}, r"doser='log' is not an option of CPAConfig: expected one of \['linear', 'sigmoid'\]"),
        ({"likelihood": "poisson"}, r"expected one of \['gauss', 'nb', 'zinb'\]"),
        ({"doser": "sigmoid", "perturbation_dim": 7}, "needs num_perturbations, found perturbation_dim=7; use doser="),
        ({"gene_dim": 5}, "gene_dim=5: this model has no gene decoder; leave gene_input out"),
        ({"library_size": 1e6}, "library_size=1000000.0 and .* have no effect with likelihood='gauss'"),
        (
            {"likelihood": "nb", "nonnegative_output": False},
            "reads counts of genes .* found .* nonnegative_output=False",
        ),
        ({"adversary_warmup_steps": -1}, "adversary_warmup_steps must be at least 0, found -1"),
        ({"adversarial_weight": -1.0}, r"adversarial_weight must lie in \[0, inf\], found -1.0"),
    ],
)
def test_a_config_that_cannot_be_meant_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        CPAConfig(**fields)


# The objective


def test_reconstruction_is_the_likelihood_of_a_normal_distribution_over_real_cells():
    model, batch = make()
    terms = terms_of(model, batch, training=False)
    outputs = model(**batch)
    log_prob = torch.distributions.Normal(outputs.mean, outputs.variance.sqrt()).log_prob(batch["labels"]).sum(-1)
    expected = -torch.stack([log_prob[0].mean(), log_prob[1, :2].mean(), log_prob[2].mean()]).mean()
    torch.testing.assert_close(terms["reconstruction"], expected)
    # In evaluation the loss has no other term, so that losses of different phases can be compared.
    assert set(terms) == {"reconstruction", "loss"} and terms["loss"] is terms["reconstruction"]


def test_reconstruction_of_counts_is_their_likelihood():
    model, batch = make(likelihood="zinb")
    outputs, terms = model.eval()(**batch), terms_of(model, batch, training=False)
    names = ("mean", "inverse_dispersion", "dropout_logits")
    log_prob = zero_inflated_negative_binomial_log_prob(batch["labels"], *(outputs[name] for name in names)).sum(-1)
    expected = -torch.stack([log_prob[0].mean(), log_prob[1, :2].mean(), log_prob[2].mean()]).mean()
    torch.testing.assert_close(terms["reconstruction"], expected)
    torch.testing.assert_close(outputs.mean.sum(-1), batch["control_cells"].sum(-1))
    batch["control_cells"][0, 1] = 0
    with pytest.raises(ValueError, match="control cells without counts of the model's genes, found 1 in a batch"):
        terms_of(model, batch)


def test_counts_are_drawn_from_the_distribution():
    model, batch = make(likelihood="nb")
    batch = {key: value[:1].expand(2000, *value.shape[1:]) for key, value in batch.items() if key != "labels"}
    with pytest.raises(ValueError, match="sample_counts needs evaluation mode"):
        model.train().sample_counts(**batch)
    model.eval()
    counts = model.sample_counts(**batch, generator=torch.Generator().manual_seed(1))
    assert torch.equal(counts, model.sample_counts(**batch, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        outputs = model(**batch)
    mean = outputs.mean[0]
    error = (mean + mean**2 / outputs.inverse_dispersion).div(2000).sqrt()
    assert ((counts.mean(0) - mean).abs() < 5 * error).all()
    with pytest.raises(ValueError, match="likelihood='gauss' has no distribution of counts"):
        make()[0].sample_counts(**batch)


def test_adversaries_are_scored_against_what_is_known():
    model, batch = make()
    batch["perturbation_doses"] = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]])
    terms = terms_of(model, batch)
    logits = {name: value.log_softmax(-1) for name, value in model(**batch).adversary_logits.items()}
    # A combination's target is shared out; a perturbation at dose 0 is the control, the last class.
    pair = -(logits["perturbation"][0][:, [0, 2]].mean(-1)).mean()
    nothing = -logits["perturbation"][1, :2, 4].mean(), -logits["perturbation"][2, :, 4].mean()
    torch.testing.assert_close(terms["perturbation_adversary"], torch.stack([pair, *nothing]).mean())
    known = -logits["context"][0, :, 1].mean(), -logits["context"][2, :, 2].mean()
    torch.testing.assert_close(terms["context_adversary"], torch.stack(known).mean())
    first = -logits["batch"][0].gather(1, batch["batch_ids"][0][:, None]).mean()
    torch.testing.assert_close(terms["batch_adversary"], torch.stack([first, -logits["batch"][1, 1, 1]]).mean())
    best = logits["perturbation"].argmax(-1)
    right = [(best[0] == 0) | (best[0] == 2), best[1, :2] == 4, best[2] == 4]
    torch.testing.assert_close(terms["perturbation_accuracy"], torch.stack([of.float().mean() for of in right]).mean())


def test_an_adversary_without_targets_has_no_loss():
    model, batch = make()
    batch |= {"context_ids": torch.full((3,), -1), "batch_ids": torch.full((3, 4), -1)}
    terms = terms_of(model, batch, step=9)
    assert terms["context_adversary"] == terms["batch_adversary"] == terms["batch_accuracy"] == 0
    terms["loss"].backward()
    # Every parameter has a gradient in every step, even if it is 0, because processes wait for the gradients of one another.
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_penalty_is_the_square_of_the_gradient_of_the_scores():
    model, batch = make()
    model.double().train()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    given = model(**batch).adversary_input.detach()
    mask, expected, h = batch["cell_mask"], 0.0, 1e-6
    for adversary in model.adversaries.values():
        squares = torch.zeros(given.shape, dtype=torch.float64)
        for place in np.ndindex(*given.shape):
            step = torch.zeros(given.shape, dtype=torch.float64)
            step[place] = h
            sums = [adversary((given + sign * step).double(), mask)[mask].sum() for sign in (1, -1)]
            squares[place] = ((sums[0] - sums[1]) / (2 * h)) ** 2
        of_cells = squares.mean(-1)
        expected += torch.stack([of_cells[0].mean(), of_cells[1, :2].mean(), of_cells[2].mean()]).mean()
    terms = terms_of(model, batch)
    assert expected > 1e-3
    assert terms["penalty"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        terms["loss"],
        terms["reconstruction"] + sum(terms[f"{name}_adversary"] for name in model.adversaries) + 20 * terms["penalty"],
    )


def test_each_side_has_the_gradient_of_its_own_loss():
    model, batch = make(adversarial_weight=4.0)
    parameters = dict(model.named_parameters())
    own = [name for name in parameters if name.startswith("adversaries")]
    terms_of(model, batch, step=3)["loss"].backward()  # half way up the ramp
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}

    model.zero_grad()
    objective = objective_for(model.config).train()
    outputs = model(**batch)
    terms = objective(outputs, batch)
    adversaries = sum(terms[f"{name}_adversary"] for name in model.adversaries)
    (adversaries + 20 * terms["penalty"]).backward(inputs=[parameters[name] for name in own])
    for name in own:
        torch.testing.assert_close(found[name], parameters[name].grad, atol=1e-6, rtol=1e-4)

    # The autoencoder's: the same adversaries read the basal state with its history.
    outputs = model(**batch)
    outputs.adversary_logits = {
        name: adversary(outputs.basal, batch["cell_mask"]) for name, adversary in model.adversaries.items()
    }
    outputs.adversary_input = outputs.basal
    terms = objective(outputs, batch)
    adversaries = sum(terms[f"{name}_adversary"] for name in model.adversaries)
    others = [parameter for name, parameter in parameters.items() if name not in own]
    (terms["reconstruction"] - 2.0 * adversaries).backward(inputs=others)
    for name, parameter in parameters.items():
        if name not in own:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_weight_of_the_adversaries_rises_after_the_warm_up():
    model, batch = make(adversary_warmup_steps=10, adversary_ramp_steps=4, adversarial_weight=8.0)
    weights = [terms_of(model, batch, step)["adversarial_weight"].item() for step in (0, 9, 10, 11, 13, 14, 99)]
    assert weights == [0, 0, 0, 2, 6, 8, 8]
    model, batch = make(adversary_warmup_steps=10, adversary_ramp_steps=0)
    assert [terms_of(model, batch, step)["adversarial_weight"].item() for step in (9, 10)] == [0, 15]


def test_before_the_warm_up_is_over_the_encoder_does_not_hear_of_the_adversaries():
    model, batch = make()
    terms = terms_of(model, batch, step=1)
    encoder = list(model.encoder.parameters())
    alone = torch.autograd.grad(terms["reconstruction"], encoder, retain_graph=True)
    for one, other in zip(alone, torch.autograd.grad(terms["loss"], encoder)):
        assert torch.equal(one, other)


# Training


@pytest.fixture(scope="module")
def disentangled(tmp_path_factory):
    """
    Cells whose latent state is the sum of what their context, their perturbation and chance give, seen through a curved
    function: a perturbation's mean change over contexts is not its change in one of them. One pair of each context is held
    out.
    """
    rng = np.random.default_rng(0)
    genes, contexts, perturbations, cells = 60, 8, 8, 20
    loadings, base = rng.normal(0, 0.7, (3, genes)), rng.normal(-1, 0.5, genes)
    of_context, of_perturbation = rng.normal(0, 1.5, (contexts, 3)), rng.normal(0, 1.5, (perturbations, 3))
    values, labels = [], []
    for context in range(contexts):
        for perturbation in range(-1, perturbations):
            n = 2 * cells if perturbation < 0 else cells
            state = of_context[context] + rng.normal(0, 0.3, (n, 3))
            state += of_perturbation[perturbation] if perturbation >= 0 else 0
            values.append(np.maximum(np.logaddexp(0, base + state @ loadings) + rng.normal(0, 0.1, (n, genes)), 0))
            name = "control" if perturbation < 0 else f"pert_{perturbation}"
            labels += [(name, f"type_{context}")] * n
    obs = pd.DataFrame(labels, columns=["perturbation", "cell_type"]).astype("category")
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    path = tmp_path_factory.mktemp("disentangled") / "screen.h5ad"
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(genes)])
    ad.AnnData(np.concatenate(values).astype(np.float32), obs=obs, var=var).write_h5ad(path)
    held = {("screen", f"type_{c}"): {"test": [f"pert_{c % perturbations}"]} for c in range(contexts)}
    return load_cells(Splits({"screen": [path]}, {"screen"}, fewshot=held), normalize="none")


def trainer_of(cells, processor, folder, config=None, multiple_of=1, **arguments) -> StateTrainer:
    fields = {**CPAConfig.sizes(processor), "set_size": 20, **(config or {})}
    torch.manual_seed(0)
    model = CPAForPerturbation(CPAConfig.from_preset("tiny", **fields))
    train_set = SentenceDataset(cells, processor, "train", 20, multiple_of=multiple_of)
    test_set = SentenceDataset(cells, processor, "test", 20, shuffle=False)
    settings = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    settings |= {**CPAConfig.training_defaults, "logging_steps": 1, **arguments}
    return StateTrainer(model, StateTrainingArguments(**settings), train_set, test_set, processing_class=processor)


@pytest.mark.slow
def test_the_adversary_is_fooled_and_an_unseen_pair_is_predicted(disentangled, tmp_path):
    config = {"hidden_dropout": 0.1, "latent_dim": 8, "num_decoder_layers": 1}
    config |= {"adversary_warmup_steps": 250, "adversary_ramp_steps": 100, "adversarial_weight": 20.0}
    # Adversaries that keep up with the encoder.
    config |= {
        "adversary_hidden_size": 64,
        "adversary_dropout": 0.0,
        "adversary_learning_rate": 1e-2,
        "penalty_weight": 0.1,
    }
    options = {"learning_rate": 2e-3, "max_steps": 800, "logging_steps": 50, "lr_decay_epochs": None}
    trainer = trainer_of(*disentangled, tmp_path, config, **options)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "context_accuracy" in entry]
    before, after = history[4], history[-1]  # the end of the warm-up, and of the training
    # Eight contexts: chance is an eighth. (The perturbation of a sentence is drawn apart from its control cells.)
    assert before["context_accuracy"] > 0.4
    assert after["context_accuracy"] < before["context_accuracy"] / 2
    assert after["reconstruction"] < before["reconstruction"]
    # If the encoder does not hear of it, the adversary can read the context until the end.
    few = {**options, "max_steps": 400}
    unheard = trainer_of(*disentangled, tmp_path, {**config, "adversary_warmup_steps": 10**6}, **few)
    unheard.train()
    heard_last = [entry for entry in unheard.state.log_history if "context_accuracy" in entry][-1]
    assert heard_last["context_accuracy"] > 0.4

    metrics = trainer.evaluate()
    assert metrics["eval_mae"] < 0.85 * metrics["eval_perturbation_mean_mae"]
    assert metrics["eval_pearson"] > metrics["eval_perturbation_mean_pearson"]


def test_one_optimiser_over_two_groups_takes_the_steps_of_two(disentangled, tmp_path):
    config = {"adversary_learning_rate": 3e-3, "adversary_weight_decay": 0.2, **SCHEDULE}
    trainer = trainer_of(*disentangled, tmp_path, config, learning_rate=1e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    other = copy.deepcopy(trainer.model)
    adversaries = list(other.adversaries.parameters())
    others = [p for name, p in other.named_parameters() if not name.startswith("adversaries")]
    pair = torch.optim.Adam(others, lr=1e-3, weight_decay=0.1), torch.optim.Adam(adversaries, lr=3e-3, weight_decay=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 3e-3]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for step in range(5):
        for model, optimizers in ((trainer.model, (optimizer,)), (other, pair)):
            torch.manual_seed(step)
            model.zero_grad()
            terms_of(model, batch, step)["loss"].backward()
            for each in optimizers:
                each.step()
    for one, two in zip(trainer.model.parameters(), other.parameters()):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-6)


def test_a_run_that_is_continued_ends_with_the_same_bits(disentangled, tmp_path):
    """The run stops in the warm-up. The adversaries' weights, their optimiser and the schedule go on where they were."""
    config = {"adversary_warmup_steps": 5, "adversary_ramp_steps": 2}
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "save_total_limit": None}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "lr_decay_epochs": 0.5}
    whole = trainer_of(*disentangled, tmp_path / "whole", config, **options)
    whole.train()
    parts = trainer_of(*disentangled, tmp_path / "parts", config, **options)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, one), other in zip(whole.model.state_dict().items(), parts.model.state_dict().values()):
        assert torch.equal(one, other), name
    names = ("loss", "learning_rate", "adversarial_weight", "penalty")
    histories = [[{n: entry.get(n) for n in names} for entry in t.state.log_history[:10]] for t in (whole, parts)]
    assert histories[0] == histories[1]
    assert [entry["adversarial_weight"] for entry in histories[0]] == [0.0] * 6 + [7.5] + [15.0] * 3
    assert histories[0][-1]["learning_rate"] < histories[0][0]["learning_rate"]


def test_accumulated_batches_give_the_mean_of_their_gradients(disentangled, tmp_path):
    """
    Batch normalisation takes its statistics from each batch, so 4 x 2 sentences differ from a batch of 8. But a step uses the
    mean of the four gradients, and the schedule counts steps, not batches.
    """
    config = {**SCHEDULE, "hidden_dropout": 0.0, "adversary_dropout": 0.0}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lr_decay_epochs": None}
    options["adam_epsilon"] = 1e-2  # so that rounding errors of gradients near 0 stay what they are
    trainer = trainer_of(*disentangled, tmp_path, config, multiple_of=8, max_steps=4, **options)
    model = copy.deepcopy(trainer.model)
    dataset = copy.deepcopy(trainer.train_dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=4e-7, eps=1e-2)
    trainer.train()
    weights = [entry["adversarial_weight"] for entry in trainer.state.log_history if "adversarial_weight" in entry]
    assert weights == [0.0, 0.0, 0.0, 7.5]
    for step in range(4):
        optimizer.zero_grad()
        losses = []
        for first in range(8 * step, 8 * step + 8, 2):
            losses.append(terms_of(model, dataset.__getitems__([first, first + 1]), step)["loss"])
        (sum(losses) / 4).backward()
        optimizer.step()
    for (name, one), other in zip(model.state_dict().items(), trainer.model.state_dict().values()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_train_through_every_phase(screen, tmp_path):  # noqa: F811
    content = {
        "data": {
            "datasets": {"screen": str(screen)},
            "batch_key": "batch",
            "normalize": "none",
            "test_contexts": ["type_3"],
        },
        "model": {"model_type": "state-cpa", "preset": "tiny", "set_size": 8, "doser": "sigmoid", **SCHEDULE},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 8, "logging_steps": 1, "save_steps": 8},
    }
    content["training"] |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    done = launches.run_together([launches.TRAIN, "--config", tmp_path / "run.yaml"])
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    weights = [entry["adversarial_weight"] for entry in history if "adversarial_weight" in entry]
    assert weights == [0.0, 0.0, 0.0, 7.5, 15.0, 15.0, 15.0, 15.0]
    assert all(np.isfinite(entry["loss"]) for entry in history if "loss" in entry)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_model_on_counts_says_what_to_set(screen, tmp_path):  # noqa: F811
    case = TestCPA()
    path = case.run_yaml(screen, tmp_path)
    with pytest.raises(ValueError, match="trained on raw counts, found log1p .*; set normalize: none, and input: to"):
        train.main([str(path), "--likelihood", "nb"])
