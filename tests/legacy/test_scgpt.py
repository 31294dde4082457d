"""Starting the gene-token transformer from a published folder."""

import json
import os
import pickle
import re

import pytest
import torch
from published_scgpt import PublishedScGPT, write_published

from pertstate import ScGPTConfig, ScGPTForPerturbation
from pertstate.legacy.scgpt import load_published, published_fields


# The folder's genes, in another order than the model's; the model has one that the folder has not.
VOCABULARY = {"<pad>": 0, "C": 1, "A": 2, "unused": 3, "E": 4, "B": 5, "D": 6}
GENES = ["A", "B", "C", "D", "E"]


@pytest.fixture
def published():
    torch.manual_seed(0)
    return PublishedScGPT(len(VOCABULARY))


def fresh(folder, genes=GENES, **fields):
    torch.manual_seed(1)
    config = ScGPTConfig(
        input_dim=len(genes),
        num_perturbations=len(genes),
        perturbed_genes=list(range(len(genes))),
        nonnegative_output=False,
        **published_fields(folder, {}),
        **fields,
    )
    return ScGPTForPerturbation(config).eval()


@pytest.mark.parametrize("flash", [False, True])
def test_a_published_folder_predicts_as_the_published_model(tmp_path, published, flash):
    folder = write_published(tmp_path / "scgpt", published, VOCABULARY, flash)
    model = fresh(folder)
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0.2, 0.2)
    report = load_published(model, GENES, folder)
    assert (report.missing, report.unexpected, report.new_genes) == ([], [], [])
    cells = torch.rand(2, 3, len(GENES)) * 4
    cells[0, 0, 0] = 1000.0  # beyond what the value encoder tells apart
    perturbations = torch.tensor([[1, -1], [0, 3]])
    flags = torch.tensor([[0, 1, 0, 0, 0], [1, 0, 0, 1, 0]]).repeat_interleave(3, dim=0)
    ids = torch.tensor([VOCABULARY[gene] for gene in GENES]).expand(6, -1)
    with torch.no_grad():
        expected = published(ids, cells.flatten(0, 1), flags).view(2, 3, -1)
        predicted = model(control_cells=cells, perturbation_ids=perturbations).predictions
    assert expected.std() > 0.1
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-5)


