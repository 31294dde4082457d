"""The gene-token transformer: genes as tokens, flags and drugs, training on drawn genes, evaluation on all of them."""

import json
import logging
import re

import anndata as ad
import numpy as np
import pytest
import torch
import yaml
from family_tests import FamilyTests
from published_scgpt import PublishedScGPT, write_published
from safetensors.torch import load_file

import pertstate.cli
from pertstate import (
    ScGPTConfig,
    ScGPTForPerturbation,
    StateProcessor,
    train,
)
from pertstate.data import simulate_screen
from pertstate.families.scgpt.modeling_scgpt import ScGPTOutput
from pertstate.processing import PerturbationFeatures, Vocabulary
from pertstate.training import objective_for


GENES, PERTURBED = 20, [3, 7, 11]


@pytest.fixture(scope="session")
def screen(tmp_path_factory):
    """Counts of four contexts, three perturbations that are genes of the data, and two batches."""
    adata = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=16, seed=1)
    adata.var_names = [f"pert_{i - 5}" if 5 <= i < 8 else name for i, name in enumerate(adata.var_names)]
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    adata.write_h5ad(path)
    return path


class TestScGPT(FamilyTests):
    model_type = "state-scgpt"
    fields = {"perturbed_genes": [2, 5, 7, 11]}
    model_section = {"genes_per_step": 16}
    # What the published model, built from torch's modules, gives with the same weights.
    golden = [0.405631, 0.403787, 0.383965, 0.407178]
    golden_mean = 0.388747

    def fill(self, model):
        super().fill(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)

    def test_published_sizes_can_be_built(self):
        sizes = {"input_dim": 2000, "num_perturbations": 2, "perturbed_genes": [0, 1999]}
        config = ScGPTConfig.from_preset("published", **sizes)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (512, 12, 8)
        assert (config.intermediate_size, config.hidden_dropout, config.attention_dropout) == (512, 0.2, 0.2)
        assert (config.genes_per_step, config.genes_per_chunk) == (1536, None)
        with torch.device("meta"):
            model = ScGPTForPerturbation(config)
        block = 4 * 512 * 512 + 4 * 512 + 2 * (512 * 512 + 512) + 4 * 512
        tokens = 2000 * 512 + 2 * 512 + (2 * 512 + 512 * 512 + 512 + 2 * 512) + 3 * 512 + 2 * 512
        head = 2 * (512 * 512 + 512) + 512 + 1
        assert model.num_parameters() == 12 * block + tokens + head


def make(**fields) -> ScGPTForPerturbation:
    torch.manual_seed(0)
    genetic = {"perturbed_genes": PERTURBED} if fields.get("perturbation_type", "genetic") == "genetic" else {}
    sizes = {"num_perturbations": 3} if "perturbation_dim" not in fields else {}
    settings = {"input_dim": GENES, "nonnegative_output": False, **sizes, **genetic, **fields}
    model = ScGPTForPerturbation(ScGPTConfig.from_preset("tiny", **settings))
    with torch.no_grad():
        # Larger weights than those of a new model, in which predictions hardly depend on anything.
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(2.0)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def cells(sentences=3, size=4, seed=5):
    return torch.rand(sentences, size, GENES, generator=torch.Generator().manual_seed(seed)) * 3


IDS = torch.tensor([[0, -1], [1, 2], [-1, -1]])


@torch.no_grad()
def predict(model, control_cells, ids=IDS, **inputs):
    return model(control_cells=control_cells, perturbation_ids=ids, **inputs).predictions


# What a prediction depends on


