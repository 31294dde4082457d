"""A checkpoint meets other names: which weights are kept, where new ones start, and what it predicts then."""

import json
from typing import ClassVar

import pytest
import torch
from family_tests import wave
from torch import nn

from pertstate import StateForPerturbation, StateProcessor
from pertstate.configuration_state import StateConfig
from pertstate.families import FAMILIES
from pertstate.processing import PerturbationFeatures, Vocabulary


OLD = Vocabulary(
    genes=["STAT1", "MAP2K6", "g2", "KLF1", "IRF1", "g5", "g6", "g7", "g8"],
    perturbations=["KLF1", "MAP2K6", "STAT1"],
    contexts=["k562", "rpe1"],
    batches=["b0", "b1"],
)
FURTHER = Vocabulary(perturbations=["STAT1", "IRF1"], contexts=["jurkat", "k562"], batches=["b2"])
SIZES = {"input_dim": 9, "num_perturbations": 3, "num_contexts": 2, "num_batches": 2}
EMBEDDED = {"input_dim": 6, "gene_dim": 9, "decoder_hidden_sizes": [8, 8]}
# Every family that learns by steps, with those of its options that make a row for each name.
CASES = {
    "state": ("state", {}),
    "state with batches": ("state", {"batch_encoder": True, "batch_token": True, "confidence_token": True}),
    "state, gpt2, deep": ("state", {"backbone": "gpt2", "num_encoder_layers": 2, "num_decoder_layers": 3}),
    "state on embeddings": ("state", EMBEDDED),
    "state-embed-sum": ("state-embed-sum", {}),
    "state-neural-ot": ("state-neural-ot", {}),
    "state-pseudobulk": ("state-pseudobulk", {"batch_encoder": True}),
    "state-decoder-only": ("state-decoder-only", EMBEDDED),
    "state-cpa": ("state-cpa", {"doser": "sigmoid"}),
    "state-cpa on counts": ("state-cpa", {"likelihood": "zinb"}),
    "state-scvi": ("state-scvi", {}),
    "state-scgpt, drugs": ("state-scgpt", {"perturbation_type": "chemical"}),
    "state-scgpt": ("state-scgpt", {"perturbed_genes": [3, 1, 0]}),
}
# In these families, the prediction of a gene depends on which other genes there are.
TOGETHER = ("state-cpa on counts", "state-scvi", "state-scgpt", "state-scgpt, drugs")


def model_of(case: str, **overrides):
    """A model whose weights are the same on every machine, in evaluation mode."""
    family, fields = CASES[case]
    model = (
        FAMILIES[family].model(FAMILIES[family].config.from_preset("tiny", **{**SIZES, **fields, **overrides})).eval()
    )
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * wave(*parameter.shape, start=1000 * i))
    return model


def batch_of(model) -> dict[str, torch.Tensor]:
    return {
        "control_cells": 2 * wave(3, 4, model.config.input_dim).abs(),
        "perturbation_ids": torch.tensor([[0, -1], [1, 2], [-1, -1]]),
        "context_ids": torch.tensor([0, 1, 1]),
        "batch_ids": torch.tensor([[0, 1, 0, 1], [1] * 4, [0] * 4]),
        "labels": 2 * wave(3, 4, model.config.output_dim, start=77).abs(),
    }


def predict(model, batch) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**batch)
    return outputs.predictions if outputs.gene_predictions is None else outputs.gene_predictions


def test_every_family_that_learns_is_among_the_cases():
    learning = {name for name, family in FAMILIES.items() if not family.model.fitted}
    assert {family for family, _ in CASES.values()} == learning


