"""Properties of the State transition model and of its objective, on small models with random weights."""

import itertools
import re

import pytest
import torch

from pertstate import PerturbationOutput, StateForPerturbation, modeling_state
from pertstate.base.messages import given
from pertstate.base.modeling_layers import Packing
from pertstate.configuration_state import StateConfig
from pertstate.families import objective_for
from pertstate.families.state.objective_state import StateObjective
from pertstate.losses.energy import EnergyLoss
from pertstate.losses.mse import MSELoss
from pertstate.losses.sinkhorn import SinkhornLoss


SENTENCES, CELLS, FEATURES, PERTURBATIONS, BATCHES, GENES = 3, 7, 10, 5, 4, 6
TOKENS = {
    "no_token": {},
    "batch_token": {"batch_token": True},
    "confidence_token": {"confidence_token": True},
    "both_tokens": {"batch_token": True, "confidence_token": True},
}
OUTPUTS_OF_A_SENTENCE = ("confidence", "batch_logits")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors of this size gain nothing from a second thread, and lose much time if other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


everywhere = pytest.mark.parametrize(
    "backbone, implementation, tokens",
    [
        pytest.param(*case[:2], TOKENS[case[2]], id="-".join(case))
        for case in itertools.product(("llama", "gpt2"), ("eager", "sdpa"), TOKENS)
    ],
)


def make_config(**options) -> StateConfig:
    small = {
        "input_dim": FEATURES,
        "num_perturbations": PERTURBATIONS,
        "num_batches": BATCHES,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "nonnegative_output": False,
    }
    if options.get("perturbation_dim"):
        small["num_perturbations"] = None
    if options.get("gene_dim"):
        small["decoder_hidden_sizes"] = [16, 16]
    return StateConfig(**small | options)