def test_permuting_the_genes_permutes_the_predictions():
    model, x = make(), cells()
    order = torch.randperm(GENES, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    other = make(perturbed_genes=place[PERTURBED].tolist())
    weights = model.state_dict()
    other.load_state_dict({**weights, "gene_embedding.weight": weights["gene_embedding.weight"][order]})
    expected = predict(model, x)
    torch.testing.assert_close(predict(other, x[..., order]), expected[..., order], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[..., order], expected, atol=1e-2)


def test_every_gene_sees_every_other_and_no_other_cell():
    model, x = make(), cells(1, 2)
    changed = x.clone()
    changed[0, 0, 4] += 2.0
    before, after = (predict(model, v, IDS[:1]) for v in (x, changed))
    assert (before[0, 0] != after[0, 0]).all()
    assert torch.equal(before[0, 1], after[0, 1])


def test_values_above_512_are_told_apart_no_more():
    model, x = make(), cells(1, 2)
    (
        x[0, 0, 4],
        x[0, 1],
    ) = 512.0, x[0, 0]
    x[0, 1, 4] = 9000.0
    below = x.clone()
    below[0, 0, 4] = 500.0
    predicted = predict(model, x, IDS[:1])
    assert torch.equal(predicted[0, 0], predicted[0, 1])
    assert not torch.equal(predicted[0, 0], predict(model, below, IDS[:1])[0, 0])


def test_the_flag_of_a_perturbed_gene_is_what_a_genetic_perturbation_is():
    model, x = make(), cells(1, 1).expand(3, 2, -1)
    predicted = predict(model, x)
    assert not torch.allclose(predicted[0], predicted[1], atol=1e-3)
    assert not torch.allclose(predicted[0], predicted[2], atol=1e-3)
    with torch.no_grad():
        model.flag_embedding.weight[1] = model.flag_embedding.weight[0]
    alike = predict(model, x)
    assert torch.equal(alike[0], alike[1]) and torch.equal(alike[0], alike[2])
    # Order does not matter, nor where the padding stands.
    model = make()
    assert torch.equal(predict(model, x, torch.tensor([[-1, 0], [2, 1], [-1, -1]])), predicted)


@pytest.mark.parametrize("kind", ["genetic", "chemical"])
def test_ids_are_multi_hot_features(kind):
    model, x = make(perturbation_type=kind), cells()
    features = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    expected = predict(model, x)
    for given in (features, features[:, None].expand(-1, 4, -1)):
        found = predict(model, x, None, perturbation_features=given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_features_may_differ_between_the_cells_of_a_sentence():
    model, x = make(), cells(1, 3)
    features = torch.tensor([[[1.0, 0, 0], [0, 1, 1], [0, 0, 0]]])
    found = predict(model, x, None, perturbation_features=features)
    expected = torch.cat([predict(model, x[:, i : i + 1], IDS[i : i + 1]) for i in range(3)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_drug_adds_dose_times_its_normalised_row():
    model = make(perturbation_type="chemical")
    encoder, weight = model.drug_encoder, model.drug_encoder.weight
    doses = torch.tensor([[2.0, 9.0], [0.5, 3.0], [1.0, 1.0]])
    with torch.no_grad():
        rows = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        rows = rows * encoder.norm.weight + encoder.norm.bias
        expected = torch.stack([2 * rows[0], 0.5 * rows[1] + 3 * rows[2], torch.zeros_like(rows[0])])
        found = encoder(IDS, doses).squeeze(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    x = cells(1, 1).expand(3, 2, -1)
    dosed = predict(model, x, torch.tensor([[0]] * 3), perturbation_doses=torch.tensor([[0.0], [1.0], [2.0]]))
    control = predict(model, x[:1], torch.tensor([[-1]]))
    torch.testing.assert_close(dosed[:1], control, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(dosed[1], dosed[2], atol=1e-3)


def test_chemical_features_are_a_linear_map():
    model = make(perturbation_type="chemical", perturbation_dim=6)
    features = torch.randn(3, 6)
    with torch.no_grad():
        found = model.drug_encoder(perturbation_features=features).squeeze(1)
    torch.testing.assert_close(found, features @ model.drug_encoder.weight.detach(), atol=1e-6, rtol=1e-6)
    assert predict(model, cells(), None, perturbation_features=features).shape == (3, 4, GENES)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (
            {"perturbation_ids": IDS, "perturbation_doses": torch.tensor([[0.5, 9], [1, 2.0], [3, 3]])},
            r"expected perturbation_doses of 1, found \[0.5, 2.0\]; use doses with perturbation_type='chemical'",
        ),
        (
            {"perturbation_features": torch.tensor([[0.5, 0, 0]] * 3)},
            r"expected perturbation_features of 0 and 1, found others",
        ),
    ],
)
def test_a_gene_is_flagged_or_not(inputs, message):
    with pytest.raises(ValueError, match=message):
        make()(control_cells=cells(), **inputs)
    # Without doses, 1 is meant. Doses of padding do not count.
    doses = torch.tensor([[1.0, 7.0], [1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(predict(make(), cells(), perturbation_doses=doses), predict(make(), cells()))


def test_attention_is_the_same_eager_and_by_sdpa_and_can_be_looked_at():
    model, x = make(tokens_per_pass=GENES), cells()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    assert model.config._attn_implementation == "sdpa"
    expected = predict(model, x, cell_mask=mask)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        options = {"output_attentions": True, "output_hidden_states": True}
        outputs = model(control_cells=x, perturbation_ids=IDS, cell_mask=mask, **options)
    torch.testing.assert_close(outputs.predictions, expected, atol=1e-5, rtol=1e-5)
    # There are attentions of the ten real cells, which go through in one pass.
    assert [tuple(a.shape) for a in outputs.attentions] == [(10, 4, GENES, GENES)] * 2
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(10, GENES, 32)] * 3
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(10, 4, GENES))


# Chunks


@pytest.mark.parametrize("kind", ["genetic", "chemical"])
def test_how_many_tokens_are_computed_at_a_time_changes_nothing(kind):
    model, x = make(perturbation_type=kind), cells()
    expected = predict(model, x)
    for tokens in (1, 2 * GENES + 3, 5 * GENES, 10**9):
        model.config.tokens_per_pass = tokens
        torch.testing.assert_close(predict(model, x), expected, atol=1e-5, rtol=1e-5)
    calls = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    model.config.tokens_per_pass = 5 * GENES + 3
    predict(model, x)
    assert calls == [5, 5, 2]


@pytest.mark.parametrize("chunk", [GENES, GENES + 1, 10**6])
def test_a_chunk_of_all_genes_is_no_chunk(chunk):
    assert torch.equal(predict(make(genes_per_chunk=chunk), cells()), predict(make(), cells()))


def of_some_genes(model, genes, perturbed):
    """The model with only these genes."""
    small = make(
        input_dim=len(genes), perturbed_genes=[genes.index(PERTURBED[p]) if p in perturbed else 0 for p in range(3)]
    )
    weights = model.state_dict()
    small.load_state_dict({**weights, "gene_embedding.weight": weights["gene_embedding.weight"][genes]})
    return small


def test_genes_in_groups_see_their_group_and_the_perturbed_genes_alone():
    model, x = make(genes_per_chunk=8), cells()
    found = predict(model, x)
    for sentence, perturbed in enumerate(([0], [1, 2], [])):
        flagged = [PERTURBED[p] for p in perturbed]
        others = [gene for gene in range(GENES) if gene not in flagged]
        step = 8 - len(flagged)
        for start in range(0, len(others), step):
            genes = flagged + others[start : start + step]
            alone = predict(of_some_genes(model, genes, perturbed), x[sentence, None][..., genes], IDS[sentence, None])
            group = genes[len(flagged) :]
            torch.testing.assert_close(found[sentence][:, group], alone[0, :, len(flagged) :], atol=1e-5, rtol=1e-5)
    # A draw in which the number of genes matters, and differs from no number.
    whole = predict(make(), x)
    assert not torch.allclose(found, whole, atol=1e-3)
    assert not torch.allclose(found, predict(make(genes_per_chunk=5), x), atol=1e-3)


@pytest.mark.parametrize("kind", ["genetic", "chemical"])
def test_in_groups_too_a_cell_does_not_depend_on_the_others(kind):
    model, x = make(genes_per_chunk=6, perturbation_type=kind), cells()
    together = predict(model, x)
    model.config.tokens_per_pass = 13
    for i in range(3):
        torch.testing.assert_close(predict(model, x[i, None], IDS[i, None])[0], together[i], atol=1e-5, rtol=1e-5)


def test_groups_smaller_than_the_perturbed_genes_hold_one_more():
    model = make(genes_per_chunk=1)
    assert torch.isfinite(predict(model, cells())).all()


def test_what_is_recorded_is_of_all_genes():
    with pytest.raises(ValueError, match=r"expected genes_per_chunk=None, found 6; set it to None"):
        predict(make(genes_per_chunk=6), cells(), output_hidden_states=True)


# Training


def training(model, seed=0, **inputs) -> ScGPTOutput:
    torch.manual_seed(seed)
    return model.train()(control_cells=cells(), perturbation_ids=IDS, **inputs)


def test_a_step_draws_genes_and_always_the_perturbed_ones():
    model = make(genes_per_step=6)
    drawn = [training(model, seed).gene_indices for seed in range(30)]
    for genes in drawn:
        assert genes.tolist() == sorted(set(genes.tolist())) and len(genes) == 6
        assert set(PERTURBED) <= set(genes.tolist())
    assert set(torch.cat(drawn).tolist()) == set(range(GENES))
    assert torch.equal(drawn[3], training(model, 3).gene_indices)
    assert training(make(genes_per_step=2)).gene_indices.tolist() != []
    whole = training(make(genes_per_step=10**6))
    assert whole.gene_indices.tolist() == list(range(GENES)) and whole.predictions.shape == (3, 4, GENES)


def test_a_step_sees_the_drawn_genes_alone():
    model = make(genes_per_step=6, hidden_dropout=0.0)
    outputs = training(model)
    genes = outputs.gene_indices.tolist()
    small = make(
        input_dim=6, genes_per_step=6, hidden_dropout=0.0, perturbed_genes=[genes.index(gene) for gene in PERTURBED]
    )
    weights = model.state_dict()
    small.load_state_dict({**weights, "gene_embedding.weight": weights["gene_embedding.weight"][genes]})
    alone = small.train()(control_cells=cells()[..., genes], perturbation_ids=IDS)
    torch.testing.assert_close(outputs.predictions, alone.predictions, atol=1e-5, rtol=1e-5)


def test_predictions_are_clamped_in_evaluation_alone():
    model = make(nonnegative_output=True)
    model.head[4].bias.data.fill_(-100.0)
    assert (predict(model, cells()) == 0).all()
    assert (training(model).predictions < 0).all()


def test_padded_cells_enter_neither_statistics_nor_loss():
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    labels = cells(seed=6)
    garbage = cells()
    garbage[1, 2:], labels[1, 2:] = 1e4, 1e4
    found = []
    for x in (cells(), garbage):
        model = make(hidden_dropout=0.0, genes_per_step=GENES).train()
        outputs = model(control_cells=x, perturbation_ids=IDS, cell_mask=mask)
        loss = objective_for(model.config)(outputs, {"labels": labels, "cell_mask": mask})["loss"]
        found.append((outputs.predictions, model.norm.running_mean, model.norm.running_var, loss))
        assert (outputs.predictions[1, 2:] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_loss_is_the_mean_squared_error_of_the_drawn_genes():
    model, labels = make(genes_per_step=6), cells(seed=6)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    outputs = training(model, cell_mask=mask)
    terms = objective_for(model.config)(outputs, {"labels": labels, "cell_mask": mask})
    assert set(terms) == {"loss"}
    predicted, genes = outputs.predictions.detach().numpy(), outputs.gene_indices.numpy()
    errors = (predicted - labels.numpy()[..., genes]) ** 2
    expected = np.mean([errors[0].mean(), errors[1, :2].mean(), errors[2].mean()])
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    evaluated = model.eval()(control_cells=cells(), perturbation_ids=IDS)
    assert evaluated.gene_indices is None
    found = objective_for(model.config)(evaluated, {"labels": labels})["loss"].item()
    assert found == pytest.approx(((evaluated.predictions - labels) ** 2).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="the loss needs 'labels'"):
        objective_for(model.config)(evaluated, {})


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = make(genes_per_step=6, hidden_dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        training(model).predictions.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_new_model_tells_values_and_perturbations_apart():
    """With the initialisation, a new model depends on how much is expressed and on what is perturbed, so it can learn."""
    torch.manual_seed(0)
    config = ScGPTConfig.from_preset("tiny", input_dim=GENES, num_perturbations=3, perturbed_genes=PERTURBED)
    model = ScGPTForPerturbation(config)
    assert model.gene_embedding.weight.abs().max() <= 0.1 and model.gene_embedding.weight.std() > 0.05
    assert model.flag_embedding.weight.std() > 0.7
    model.eval()
    with torch.no_grad():
        encoded = model.value_encoder(torch.tensor([[1.0, 2.0, 4.0]]))[0]
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(encoded[0], encoded[1], dim=0) < 0.999 and cosine(encoded[0], encoded[2], dim=0) < 0.98


# The config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"perturbation_type": "drug"}, r"perturbation_type='drug' is not an option"),
        ({"perturbed_genes": None}, r"needs perturbed_genes, the gene of each of 3 perturbations, found None"),
        ({"perturbed_genes": [1, 2]}, r"gene of each of 3 perturbations, found 2"),
        ({"perturbed_genes": [1, -1, 20]}, r"positions among the 20 genes, found \[-1, 20\]"),
        ({"perturbation_type": "chemical"}, r"perturbed_genes is for perturbation_type='genetic', found 'chemical'"),
        ({"num_perturbations": None, "perturbation_dim": 4}, r"takes perturbations by id, found perturbation_dim=4"),
        ({"gene_dim": 7}, r"has no gene decoder, found gene_dim=7"),
        ({"output_dim": 7}, r"expected output_dim == input_dim, found 7 and 20"),
        ({"hidden_size": 30}, r"hidden_size=30 is not divisible by num_attention_heads=4"),
        ({"genes_per_step": 0}, r"genes_per_step must be at least 1, found 0"),
        ({"genes_per_chunk": 0}, r"genes_per_chunk must be at least 1, found 0"),
        ({"attention_dropout": 1.0}, r"attention_dropout must lie in \[0, 1\), found 1.0"),
        ({"gene_per_step": 3}, r"has no field 'gene_per_step'; did you mean 'genes_per_step'"),
    ],
)
def test_a_wrong_config_is_one_clear_error(fields, message):
    settings = {"input_dim": GENES, "num_perturbations": 3, "perturbed_genes": PERTURBED, **fields}
    with pytest.raises(ValueError, match=message):
        ScGPTConfig.from_preset("tiny", **settings)


def processor(perturbations=("B", "D"), features=None, **settings) -> StateProcessor:
    vocabulary = Vocabulary(["A", "B", "C", "D"], list(perturbations), ["x"], [])
    return StateProcessor(vocabulary, perturbation_features=features, **settings)


def test_the_tokens_of_perturbed_genes_follow_from_the_names():
    assert ScGPTConfig.fields_from_names(processor(("D", "B")), {}) == {"perturbed_genes": [3, 1]}
    assert ScGPTConfig.fields_from_names(processor(("E",)), {"perturbation_type": "chemical"}) == {}


def test_perturbations_that_are_no_genes_of_the_model_are_listed():
    message = (
        "expected every perturbation among the model's 4 genes, found 2 of 3 that are not: 'E', 'b'; add them to "
        "data.genes (a list; or leave it out for all genes of the data), or set model.perturbation_type to chemical"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ScGPTConfig.fields_from_names(processor(("B", "E", "b")), {"perturbation_type": "genetic"})
    many = [f"p{i}" for i in range(23)]
    with pytest.raises(ValueError, match=r"'p19' and 3 more; add"):
        ScGPTConfig.fields_from_names(processor(many), {})


def test_data_that_it_cannot_read_are_errors():
    features = PerturbationFeatures(["B", "D"], np.eye(2))
    with pytest.raises(ValueError, match="takes no perturbation features: leave data.perturbation_features out"):
        ScGPTConfig.fields_from_names(processor(features=features), {})
    assert ScGPTConfig.fields_from_names(processor(features=features), {"perturbation_type": "chemical"}) == {}
    embedding = processor(values="embedding", input="obsm/X_pca", feature_dim=7)
    with pytest.raises(ValueError, match=r"a token each, found input='obsm/X_pca', an embedding: set data.input"):
        ScGPTConfig.fields_from_names(embedding, {"perturbation_type": "chemical"})


# Runs


def write_run(screen, folder, model=None, data=None, **training) -> list[str]:
    content = {
        "data": {"datasets": {"screen": str(screen)}, "test_contexts": ["type_3"], **(data or {})},
        "model": {"model_type": "state-scgpt", "genes_per_step": 16, "set_size": 8, **(model or {"preset": "tiny"})},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            "use_cpu": True,
            "save_strategy": "no",
            **training,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return [str(folder / "run.yaml")]


def test_the_familys_training_arguments_are_the_published_ones(screen, tmp_path):
    run = train.read_run(write_run(screen, tmp_path))
    assert {name: run.training[name] for name in ("learning_rate", "lr_decay_epochs", "lr_decay_factor")} == {
        "learning_rate": 5e-5,
        "lr_decay_epochs": 25,
        "lr_decay_factor": 0.9,
    }


@pytest.mark.slow
def test_it_learns_what_a_context_that_was_never_perturbed_does(screen, tmp_path):
    model = {"preset": "tiny", "hidden_dropout": 0.0}
    options = {"learning_rate": 3e-3, "max_steps": 400, "logging_steps": 400, "lr_decay_epochs": None}
    metrics = train.main(write_run(screen, tmp_path, model, **options, lr_scheduler_type="linear"))
    # The squared error of predicted cells, beside that of control cells, of which one is drawn for each.
    processor = StateProcessor.from_pretrained(tmp_path / "run")
    adata = ad.read_h5ad(screen)
    x = processor.features(adata)
    held_out, control = adata.obs["cell_type"] == "type_3", adata.obs["perturbation"] == "control"
    no_change = ((x[held_out & ~control][:, None] - x[held_out & control][None]) ** 2).mean()
    assert metrics["test_loss"] < 0.65 * no_change
    assert metrics["test_pearson"] > 0.3


def test_a_resumed_run_draws_the_genes_of_the_unbroken_one(screen, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir(), broken.mkdir()
    train.main(write_run(screen, unbroken))
    saving = {"save_strategy": "steps", "save_steps": 2}
    train.main(write_run(screen, broken, **saving))
    (broken / "run" / "model.safetensors").unlink()
    torch.manual_seed(123)
    train.main([*write_run(screen, broken), "--resume_from_checkpoint", str(broken / "run" / "checkpoint-2")])
    first, second = (load_file(folder / "run" / "model.safetensors") for folder in (unbroken, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_chemical_run_with_vectors_predicts_a_drug_that_was_never_measured(screen, tmp_path):
    table = tmp_path / "drugs.npz"
    np.savez(table, names=np.array(["pert_0", "pert_1", "pert_2", "new"]), features=np.random.randn(4, 5))
    model = {"preset": "tiny", "perturbation_type": "chemical"}
    train.main(write_run(screen, tmp_path, model, {"perturbation_features": str(table)}))
    out = tmp_path / "predicted.h5ad"
    words = ["predict", "--model", tmp_path / "run", "--adata", screen, "--output", out, "--context", "type_3"]
    assert pertstate.cli.main([str(word) for word in [*words, "--perturbation", "new", "pert_0", "--quiet"]]) == 0
    predicted = ad.read_h5ad(out)
    mean = {name: predicted[predicted.obs["perturbation"] == name].X.mean(axis=0) for name in ("new", "pert_0")}
    assert np.isfinite(mean["new"]).all() and not np.allclose(mean["new"], mean["pert_0"])


@pytest.fixture(scope="module")
def published(tmp_path_factory, screen):
    """A published folder that has most of the screen's genes."""
    torch.manual_seed(0)
    genes = [str(gene) for gene in ad.read_h5ad(screen).var_names[:-2]]
    vocabulary = {"<pad>": 0} | {gene: i + 1 for i, gene in enumerate(reversed(genes))}
    return write_published(tmp_path_factory.mktemp("published") / "human", PublishedScGPT(len(vocabulary)), vocabulary)


def test_a_run_starts_from_a_published_folder(screen, tmp_path, published, caplog):
    with caplog.at_level(logging.INFO, logger="pertstate.train"):
        train.main(write_run(screen, tmp_path, {"pretrained": str(published)}, learning_rate=1e-12, max_steps=1))
    assert "38 of 40 genes are in vocab.json" in caplog.text
    assert "2 genes start afresh: ['gene_38', 'gene_39']" in caplog.text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]) == (16, 24, 2)
    assert "pretrained" not in config
    weights = load_file(tmp_path / "run" / "model.safetensors")
    theirs = torch.load(published / "best_model.pt", weights_only=True)
    expected = theirs["transformer_encoder.layers.1.self_attn.in_proj_weight"]
    torch.testing.assert_close(weights["layers.1.attention.qkv_proj.weight"], expected, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(weights["gene_embedding.weight"][0], theirs["encoder.embedding.weight"][38])
    assert "Trained further from the weights of `human`." in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "model, message",
    [
        ({"hidden_size": 32}, r"expected {'hidden_size': 16}, found {'hidden_size': 32}; leave these fields \(or the"),
        ({"preset": "tiny"}, r"expected {'hidden_size': 16, .*found {'hidden_size': 32, .*'intermediate_size': 64}"),
    ],
)
def test_a_run_that_contradicts_the_published_folder_is_an_error(screen, tmp_path, published, model, message):
    words = write_run(screen, tmp_path, {"pretrained": str(published), **model})
    with pytest.raises(ValueError, match=message):
        train.main(words)


def test_another_family_does_not_start_from_a_published_folder(screen, tmp_path, published):
    words = write_run(screen, tmp_path, {"pretrained": str(published), "model_type": "state"})
    with pytest.raises(FileNotFoundError, match="human': expected a checkpoint, found a folder without config.json"):
        train.main(words)