@pytest.mark.parametrize("case", CASES)
def test_each_axis_that_follows_names_is_declared(case):
    """A model of another size differs from this one only in the axes that the family declares."""
    model = model_of(case)
    on_embeddings = model.config.gene_dim is not None
    sizes = {"perturbations": "num_perturbations", "contexts": "num_contexts", "batches": "num_batches"}
    sizes |= {"genes": "gene_dim" if on_embeddings else "input_dim"}
    of_features = "dimensions" if on_embeddings else "genes"
    named = {"features": of_features, "perturbations and control": "perturbations"}
    declared, found = {}, {}
    for name, axes in model.vocabulary_axes().items():
        for axis, kind in axes.items():
            kind = named.get(kind, kind)
            if kind != "dimensions":
                declared.setdefault(kind, set()).add((name, axis))
    for kind, size in sizes.items():
        larger = {size: getattr(model.config, size) + 1}
        if case == "state-scgpt" and kind == "perturbations":
            larger["perturbed_genes"] = [3, 1, 0, 4]
        other = model_of(case, **larger).state_dict()
        for name, tensor in model.state_dict().items():
            differing = [axis for axis in range(tensor.dim()) if tensor.shape[axis] != other[name].shape[axis]]
            for axis in differing:
                found.setdefault(kind, set()).add((name, axis))
    assert declared == found


@pytest.mark.parametrize("case", CASES)
def test_added_names_leave_old_predictions_as_they_were_to_the_bit(case):
    model = model_of(case)
    batch, before = batch_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = predict(model, batch)
    change = model.resize_vocabulary(OLD, OLD.merged(FURTHER))
    assert torch.equal(predict(model, batch), expected)
    assert model.config.num_perturbations == 4 and model.config.num_contexts == 3 and model.config.num_batches == 3
    follows = {name: axes[0] for name, axes in model.vocabulary_axes().items() if 0 in axes}
    declared = {name: kind for name, kind in follows.items() if kind not in ("genes", "features")}
    assert set(change.grown) == set(change.tensors) == set(declared)
    for name, tensor in model.state_dict().items():
        if name not in declared:
            assert torch.equal(tensor, before[name])
            continue
        assert change.tensors[name] == (before[name].shape, tensor.shape)
        # New rows start from the mean of the known ones, and the control of a classifier stays the last.
        old, new = before[name], tensor
        if declared[name] == "perturbations and control":
            assert torch.equal(new[-1], old[-1])
            old, new = old[:-1], new[:-1]
        assert torch.equal(new[: len(old)], old) and len(new) == len(old) + 1
        torch.testing.assert_close(new[-1], before[name].mean(dim=0), atol=0, rtol=0)


def test_a_new_perturbation_is_predicted_as_the_mean_one():
    model = model_of("state")
    rows = model.perturbation_encoder.embedding.weight.detach().clone()
    model.resize_vocabulary(OLD, OLD.merged(FURTHER))
    batch = batch_of(model)
    new = predict(model, {**batch, "perturbation_ids": torch.full((3, 1), 3)})
    features = torch.full((3, 3), 1 / 3)
    mean = predict(model_of("state"), {**batch, "perturbation_ids": None, "perturbation_features": features})
    torch.testing.assert_close(new, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.perturbation_encoder.embedding.weight[3], rows.mean(dim=0), atol=0, rtol=0)


def test_rows_follow_their_names_wherever_they_stand():
    model, batch = model_of("state with batches"), batch_of(model_of("state with batches"))
    expected, expected_logits = predict(model, batch), model(**batch).batch_logits
    new = Vocabulary(OLD.genes, ["STAT1", "NEW", "KLF1", "MAP2K6"], ["rpe1"], ["b1", "b0"])
    change = model.resize_vocabulary(OLD, new)
    moved = {
        **batch,
        "perturbation_ids": torch.tensor([[2, -1], [3, 0], [-1, -1]]),
        "batch_ids": 1 - batch["batch_ids"],
    }
    assert torch.equal(predict(model, moved), expected)
    assert torch.equal(model(**moved).batch_logits, expected_logits.flip(-1))
    # The batches only changed places.
    assert change.grown == ["perturbation_encoder.embedding.weight"]
    assert str(change) == (
        "genes: 9 kept, 0 added, 0 dropped\n"
        "perturbations: 3 kept, 1 added (NEW), 0 dropped\n"
        "contexts: 1 kept, 0 added, 1 dropped (k562)\n"
        "batches: 2 kept, 0 added, 0 dropped"
    )