def make_model(implementation="sdpa", seed=0, std=0.3, **options) -> StateForPerturbation:
    """A model in evaluation mode, with random parameters. A new model may predict "no change", which proves nothing."""
    config = make_config(**options)
    config._attn_implementation = implementation
    model = StateForPerturbation(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    if config.confidence_token:
        # The confidence is a ReLU. Keep it off its flat side, where every test of it would pass and prove nothing.
        with torch.no_grad():
            model.confidence_head.layers[-2].bias.fill_(5.0)
    return model


def make_batch(seed=0, cells=CELLS, labels=False, genes=False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "control_cells": torch.randn(SENTENCES, cells, FEATURES, generator=generator),
        "perturbation_ids": torch.randint(PERTURBATIONS, (SENTENCES, 1), generator=generator),
        "batch_ids": torch.randint(BATCHES, (SENTENCES, cells), generator=generator),
    }
    if labels:
        batch["labels"] = torch.randn(SENTENCES, cells, FEATURES, generator=generator)
    if genes:
        batch["gene_labels"] = torch.rand(SENTENCES, cells, GENES, generator=generator)
    return batch


def equal(found, expected, tolerance=0.0):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def assert_same_outputs(found: PerturbationOutput, expected: PerturbationOutput, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name in expected:
        equal(found[name], expected[name], tolerance)


def pad(batch: dict, real: list[int], length: int) -> dict:
    """The sentences of `real` cells each, padded to `length` with values that no real cell has."""
    mask = torch.arange(length) < torch.tensor(real)[:, None]
    padded = {"perturbation_ids": batch["perturbation_ids"], "cell_mask": mask}
    for name, garbage in (("control_cells", 1e4), ("batch_ids", 0), ("labels", -1e4), ("gene_labels", 1e4)):
        if name in batch:
            value = batch[name]
            padded[name] = torch.full((SENTENCES, length, *value.shape[2:]), garbage, dtype=value.dtype)
            for i, n in enumerate(real):
                padded[name][i, :n] = value[i, :n]
    return padded


def one(batch: dict, sentence: int, cells: int) -> dict:
    """One sentence with only its first `cells` cells."""
    return {
        k: v[sentence : sentence + 1, : cells if v.dim() > 1 and k != "perturbation_ids" else None]
        for k, v in batch.items()
    }


@everywhere
def test_permuting_the_cells_permutes_the_predictions(backbone, implementation, tokens):
    model = make_model(implementation, backbone=backbone, batch_encoder=True, gene_dim=GENES, **tokens)
    batch = make_batch()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    permuted = batch | {name: batch[name][:, order] for name in ("control_cells", "batch_ids")}
    with torch.no_grad():
        before, after = model(**batch), model(**permuted)
    for name in before:
        kept = name in OUTPUTS_OF_A_SENTENCE
        equal(after[name], before[name] if kept else before[name][:, order], 1e-5)
    assert not torch.allclose(after.predictions, before.predictions, atol=1e-2)


@everywhere
def test_padding_changes_nothing_for_real_cells(backbone, implementation, tokens):
    model = make_model(implementation, backbone=backbone, batch_encoder=True, gene_dim=GENES, **tokens)
    batch, real = make_batch(), [CELLS, 4, 1]
    with torch.no_grad():
        padded = model(**pad(batch, real, CELLS + 3))
        for i, n in enumerate(real):
            alone = model(**one(batch, i, n))
            for name in alone:
                found = padded[name][i : i + 1]
                equal(found if name in OUTPUTS_OF_A_SENTENCE else found[:, :n], alone[name], 1e-5)


class PaddedAttention(Packing):
    """As on a GPU: attention alone is computed on the padded batch."""

    @classmethod
    def of(cls, mask, places, wait, hidden_size):
        return Packing(given("cell_places", places), tuple(mask.shape))


class PackedAlways(Packing):
    """As in a large model: each sentence attends by itself."""

    @classmethod
    def of(cls, mask, places, wait, hidden_size):
        return super().of(mask, places, wait, 10**6)


@everywhere
@pytest.mark.parametrize("packing", [Packing, PackedAlways, PaddedAttention])
@pytest.mark.parametrize("options", [{}, {"residual": "output", "basal_encoder": "mlp"}])
def test_packed_sentences_give_the_loss_and_the_gradient_of_each_alone(
    backbone, implementation, tokens, packing, options, monkeypatch
):
    monkeypatch.setattr(modeling_state, "Packing", packing)
    extra = {"batch_encoder": True, "hidden_dropout": 0.0, "l1_weight": 0.1, **options}
    model = make_model(implementation, backbone=backbone, **extra, **tokens)
    objective, batch, real = objective_for(model.config), make_batch(labels=True), [CELLS, 4, 1]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    packed = pad(batch, real, CELLS + 3)
    packed["cell_places"] = packed["cell_mask"].flatten().nonzero().squeeze(1)
    together = objective(model(**packed), packed)["loss"]
    found = gradients(together)
    alone = []
    for i, n in enumerate(real):
        sentence = one(batch, i, n)
        alone.append(objective(model(**sentence), sentence)["loss"])
    expected = gradients(torch.stack(alone).mean())
    equal(together, torch.stack(alone).mean(), 1e-5)
    assert found.keys() == expected.keys() and len(found) > 10
    for name in expected:
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[name], expected[name], atol=1e-5 * max(1.0, scale.item()), rtol=0)


@pytest.mark.parametrize("packing, computed", [(Packing, (3, CELLS + 3)), (PackedAlways, (1, CELLS + 5))])
def test_a_packed_batch_has_no_values_where_padded(packing, computed, monkeypatch):
    monkeypatch.setattr(modeling_state, "Packing", packing)
    model, batch = make_model(), pad(make_batch(), [CELLS, 4, 1], CELLS + 3)
    seen = []
    for module in (model.cell_encoder, model.backbone.layers[0], model.output_head):
        module.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    with torch.no_grad():
        model(**batch)
    assert seen == [computed] * 3


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_cell_sees_every_other_cell(backbone, implementation):
    model, batch = make_model(implementation, backbone=backbone, confidence_token=True, batch_token=True), make_batch()
    with torch.no_grad():
        before = model(**batch)
        for changed in (0, CELLS - 1):
            other = batch["control_cells"].clone()
            other[:, changed] += 1
            after = model(**batch | {"control_cells": other})
            assert ((after.predictions - before.predictions).abs().amax(-1) > 1e-4).all()
            for name in OUTPUTS_OF_A_SENTENCE:
                assert ((after[name] - before[name]).abs() > 1e-6).all()


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_sees_only_earlier_cells(backbone, implementation, padded):
    model, batch = make_model(implementation, backbone=backbone, attention="causal"), make_batch()
    if padded:
        batch["cell_mask"] = torch.arange(CELLS) < torch.tensor([[7], [6], [7]])
    changed = batch["control_cells"].clone()
    changed[:, 4] += 1
    with torch.no_grad():
        before, after = model(**batch).predictions, model(**batch | {"control_cells": changed}).predictions
    equal(after[:, :4], before[:, :4], 1e-6)
    assert ((after - before).abs().amax(-1)[:, 4:6] > 1e-4).all()


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_attention_none_sees_itself_alone(backbone):
    model, batch = make_model(backbone=backbone, attention="none"), make_batch()
    changed = batch["control_cells"].clone()
    changed[:, 2] += 1
    with torch.no_grad():
        before, after = model(**batch).predictions, model(**batch | {"control_cells": changed}).predictions
        alone = model(**one(batch, 1, 1)).predictions
    different = (after - before).abs().amax(-1) > 1e-4
    assert torch.equal(different, (torch.arange(CELLS) == 2).expand(SENTENCES, -1))
    equal(alone, before[1:2, :1], 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("seen", ["causal", "bidirectional"])
def test_rope_gives_padded_cells_no_position(implementation, seen):
    model = make_model(implementation, attention=seen, positions="rope", confidence_token=True)
    batch, real = make_batch(), [CELLS, 4, 2]
    with torch.no_grad():
        padded = model(**pad(batch, real, CELLS + 3))
        for i, n in enumerate(real):
            alone = model(**one(batch, i, n))
            equal(padded.predictions[i : i + 1, :n], alone.predictions, 1e-5)
            equal(padded.confidence[i : i + 1], alone.confidence, 1e-5)


def test_rope_is_a_position():
    model, batch = make_model(positions="rope"), make_batch()
    with torch.no_grad():
        before, after = model(**batch), model(**batch | {"control_cells": batch["control_cells"].flip(1)})
    assert not torch.allclose(after.predictions.flip(1), before.predictions, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 3])
def test_ids_equal_one_hot_features(layers):
    model, batch = make_model(num_encoder_layers=layers), make_batch()
    ids = batch.pop("perturbation_ids")
    one_hot = torch.nn.functional.one_hot(ids[:, 0], PERTURBATIONS).float()
    with torch.no_grad():
        by_id = model(**batch, perturbation_ids=ids).predictions
        equal(model(**batch, perturbation_features=one_hot).predictions, by_id, 1e-5)
        per_cell = one_hot[:, None].expand(-1, CELLS, -1)
        equal(model(**batch, perturbation_features=per_cell).predictions, by_id, 1e-5)
        others = model(**batch, perturbation_ids=(ids + 1) % PERTURBATIONS).predictions
    assert not torch.allclose(others, by_id, atol=1e-2)


@pytest.mark.parametrize("doses", [None, [[1.5, 0.5, 2.0], [0.1, 3.0, 7.0], [2.0, 5.0, 5.0]]])
def test_combinations_equal_the_multi_hot_vector(doses):
    """The dose of a padded place (id -1) has no effect."""
    model, batch = make_model(), make_batch()
    ids = torch.tensor([[0, 2, 4], [3, 1, -1], [2, -1, -1]])
    multi_hot = torch.zeros(SENTENCES, PERTURBATIONS)
    for i, k in itertools.product(range(SENTENCES), range(3)):
        if ids[i, k] >= 0:
            multi_hot[i, ids[i, k]] = 1.0 if doses is None else doses[i][k]
    del batch["perturbation_ids"]
    given = {} if doses is None else {"perturbation_doses": torch.tensor(doses)}
    with torch.no_grad():
        found = model(**batch, perturbation_ids=ids, **given).predictions
        equal(found, model(**batch, perturbation_features=multi_hot).predictions, 1e-5)
        equal(
            model(**batch, perturbation_ids=ids.flip(1), **{k: v.flip(1) for k, v in given.items()}).predictions,
            found,
            1e-5,
        )


def test_no_perturbation_is_the_control():
    model, batch = make_model(), make_batch()
    del batch["perturbation_ids"]
    with torch.no_grad():
        zeros = model(**batch, perturbation_features=torch.zeros(SENTENCES, PERTURBATIONS)).predictions
        for together in (1, 3):
            ids = torch.full((SENTENCES, together), -1)
            equal(model(**batch, perturbation_ids=ids).predictions, zeros, 1e-6)
            doses = torch.rand(SENTENCES, together)
            equal(model(**batch, perturbation_ids=ids, perturbation_doses=doses).predictions, zeros, 1e-6)
        first = model(**batch, perturbation_ids=torch.zeros(SENTENCES, 1, dtype=torch.long)).predictions
    assert not torch.allclose(first, zeros, atol=1e-2)


def test_features_that_differ_between_cells_stay_with_their_cells():
    model, batch = make_model(perturbation_dim=8, attention="none"), make_batch()
    del batch["perturbation_ids"]
    features = torch.randn(SENTENCES, CELLS, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = model(**batch, perturbation_features=features).predictions
        for cell in range(CELLS):
            alone = model(**batch, perturbation_features=features[:, cell]).predictions
            equal(together[:, cell], alone[:, cell], 1e-5)


@everywhere
def test_gradient_checkpointing_changes_no_bit(backbone, implementation, tokens):
    options = {"attention_dropout": 0.2, "hidden_dropout": 0.2, "backbone": backbone, **tokens}
    batch, gradients = make_batch(labels=True), []
    for checkpointed in (False, True):
        model = make_model(implementation, **options).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        objective_for(model.config)(model(**batch), batch)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.abs().sum() > 0, name
        assert torch.equal(gradients[1][name], expected), name


@everywhere
def test_save_and_load_change_no_bit(tmp_path, backbone, implementation, tokens):
    options = {"gene_dim": GENES, "batch_encoder": True, "residual": "hidden", "output_adapter": True, **tokens}
    model, batch = make_model(implementation, backbone=backbone, **options), make_batch()
    model.save_pretrained(tmp_path)
    loaded = StateForPerturbation.from_pretrained(tmp_path, attn_implementation=implementation)
    assert not loaded.training
    assert loaded.config._attn_implementation == implementation
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert_same_outputs(loaded(**batch), model(**batch))


@everywhere
def test_bf16_autocast_stays_close(backbone, implementation, tokens):
    model, batch = make_model(implementation, std=0.1, backbone=backbone, residual="hidden", **tokens), make_batch()
    with torch.no_grad():
        exact = model(**batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(**batch)
    for name in exact:
        error = (found[name].float() - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 3e-2, name


@pytest.mark.parametrize("options", [{}, {"num_decoder_layers": 1}, {"backbone": "gpt2", "nonnegative_output": True}])
def test_new_model_predicts_no_change(options):
    model = StateForPerturbation(make_config(**options)).eval()
    batch = make_batch()
    batch["control_cells"].abs_()
    with torch.no_grad():
        assert torch.equal(model(**batch).predictions, batch["control_cells"])


@pytest.mark.parametrize("residual", ["none", "hidden"])
def test_other_residuals_predict_change_from_the_start(residual):
    torch.manual_seed(0)
    model, batch = StateForPerturbation(make_config(residual=residual)).eval(), make_batch()
    with torch.no_grad():
        assert (model(**batch).predictions - batch["control_cells"]).abs().mean() > 0.1


def test_new_model_without_change_learns_change():
    """The head starts at zero. After a step, every other parameter has a gradient, too."""
    torch.manual_seed(0)
    model, batch = StateForPerturbation(make_config()), make_batch(labels=True)
    objective, optimizer = objective_for(model.config), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        objective(model(**batch), batch)["loss"].backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if p.grad.abs().sum() == 0]


@pytest.mark.parametrize(
    "options, clamped",
    [
        ({"nonnegative_output": None}, True),
        ({"nonnegative_output": None, "gene_dim": GENES}, False),
        ({"nonnegative_output": True, "gene_dim": GENES}, True),
        ({"nonnegative_output": False}, False),
    ],
)
def test_predictions_are_clamped_exactly_where_they_are_expression(options, clamped):
    model, batch = make_model(**options), make_batch()
    free = make_model(**options | {"nonnegative_output": False})
    with torch.no_grad():
        expected, found = free(**batch).predictions, model(**batch).predictions
    assert (expected < 0).any()
    assert torch.equal(found, expected.clamp(min=0) if clamped else expected)


@pytest.mark.parametrize("residual", ["none", "hidden", "output"])
def test_residuals_add_what_they_say(residual):
    model, batch = make_model(residual=residual), make_batch()
    with torch.no_grad():
        found = model(**batch).predictions
        cells = batch["control_cells"]
        transformed = model.backbone(model.cell_encoder(cells) + model.perturbation_encoder(batch["perturbation_ids"]))
        if residual == "hidden":
            transformed = transformed + model.cell_encoder(cells)
        expected = model.output_head(transformed)
        equal(found, expected + cells if residual == "output" else expected, 1e-6)


def test_detached_decoder_stops_the_gradient_at_the_latents():
    batch = make_batch(genes=True)
    for detached in (True, False):
        model = make_model(gene_dim=GENES, detach_decoder=detached).train()
        EnergyLoss()(model(**batch).gene_predictions, batch["gene_labels"], None).sum().backward()
        reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        everything = {"backbone", "cell_encoder", "gene_decoder", "output_head", "perturbation_encoder"}
        assert reached == ({"gene_decoder"} if detached else everything)


def test_detached_decoder_sees_true_latents_one_step_in_ten():
    model = make_model(gene_dim=GENES, detach_decoder=True, hidden_dropout=0.0, decoder_dropout=0.0)
    batch = make_batch(labels=True)
    batch = {name: value[:1, :2] for name, value in batch.items()}
    with torch.no_grad():
        from_predictions = model(**batch).gene_predictions
        from_labels = model.gene_decoder(batch["labels"])
        assert not torch.allclose(from_labels, from_predictions, atol=1e-2)
        model.train()
        torch.manual_seed(0)
        steps, true = 300, 0
        for _ in range(steps):
            found = model(**batch).gene_predictions
            true += torch.allclose(found, from_labels, atol=1e-4)
            assert torch.allclose(found, from_labels, atol=1e-4) or torch.allclose(found, from_predictions, atol=1e-4)
        # 300 draws at 1 in 10: mean 30, standard deviation 5.
        assert 10 < true < 50
        # It never sees them in evaluation, or without labels.
        model.eval()
        for _ in range(50):
            equal(model(**batch).gene_predictions, from_predictions, 1e-5)
        model.train()
        del batch["labels"]
        for _ in range(50):
            equal(model(**batch).gene_predictions, from_predictions, 1e-4)


def test_attached_decoder_never_reads_the_labels():
    model = make_model(gene_dim=GENES, hidden_dropout=0.0, decoder_dropout=0.0).train()
    batch = make_batch(labels=True)
    with torch.no_grad():
        expected = model(**batch | {"labels": None}).gene_predictions
        for _ in range(50):
            equal(model(**batch).gene_predictions, expected)


@everywhere
def test_hidden_states_and_attentions(backbone, implementation, tokens):
    model, batch = make_model("eager", backbone=backbone, **tokens), make_batch()
    model.set_attn_implementation(implementation)
    length = CELLS + len(tokens)
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
        assert [tuple(h.shape) for h in outputs.hidden_states] == [(SENTENCES, length, 24)] * 3
        first = int(model.config.batch_token)
        encoded = model.cell_encoder(batch["control_cells"]) + model.perturbation_encoder(batch["perturbation_ids"])
        equal(outputs.hidden_states[0][:, first : first + CELLS], encoded, 1e-6)
        assert_same_outputs(
            model(**batch), PerturbationOutput(**{k: v for k, v in outputs.items() if k != "hidden_states"})
        )
        if implementation == "eager":
            outputs = model(
                **batch | {"cell_mask": torch.arange(CELLS) < 5 + torch.zeros(SENTENCES, 1)}, output_attentions=True
            )
            assert [tuple(a.shape) for a in outputs.attentions] == [(SENTENCES, 3, length, length)] * 2
            for weights in outputs.attentions:
                equal(weights.sum(-1), torch.ones(SENTENCES, 3, length), 1e-5)
                assert (weights[..., first + 5 : first + CELLS] == 0).all()
                assert (weights[..., first : first + 5] > 0).all()


def test_outputs_have_the_documented_shapes():
    model = make_model(gene_dim=GENES, batch_token=True, confidence_token=True, output_dim=8, residual="hidden")
    with torch.no_grad():
        outputs = model(**make_batch())
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {
        "predictions": (SENTENCES, CELLS, 8),
        "gene_predictions": (SENTENCES, CELLS, GENES),
        "confidence": (SENTENCES,),
        "batch_logits": (SENTENCES, BATCHES),
    }
    assert set(make_model()(**make_batch()).keys()) == {"predictions"}


def test_half_precision_weights_stay_half_precision():
    model, batch = make_model(batch_token=True, confidence_token=True).to(torch.bfloat16), make_batch()
    batch["control_cells"] = batch["control_cells"].bfloat16()
    with torch.no_grad():
        assert {value.dtype for value in model(**batch).values()} == {torch.bfloat16}


def test_model_needs_a_kind_of_perturbation():
    with pytest.raises(ValueError, match=r"needs num_perturbations .* or perturbation_dim .* found neither"):
        StateForPerturbation(make_config(num_perturbations=None))


FEATURES_MODEL = {"perturbation_dim": 8}
INPUT_ERRORS = {
    "misspelt_input": ({}, {"cell_masks": 1}, TypeError, "takes no input 'cell_masks'; did you mean 'cell_mask'"),
    "unknown_input": ({}, {"qqqq": 1}, TypeError, "takes no input 'qqqq'; expected one of 'control_cells'"),
    "cells_without_sets": (
        {},
        {"control_cells": torch.zeros(3, 10)},
        ValueError,
        r"control_cells: expected shape (batch_size, set_size, 10), found (3, 10)",
    ),
    "other_genes": (
        {},
        {"control_cells": torch.zeros(3, 7, 9)},
        ValueError,
        "found (3, 7, 9); make the batch with the checkpoint's own processor",
    ),
    "no_perturbation": (
        {},
        {"perturbation_ids": None},
        ValueError,
        "expected one of perturbation_ids and perturbation_features, found neither",
    ),
    "both_perturbations": (
        {},
        {"perturbation_features": torch.zeros(3, 5)},
        ValueError,
        "expected one of perturbation_ids and perturbation_features, found both",
    ),
    "ids_for_features": (
        FEATURES_MODEL,
        {},
        ValueError,
        "this model takes perturbation_features (perturbation_dim=8), found perturbation_ids",
    ),
    "ids_without_together": (
        {},
        {"perturbation_ids": torch.zeros(3, dtype=torch.long)},
        ValueError,
        "perturbation_ids: expected shape (3, number of perturbations applied together), found (3,)",
    ),
    "ids_of_other_sentences": (
        {},
        {"perturbation_ids": torch.zeros(2, 1, dtype=torch.long)},
        ValueError,
        "perturbation_ids: expected shape (3, number of perturbations applied together), found (2, 1)",
    ),
    "doses_of_other_shape": (
        {},
        {"perturbation_doses": torch.ones(3, 2)},
        ValueError,
        "perturbation_doses: expected the shape of perturbation_ids (3, 1), found (3, 2)",
    ),
    "multi_hot_of_other_width": (
        {},
        {"perturbation_ids": None, "perturbation_features": torch.zeros(3, 6)},
        ValueError,
        "perturbation_features: expected shape (3, 5) or (3, 7, 5), found (3, 6)",
    ),
    "features_of_other_cells": (
        FEATURES_MODEL,
        {"perturbation_ids": None, "perturbation_features": torch.zeros(3, 6, 8)},
        ValueError,
        "perturbation_features: expected shape (3, 8) or (3, 7, 8), found (3, 6, 8)",
    ),
    "doses_of_features": (
        {},
        {"perturbation_ids": None, "perturbation_features": torch.zeros(3, 5), "perturbation_doses": torch.ones(3, 1)},
        ValueError,
        "perturbation_doses belong to perturbation_ids; scale the features themselves instead",
    ),
    "batches_of_sentences": (
        {},
        {"batch_ids": torch.zeros(3, dtype=torch.long)},
        ValueError,
        "batch_ids: expected shape (3, 7), found (3,)",
    ),
    "mask_of_other_length": (
        {},
        {"cell_mask": torch.ones(3, 6, dtype=torch.bool)},
        ValueError,
        "cell_mask: expected shape (3, 7), found (3, 6)",
    ),
    "no_batches": (
        {"batch_encoder": True},
        {"batch_ids": None},
        ValueError,
        "batch_encoder=True needs batch_ids, found None",
    ),
}


@pytest.mark.parametrize("options, inputs, error, message", INPUT_ERRORS.values(), ids=INPUT_ERRORS)
def test_input_errors_say_what_was_expected_and_found(options, inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_model(**options)(**make_batch() | inputs)


# The objective.

ALL_TERMS = {"gene_dim": GENES, "batch_token": True, "confidence_token": True, "l1_weight": 0.3}
DISTANCES = {"energy": EnergyLoss(), "sinkhorn": SinkhornLoss(0.05), "mse": MSELoss()}


@pytest.mark.parametrize("loss", ["energy", "sinkhorn", "combined", "mse"])
def test_loss_is_the_weighted_sum_of_its_terms(loss):
    weights = {"decoder_weight": 0.7, "confidence_weight": 0.2, "batch_token_weight": 0.4}
    model = make_model(loss=loss, energy_weight=2.0, sinkhorn_weight=0.5, **ALL_TERMS, **weights)
    batch = make_batch(labels=True, genes=True)
    outputs = model(**batch)
    terms = StateObjective(model.config)(outputs, batch)
    main = {"energy": 2.0, "sinkhorn": 0.5} if loss == "combined" else {loss: 1.0}
    expected = main | {"decoder": 0.7, "confidence": 0.2, "batch_token": 0.4, "l1": 0.3}
    assert terms.keys() == {*expected, "loss"}
    equal(terms["loss"], sum(weight * terms[name] for name, weight in expected.items()), 1e-6)

    per_sentence = {name: DISTANCES[name](outputs.predictions, batch["labels"], None) for name in main}
    for name in main:
        equal(terms[name], per_sentence[name].mean(), 1e-6)
    decoded = {name: DISTANCES[name](outputs.gene_predictions, batch["gene_labels"], None).mean() for name in main}
    equal(terms["decoder"], sum(main[name] * decoded[name] for name in main), 1e-6)
    target = 10 * sum(main[name] * per_sentence[name] for name in main)
    equal(terms["confidence"], (outputs.confidence - target).square().mean(), 1e-4)
    equal(terms["l1"], (outputs.predictions - batch["control_cells"]).abs().mean(), 1e-6)


def test_terms_are_those_that_the_config_asks_for():
    batch = make_batch(labels=True)
    terms = StateObjective(make_config())(make_model()(**batch), batch)
    assert terms.keys() == {"energy", "loss"}
    equal(terms["loss"], terms["energy"])


def test_confidence_does_not_pull_on_the_predictions():
    model, batch = make_model(confidence_token=True), make_batch(labels=True)
    outputs = model(**batch)
    outputs.predictions.retain_grad()
    StateObjective(model.config)(outputs, batch)["confidence"].backward()
    assert outputs.predictions.grad is None
    assert model.confidence_token.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", ["energy", "sinkhorn", "combined", "mse"])
def test_objective_ignores_padded_cells(loss):
    # Without a residual to the control cell, garbage in padded inputs would change the L1 term, too.
    model = make_model(loss=loss, residual="none", **ALL_TERMS)
    objective = StateObjective(model.config)
    batch, real = make_batch(labels=True, genes=True), [CELLS, 4, 2]
    with torch.no_grad():
        padded = pad(batch, real, CELLS + 2)
        outputs = model(**padded)
        found = objective(outputs, padded)
        alone = [one(batch, i, n) for i, n in enumerate(real)]
        each = [objective(model(**sentence), sentence) for sentence in alone]
        for name in found:
            equal(
                found[name], torch.stack([terms[name] for terms in each]).mean(), 1e-3 if name == "confidence" else 1e-4
            )
        unmasked = objective(outputs, padded | {"cell_mask": None})
    for name in set(found) - {"confidence", "batch_token"}:
        assert unmasked[name] > 2 * found[name], name


def test_padded_cells_get_no_gradient():
    batch = pad(make_batch(labels=True), [CELLS, 4, 2], CELLS + 2)
    predictions = torch.randn(SENTENCES, CELLS + 2, FEATURES, requires_grad=True)
    StateObjective(make_config(loss="combined", l1_weight=1.0))(PerturbationOutput(predictions=predictions), batch)[
        "loss"
    ].backward()
    assert torch.equal(predictions.grad.abs().sum(-1) > 0, batch["cell_mask"])


@pytest.mark.parametrize(
    "options, key",
    [({}, "labels"), ({"gene_dim": GENES}, "gene_labels"), ({"batch_token": True}, "batch_ids")],
)
def test_missing_targets_are_named(options, key):
    model, batch = make_model(**options), make_batch(labels=True, genes=True)
    outputs = model(**batch)
    del batch[key]
    with pytest.raises(ValueError, match=re.escape(f"the loss needs '{key}' in the batch, found {sorted(batch)}")):
        StateObjective(model.config)(outputs, batch)


def test_batch_cross_entropy_of_mixed_sentences():
    """A sentence of cells from several batches is scored against the share of each."""
    config = make_config(batch_token=True)
    logits = torch.randn(2, BATCHES, generator=torch.Generator().manual_seed(0))
    cells = torch.zeros(2, 4, FEATURES)
    batch = {"labels": cells, "batch_ids": torch.tensor([[0, 0, 3, 1], [2, 2, 2, 0]])}
    outputs = PerturbationOutput(predictions=cells, batch_logits=logits)
    shares = torch.tensor([[0.5, 0.25, 0, 0.25], [0.25, 0, 0.75, 0]])
    found = StateObjective(config)(outputs, batch)["batch_token"]
    equal(found, torch.nn.functional.cross_entropy(logits, shares), 1e-6)
    batch["cell_mask"] = torch.tensor([[True, True, True, False], [True, True, True, False]])
    shares = torch.tensor([[2 / 3, 0, 0, 1 / 3], [0, 0, 1, 0]])
    found = StateObjective(config)(outputs, batch)["batch_token"]
    equal(found, torch.nn.functional.cross_entropy(logits, shares), 1e-6)


@pytest.mark.parametrize("loss", ["energy", "sinkhorn", "mse"])
def test_feature_chunks_average_the_distances_within_each(loss):
    batch = make_batch(labels=True)
    outputs = PerturbationOutput(predictions=batch["control_cells"])
    found = StateObjective(make_config(loss=loss, feature_chunks=3))(outputs, batch)["loss"]
    # 10 features in 3 chunks: 4, 3 and 3.
    parts = [
        DISTANCES[loss](batch["control_cells"][..., a:b], batch["labels"][..., a:b], None)
        for a, b in [(0, 4), (4, 7), (7, 10)]
    ]
    equal(found, torch.stack(parts).mean(), 1e-6)


def test_feature_chunks_are_shuffled_in_training_alone():
    batch = make_batch(labels=True)
    outputs = PerturbationOutput(predictions=batch["control_cells"])
    ordered = StateObjective(make_config(feature_chunks=3))
    shuffled = StateObjective(make_config(feature_chunks=3, shuffle_feature_chunks=True))
    expected = ordered(outputs, batch)["loss"]
    torch.manual_seed(0)
    draws = {shuffled.train()(outputs, batch)["loss"].item() for _ in range(5)}
    assert len(draws) == 5
    assert {shuffled.eval()(outputs, batch)["loss"].item() for _ in range(5)} == {expected.item()}
    assert {ordered.train()(outputs, batch)["loss"].item() for _ in range(5)} == {expected.item()}


def test_no_objective_for_an_unknown_family():
    config = make_config()
    config.model_type = "stat"
    with pytest.raises(ValueError, match=r"no objective trains model_type 'stat'; expected one of \['state'"):
        objective_for(config)