def test_what_is_missing_or_unexpected_is_listed_and_new_genes_keep_their_rows(tmp_path, published):
    folder = write_published(
        tmp_path, published, VOCABULARY, **{"cls_decoder.out_layer.bias": torch.ones(2), "mvc_decoder.W": torch.ones(1)}
    )
    weights = torch.load(folder / "best_model.pt", weights_only=True)
    del weights["pert_encoder.weight"], weights["bn.running_mean"]
    # A head that reads more than the token does not fit.
    weights["decoder.fc.0.weight"] = torch.ones(16, 32)
    torch.save(weights, folder / "best_model.pt")
    genes = [*GENES, "e", "F"]
    model = fresh(folder, genes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_published(model, genes, folder)
    assert report.new_genes == ["e", "F"]
    assert report.missing == ["flag_embedding.weight", "norm.running_mean", "head.0.weight"]
    assert report.unexpected == [
        "decoder.fc.0.weight (shape (16, 32))",
        "cls_decoder.out_layer.bias",
        "mvc_decoder.W",
    ]
    after = model.state_dict()
    assert set(report.loaded) | set(report.missing) == set(after)
    for name in report.missing:
        assert torch.equal(before[name], after[name]), name
    rows = after["gene_embedding.weight"]
    assert torch.equal(rows[5:], before["gene_embedding.weight"][5:])
    assert torch.equal(rows[0], published.encoder.embedding.weight[2])
    for text in ("5 of 7 genes are in vocab.json", "2 genes start afresh: ['e', 'F']", "cls_decoder.out_layer.bias"):
        assert text in str(report), text


def test_weights_in_half_precision_are_read_as_they_are(tmp_path, published):
    folder = write_published(tmp_path, published.half(), VOCABULARY)
    model = fresh(folder)
    load_published(model, GENES, folder)
    assert model.dtype == torch.float32
    assert torch.equal(model.head[4].weight.half(), published.decoder.fc[4].weight)


class Harmful:
    """An object whose pickle makes a folder when it is read the unsafe way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_with_code_in_it_is_refused_and_nothing_runs(tmp_path, published):
    folder = write_published(tmp_path / "scgpt", published, VOCABULARY)
    trap = tmp_path / "trap"
    torch.save({"encoder.embedding.weight": torch.ones(1), "more": Harmful(str(trap))}, folder / "best_model.pt")
    with pytest.raises(ValueError, match=r"best_model.pt: expected a pickle of tensors.*nothing of it"):
        load_published(fresh(folder), GENES, folder)
    (folder / "best_model.pt").write_bytes(pickle.dumps(Harmful(str(trap))))
    with pytest.raises(ValueError, match=r"nothing of it was run"):
        load_published(fresh(folder), GENES, folder)
    assert not trap.exists()
    # The trap works: read the unsafe way, it runs.
    pickle.loads(pickle.dumps(Harmful(str(trap))))
    assert trap.is_dir()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_one_clear_error(tmp_path, published, keep):
    folder = write_published(tmp_path, published, VOCABULARY)
    model, whole = fresh(folder), (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(
        ValueError, match=r"best_model.pt: expected a whole file of torch.save or pickle.*copy it again"
    ):
        load_published(model, GENES, folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"g1": 1' + "0" * 5000 + "}"], ids=["deep", "long"])
def test_a_json_that_python_does_not_follow_is_one_clear_error(tmp_path, published, content):
    folder = write_published(tmp_path, published, VOCABULARY)
    model = fresh(folder)
    (folder / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocab.json: expected a whole JSON file.*copy the folder again"):
        load_published(model, GENES, folder)


def change(name, **values):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        content.update({key: value for key, value in values.items() if value is not None})
        for key in [key for key, value in values.items() if value is None]:
            del content[key]
        (folder / name).write_text(json.dumps(content))

    return apply


def change_weights(change):
    def apply(folder):
        weights = torch.load(folder / "best_model.pt", weights_only=True)
        torch.save(change(weights), folder / "best_model.pt")

    return apply


def without(*names):
    return change_weights(lambda weights: {k: v for k, v in weights.items() if k not in names})


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda f: (f / "vocab.json").unlink(),
            FileNotFoundError,
            r"found no vocab.json .*best_model.pt.*copy the whole",
        ),
        (
            lambda f: (f / "args.json").write_text('{"embsize": 16,'),
            ValueError,
            r"args.json is not a whole JSON file",
        ),
        (
            lambda f: (f / "vocab.json").write_text("[1]"),
            ValueError,
            r"vocab.json: expected names and their values, found a",
        ),
        (change("args.json", nheads=None, d_hid="24"), ValueError, r"found none for \['nheads', 'd_hid'\]"),
        (change("args.json", input_emb_style="category"), ValueError, r"read by an MLP .* found 'category'"),
        (change("args.json", pre_norm=True), ValueError, r"norms after each sum .* True"),
        (change("args.json", nlayers=3), ValueError, r"expected all weights .* found none for \['layers.2.attention"),
        (change("args.json", d_hid=12), ValueError, r"linear1.weight: expected shape \(12, 16\) by args.json, found"),
        (change("vocab.json", A=7), ValueError, r"its row among the 7 of best_model.pt, found 7 for 'A' \(1 such"),
        (change("vocab.json", A="2"), ValueError, r"found '2' for 'A'"),
        (
            lambda f: (f / "vocab.json").write_text('{"ENSG1": 1}'),
            ValueError,
            r"found none of this model's 5 \(\['A', 'B'",
        ),
        (without("encoder.embedding.weight"), ValueError, r"found none for \['encoder.embedding.weight'\]"),
        (without("encoder.enc_norm.bias"), ValueError, r"found none for \['gene_norm.bias'\]"),
        (change_weights(lambda weights: {"model": weights}), ValueError, r"expected a state dict.*found \['model'\]"),
        (change_weights(lambda weights: list(weights.values())), ValueError, r"expected a state dict.*found list"),
        (
            change_weights(lambda weights: weights | {"encoder.embedding.weight": torch.ones(7, 8)}),
            ValueError,
            r"expected rows of width 16 by args.json, found shape \(7, 8\)",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_error(tmp_path, published, damage, error, message):
    folder = write_published(tmp_path, published, VOCABULARY)
    damage(folder)
    with pytest.raises(error, match=message):
        load_published(fresh(folder), GENES, folder)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a published scGPT folder .*\(no such folder\)"):
        published_fields(tmp_path / "nowhere", {})


def test_the_runs_own_fields_agree_with_the_weights_or_are_an_error(tmp_path, published):
    folder = write_published(tmp_path, published, VOCABULARY)
    assert published_fields(folder, {"hidden_size": 16, "hidden_dropout": 0.0}) == {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    message = (
        "expected {'hidden_size': 16, 'num_attention_heads': 2}, found {'hidden_size': 32, 'num_attention_heads': 4}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        published_fields(folder, ScGPTConfig.presets["tiny"] | {"num_hidden_layers": 2, "intermediate_size": 24})