OTHER_GENES = ["g7", "x0", "g2", "KLF1", "x1", "STAT1", "g8", "IRF1", "MAP2K6", "g6", "x2"]  # without g5
KEPT_NEW = [i for i, name in enumerate(OTHER_GENES) if name in OLD.genes]
KEPT_OLD = [OLD.genes.index(OTHER_GENES[i]) for i in KEPT_NEW]


def batches_of_genes(model) -> tuple[dict, dict]:
    """The same cells in the old genes and in the new ones. The genes that are dropped or added are not expressed."""
    before = batch_of(model)
    after = dict(before)
    for key in ("control_cells", "labels"):
        before[key][..., OLD.genes.index("g5")] = 0
        after[key] = torch.zeros(3, 4, len(OTHER_GENES))
        after[key][..., KEPT_NEW] = before[key][..., KEPT_OLD]
    return before, after


@pytest.mark.parametrize("case", [case for case in CASES if case not in TOGETHER])
def test_kept_genes_are_predicted_as_before_where_the_others_are_silent(case):
    model = model_of(case)
    on_genes = model.config.gene_dim is None
    before, after = batches_of_genes(model) if on_genes else (batch_of(model), batch_of(model))
    expected = predict(model, before)[..., KEPT_OLD]
    change = model.resize_vocabulary(OLD, Vocabulary(OTHER_GENES, OLD.perturbations, OLD.contexts, OLD.batches))
    if on_genes:
        assert model.config.input_dim == model.config.output_dim == 11
    else:
        assert model.config.gene_dim == 11 and model.config.input_dim == 6
    torch.testing.assert_close(predict(model, after)[..., KEPT_NEW], expected, atol=2e-6, rtol=1e-5)
    names = change.names["genes"]
    assert (names.kept, names.added, names.dropped) == (
        [name for name in OLD.genes if name != "g5"],
        ["x0", "x1", "x2"],
        ["g5"],
    )
    # A gene that is expressed changes the prediction.
    if on_genes:
        after["control_cells"][..., 1] = 5
        assert (predict(model, after)[..., KEPT_NEW] - expected).abs().max() > 1e-3


def test_a_new_gene_is_read_and_predicted_as_the_mean_one():
    model, old = model_of("state"), model_of("state")
    model.resize_vocabulary(OLD, Vocabulary(OTHER_GENES, OLD.perturbations, OLD.contexts, OLD.batches))
    columns, known = (m.cell_encoder.layers[0].weight for m in (model, old))
    torch.testing.assert_close(columns[:, 1], known.mean(dim=1), atol=0, rtol=0)
    rows, known = (m.output_head.layers[0].weight for m in (model, old))
    torch.testing.assert_close(rows[10], known.mean(dim=0), atol=0, rtol=0)


@pytest.mark.parametrize("case", ["state-cpa on counts", "state-scvi"])
def test_kept_genes_of_a_model_on_counts_keep_their_ratios(case):
    model = model_of(case)
    before, after = batches_of_genes(model)

    def shares(batch, kept):
        with torch.no_grad():
            mean = model(**batch).mean[..., kept]
        return mean / mean.sum(dim=-1, keepdim=True)

    expected = shares(before, KEPT_OLD)
    model.resize_vocabulary(OLD, Vocabulary(OTHER_GENES, OLD.perturbations, OLD.contexts, OLD.batches))
    torch.testing.assert_close(shares(after, KEPT_NEW), expected, atol=1e-6, rtol=1e-4)


