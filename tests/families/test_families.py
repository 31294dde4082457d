"""The families that share the State model's layers, and State itself."""

import anndata as ad
import numpy as np
import pytest
import torch
from family_tests import EMBEDDING, FamilyTests, screen  # noqa: F401

import pertstate.cli
from pertstate import (
    DecoderOnlyConfig,
    DecoderOnlyForPerturbation,
    EmbedSumConfig,
    EmbedSumForPerturbation,
    PseudobulkConfig,
    train,
)
from pertstate.families import FAMILIES
from pertstate.training import objective_for


class TestState(FamilyTests):
    model_type = "state"
    golden = [1.831504, 2.795207, 2.459878, 0.0]
    golden_mean = 1.271325

    def test_published_sizes_can_be_built(self):
        for preset in ("small", "base", "large", "gpt2"):
            config = FAMILIES["state"].config.from_preset(preset, num_perturbations=25)
            with torch.device("meta"):
                assert FAMILIES["state"].model(config).num_parameters() > 1e6


class TestEmbedSum(FamilyTests):
    model_type = "state-embed-sum"
    golden = [0.0, 1.187999, 0.0, 0.0]
    golden_mean = 0.324896


class TestEmbedSumOnEmbeddings(FamilyTests):
    model_type = "state-embed-sum"
    fields = {"gene_dim": 9, "decoder_hidden_sizes": [8, 8]}
    data = EMBEDDING
    model_section = {"decoder_hidden_sizes": [16]}
    golden = [0.988818, 0.176934, 0.893565, 0.446915]
    golden_mean = 0.254288


class TestNeuralOT(FamilyTests):
    model_type = "state-neural-ot"
    golden = [0.094631, 1.422383, 1.360975, 0.0]
    golden_mean = 0.448061


class TestPseudobulk(FamilyTests):
    model_type = "state-pseudobulk"
    golden = [0.0, 1.690421, 1.137789, 0.0]
    golden_mean = 0.487336


class TestDecoderOnly(FamilyTests):
    model_type = "state-decoder-only"
    fields = {"gene_dim": 9, "decoder_hidden_sizes": [8, 8]}
    data = EMBEDDING
    model_section = {"decoder_hidden_sizes": [16]}
    golden = [0.545779, 0.441145, 0.0, 0.393219]
    golden_mean = 0.370833


def test_decoder_only_needs_something_to_decode():
    with pytest.raises(ValueError, match="needs gene_dim, found None: this family decodes genes from embeddings"):
        DecoderOnlyForPerturbation(DecoderOnlyConfig(num_perturbations=2))
    case = TestDecoderOnly()
    batch = {key: value for key, value in case.batch().items() if key != "labels"}
    with pytest.raises(ValueError, match="expected labels, the embeddings of real perturbed cells, found None"):
        case.model()(**batch)


def test_decoder_only_decodes_what_was_observed():
    case = TestDecoderOnly()
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        outputs = model(**batch)
        assert torch.equal(outputs.predictions, batch["labels"])
        assert torch.equal(outputs.gene_predictions, model.gene_decoder(batch["labels"]))
        # The model does not look at any input but the labels.
        other = model(
            **{**batch, "control_cells": batch["control_cells"] + 1, "perturbation_ids": torch.full((3, 1), -1)}
        )
    assert torch.equal(other.gene_predictions, outputs.gene_predictions)


def test_a_ceiling_predicts_only_what_was_observed(screen, tmp_path, capsys):  # noqa: F811
    case = TestDecoderOnly()
    train.main([str(case.run_yaml(screen, tmp_path))])
    adata, out = ad.read_h5ad(screen), tmp_path / "out.h5ad"
    words = ["predict", "--model", tmp_path / "run", "--adata", screen, "--output", out, "--quiet"]
    words += ["--context", "type_3", "type_0", "--perturbation", "pert_2", "pert_0"]
    assert pertstate.cli.main([str(word) for word in words]) == 0
    predicted = ad.read_h5ad(out)
    observed = adata[predicted.obs["control_barcode"].to_numpy()]
    assert (observed.obs["perturbation"].to_numpy() == predicted.obs["perturbation"].to_numpy()).all()
    assert (observed.obs["cell_type"].to_numpy() == predicted.obs["cell_type"].to_numpy()).all()
    assert len(predicted) == 4 * 16 and predicted.obs["control_barcode"].is_unique
    np.testing.assert_array_equal(predicted.obsm["embedding"], observed.obsm["X_emb"])
    assert predicted.uns["pertstate"]["ceiling"].startswith("decoded from the observed perturbed cells")
    alone = adata[(adata.obs["cell_type"] != "type_3") | (adata.obs["perturbation"] != "pert_2")]
    alone.write_h5ad(tmp_path / "alone.h5ad")
    words[4], words[6] = tmp_path / "alone.h5ad", tmp_path / "none.h5ad"
    assert pertstate.cli.main([str(word) for word in words]) == 1
    assert "type_3 / pert_2: this model decodes observed cells" in capsys.readouterr().err