def test_perturbed_genes_are_flagged_wherever_they_stand():
    model, old = model_of("state-scgpt"), model_of("state-scgpt")
    new = Vocabulary(OTHER_GENES, [*OLD.perturbations, "IRF1"], OLD.contexts, OLD.batches)
    model.resize_vocabulary(OLD, new)
    assert model.config.perturbed_genes == [3, 8, 5, 7]
    assert torch.equal(model.gene_embedding.weight[KEPT_NEW], old.gene_embedding.weight[KEPT_OLD])
    with pytest.raises(ValueError, match="expected every perturbation among the model's 11 genes, found 1 of 5"):
        model.resize_vocabulary(new, new.merged(Vocabulary(perturbations=["g5"])))
    assert model.config.num_perturbations == 4


def test_a_resized_model_is_saved_and_loaded_like_any_other(tmp_path):
    model = model_of("state with batches")
    new = OLD.merged(Vocabulary([*OLD.genes, "x0"], ["NEW"], [], ["b2"]))
    model.resize_vocabulary(OLD, new)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            assert len(module.weight) == module.num_embeddings
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    sizes = ("input_dim", "output_dim", "num_perturbations", "num_contexts", "num_batches")
    assert [written[name] for name in sizes] == [10, 10, 4, 2, 3]
    again = StateForPerturbation.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(again, batch_of(model)), predict(model, batch_of(model)))


def test_frozen_weights_stay_frozen():
    model = model_of("state")
    model.perturbation_encoder.requires_grad_(False)
    model.resize_vocabulary(OLD, OLD.merged(FURTHER))
    assert not model.perturbation_encoder.embedding.weight.requires_grad
    assert model.output_head.layers[0].weight.requires_grad


def test_a_model_on_features_needs_nothing_for_new_perturbations():
    model = model_of("state", num_perturbations=None, perturbation_dim=5)
    change = model.resize_vocabulary(OLD, OLD.merged(FURTHER))
    assert change.tensors == {} and change.names["perturbations"].added == ["IRF1"]
    assert model.config.num_perturbations is None and model.config.perturbation_dim == 5


def test_what_cannot_be_resized_says_so_and_changes_nothing():
    model = model_of("state", input_dim=16, output_adapter=True)
    old = Vocabulary([f"g{i}" for i in range(16)], OLD.perturbations, OLD.contexts, OLD.batches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = Vocabulary([*old.genes, *(f"x{i}" for i in range(8))], old.perturbations, old.contexts, old.batches)
    with pytest.raises(
        ValueError, match=r"output_adapter.0.weight \(2, 24\) instead of \(3, 24\).*; train a model anew"
    ):
        model.resize_vocabulary(old, more)
    with pytest.raises(ValueError, match="this model was trained with .3 perturbations., found one of 2 perturbations"):
        model.resize_vocabulary(Vocabulary(old.genes, ["a", "b"], OLD.contexts, OLD.batches), old)
    with pytest.raises(ValueError, match=r"expected contexts in the new vocabulary, found none; keep some of \['k562'"):
        model.resize_vocabulary(old, Vocabulary(old.genes, OLD.perturbations, [], OLD.batches))
    assert model.config.input_dim == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    other = model_of("state", output_dim=4, residual="hidden")
    with pytest.raises(ValueError, match="reads 9 genes and predicts 4 features: its genes cannot be changed"):
        other.resize_vocabulary(OLD, OLD.merged(Vocabulary(OLD.genes[:5])))


def test_families_that_are_fitted_say_that_they_are():
    for name, family in FAMILIES.items():
        if family.model.fitted:
            model = family.model(family.config(**SIZES))
            with pytest.raises(ValueError, match=f"{name} is fitted in one pass: .*; fit it anew on all the data"):
                model.resize_vocabulary(OLD, OLD)


def test_an_adapter_comes_after_resizing():
    from peft import LoraConfig, get_peft_model

    model = model_of("state")
    get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["perturbation_encoder.embedding"]))
    with pytest.raises(ValueError, match="resize the vocabulary before an adapter is put on the model"):
        model.resize_vocabulary(OLD, OLD.merged(FURTHER))


# Vocabularies and processors


class TestMerged:
    settings: ClassVar[dict] = {"control": "NT", "context_key": "line", "batch_key": "gem", "target_sum": 5000.0}

    def test_ids_keep_their_meaning(self):
        merged = OLD.merged(FURTHER)
        assert merged == Vocabulary(
            OLD.genes, ["KLF1", "MAP2K6", "STAT1", "IRF1"], ["k562", "rpe1", "jurkat"], ["b0", "b1", "b2"]
        )
        assert OLD.merged(Vocabulary(["g2", "x"])) == Vocabulary(
            ["g2", "x"], OLD.perturbations, OLD.contexts, OLD.batches
        )
        assert len(OLD.perturbations) == 3

    def test_a_processor_with_more_names_encodes_the_old_ones_as_before(self):
        old = StateProcessor(OLD, values="counts", set_size=7, **self.settings)
        new = old.with_vocabulary(OLD.merged(FURTHER))
        assert new.encode(["KLF1+STAT1", "IRF1", "NT"])["perturbation_ids"].tolist() == [[0, 2], [3, -1], [-1, -1]]
        assert new.encode_contexts(["rpe1", "jurkat"]).tolist() == [1, 2]
        assert old.encode_contexts(["rpe1", "jurkat"]).tolist() == [1, -1]
        written = {**new.to_dict(), "feature_dim": 9}
        assert written == old.to_dict() and new.vocabulary.genes == OLD.genes
        assert old.with_vocabulary(Vocabulary(["g5", "g2"])).feature_dim == 2

    def test_an_embedding_and_features_stay(self):
        features = PerturbationFeatures(["KLF1"], [[1.0, 2.0]])
        old = StateProcessor(OLD, values="embedding", input="obsm/X", feature_dim=6, perturbation_features=features)
        new = old.with_vocabulary(OLD.merged(FURTHER), control="NT")
        assert new.feature_dim == 6 and new.perturbation_features is features and new.control == "NT"


# Where adapters go


def test_adapters_go_beside_the_layers_that_the_family_names():
    model = model_of("state")
    attention = [f"backbone.layers.{i}.attention.{name}" for i in (0, 1) for name in ("qkv_proj", "o_proj")]
    assert model.lora_targets() == attention
    feed_forward = {f"backbone.layers.{i}.feed_forward.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    assert set(model.lora_targets(feed_forward=True)) == set(attention) | feed_forward
    assert len(model_of("state, gpt2, deep").lora_targets(feed_forward=True)) == 8
    assert model_of("state-decoder-only").lora_targets() == [
        "gene_decoder.blocks.0.0",
        "gene_decoder.blocks.1.0",
        "gene_decoder.output",
    ]
    parts = {name.split(".")[0] for name in model_of("state-embed-sum").lora_targets()}
    assert parts == {"perturbation_encoder", "cell_encoder", "output_head"}
    with pytest.raises(
        ValueError, match="state-embed-sum has no backbone with feed-forward layers.*leave lora_mlp out"
    ):
        model_of("state-embed-sum").lora_targets(feed_forward=True)
    fitted = FAMILIES["state-linear"].model(FAMILIES["state-linear"].config(**SIZES))
    with pytest.raises(ValueError, match="state-linear has no layers that take low-rank adapters"):
        fitted.lora_targets()


def test_parts_are_named_as_the_model_names_them():
    model = StateForPerturbation(StateConfig.from_preset("tiny", **SIZES))
    assert model.submodules(["output_head", "cell_encoder.layers.0"]) == ["output_head", "cell_encoder.layers.0"]
    with pytest.raises(ValueError, match="this model has no part 'output_heat'; did you mean 'output_head'"):
        model.submodules(["output_heat"])