def test_embed_sum_trains_its_decoder_on_latents_as_they_are():
    case = TestEmbedSumOnEmbeddings()
    model, batch = case.model().train(), case.batch()
    terms = objective_for(model.config)(model(**batch), batch)
    assert terms["loss"] == terms["mse"] + terms["decoder"]
    terms["decoder"].backward()
    reached = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert reached == {"gene_decoder"}


def test_embed_sum_is_clamped_in_evaluation_alone():
    model, batch = TestEmbedSum().model(), TestEmbedSum().batch()
    with torch.no_grad():
        clamped, raw = model(**batch).predictions, model.train()(**batch).predictions
    assert raw.min() < 0
    assert torch.equal(clamped, raw.relu())
    free = EmbedSumForPerturbation(EmbedSumConfig(input_dim=4, num_perturbations=1, nonnegative_output=False))
    assert free.eval()(torch.randn(1, 3, 4), torch.zeros(1, 1, dtype=torch.long)).predictions.min() < 0


def test_cells_of_a_sentence_are_strangers_to_embed_sum_and_neural_ot():
    for case in (TestEmbedSum(), TestNeuralOT()):
        model, batch = case.model(), case.batch()
        moved = {**batch, "control_cells": batch["control_cells"].clone()}
        moved["control_cells"][:, 0] += 1
        with torch.no_grad():
            one, other = model(**batch).predictions, model(**moved).predictions
        torch.testing.assert_close(one[:, 1:], other[:, 1:], atol=1e-6, rtol=0)
        assert (one[:, 0] - other[:, 0]).abs().max() > 1e-3


def test_pseudobulk_without_residual_predicts_one_cell():
    case = TestPseudobulk()
    with torch.no_grad():
        alike = case.model(residual="none")(**case.batch()).predictions
        own = case.model()(**case.batch()).predictions
    assert (alike - alike[:, :1]).abs().max() == 0 and (own - own[:, :1]).abs().max() > 1e-3


def test_pseudobulk_encodes_batches():
    case = TestPseudobulk()
    model, batch = case.model(batch_encoder=True), case.batch()
    with torch.no_grad():
        one = model(**batch).predictions
        other = model(**{**batch, "batch_ids": 1 - batch["batch_ids"]}).predictions
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="batch_encoder=True needs batch_ids, found None"):
        model(**{key: value for key, value in batch.items() if key != "batch_ids"})
    with pytest.raises(ValueError, match="batch_ids holds -1, a batch that was not seen in training"):
        model(**{**batch, "batch_ids": batch["batch_ids"] - 1})
    with pytest.raises(ValueError, match="batch_encoder=True needs num_batches, found None"):
        PseudobulkConfig(batch_encoder=True)


def test_options_of_another_family_are_unknown():
    with pytest.raises(ValueError, match="PseudobulkConfig has no field 'confidence_token'"):
        PseudobulkConfig(confidence_token=True)
    with pytest.raises(ValueError, match="residual='output' is not an option of PseudobulkConfig"):
        PseudobulkConfig(residual="output")


def test_a_family_that_does_not_exist_is_named(screen, tmp_path):  # noqa: F811
    path = TestPseudobulk().run_yaml(screen, tmp_path)
    with pytest.raises(
        ValueError, match="model_type='state-pseudobluk' is no family .* did you mean 'state-pseudobulk'"
    ):
        train.main([str(path), "--model_type", "state-pseudobluk"])
    with pytest.raises(ValueError, match="unknown field 'residual' in section 'model'"):
        path.write_text(path.read_text().replace("set_size:", "residual: none\n  set_size:"))
        train.main([str(path), "--model_type", "state-embed-sum"])
