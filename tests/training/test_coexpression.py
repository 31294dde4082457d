"""Vectors of perturbed genes from the covariance of genes in control cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pertstate.base.constants import Split
from pertstate.base.modeling_anchor import Anchor
from pertstate.base.modeling_fitted import ridge_weights
from pertstate.base.vocabulary import PerturbationFeatures, Vocabulary
from pertstate.data.arguments import DataArguments
from pertstate.data.cells import load
from pertstate.data.coexpression import COMPONENTS
from pertstate.data.group_means import GroupMeans
from pertstate.data.sentences import SentenceDataset
from pertstate.processing import StateProcessor
from pertstate.training.anchoring import chosen_ridge_and_share, fit_anchor
from pertstate.training.inner_folds import chosen_step, folds_of, inner_folds
from pertstate.training.stream_run import check_fields


GENES = 12


def screen(seed: int = 0, names=("g0", "g1", "g2", "g3")) -> ad.AnnData:
    """Two contexts; even and odd genes share a factor each, and the last gene is silent in controls."""
    generator = np.random.default_rng(seed)
    labels = [(c, p) for c in ("a", "b") for p in ("control", *names) for _ in range(40 if p == "control" else 10)]
    factors = generator.normal(0, 0.5, (len(labels), 2))
    rates = np.exp(3 + factors[:, np.arange(GENES) % 2] + np.array([c == "b" for c, _ in labels])[:, None])
    counts = generator.poisson(rates).astype(np.float32)
    counts[:, -1] = [0 if p == "control" else 1 for _, p in labels]
    obs = pd.DataFrame(labels, columns=["cell_type", "perturbation"], index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(counts, obs.astype("category"), pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


def loaded(adata: ad.AnnData, **options):
    data = DataArguments(perturbation_features="coexpression", **options)
    data.datasets = {"screen": adata}
    source = data.file_source()
    return load(source, data.resolve_splits(source.groups, source.reader), **data.fit_options())


def test_genes_that_vary_together_have_vectors_that_point_the_same_way():
    _, processor = loaded(screen())
    features = processor.perturbation_features
    assert features.names == [f"g{i}" for i in range(GENES - 1)]  # not the silent one
    assert features.dim == GENES - 1 < COMPONENTS  # cells hold no more dimensions
    assert (features.vectors**2).sum() / GENES == pytest.approx(1, rel=1e-5)
    unit = features.vectors / np.linalg.norm(features.vectors, axis=1, keepdims=True)
    products = unit @ unit.T
    same = (np.arange(GENES - 1)[:, None] - np.arange(GENES - 1)) % 2 == 0
    assert products[same].min() > 0.3 and products[~same].max() < 0


def test_they_are_the_covariance_of_genes_within_contexts():
    adata = screen()
    cells, processor = loaded(adata)
    controls = cells.groups[cells.groups["perturbation"] == "control"]
    parts = [cells.features[start:stop] for start, stop in controls[["start", "stop"]].to_numpy()]
    covariance = np.cov(np.concatenate([part - part.mean(axis=0) for part in parts]).T, ddof=0)[:-1, :-1]
    vectors = processor.perturbation_features.vectors
    scale = np.trace(covariance) / GENES  # the mean square norm, to 1
    np.testing.assert_allclose(vectors @ vectors.T, covariance / scale, atol=1e-4)


def test_held_out_cells_take_no_part():
    adata, other = screen(), screen()
    held = ((other.obs["cell_type"] == "b") | (other.obs["perturbation"] != "control")).to_numpy()
    other.X[held] = other.X[held][:, ::-1]
    one, two = (loaded(of, test_contexts=["b"])[1].perturbation_features for of in (adata, other))
    assert np.array_equal(one.vectors, two.vectors)
    assert not np.array_equal(one.vectors, loaded(adata)[1].perturbation_features.vectors)


def test_genes_that_the_model_does_not_read_have_vectors_too():
    cells, processor = loaded(screen(), genes=["g0", "g2", "g5", "g7"], test_perturbations=["g1"])
    assert processor.vocabulary.genes == ["g0", "g2", "g5", "g7"] and processor.vocabulary.perturbations == [
        "g0",
        "g2",
        "g3",
    ]
    features = processor.perturbation_features
    even, odd = features.vectors[features.index["g4"]], features.vectors[features.index["g5"]]
    held_out = processor.encode(["g1"])["perturbation_features"][0]
    assert held_out @ odd > 0 > held_out @ even
    assert set(cells.groups.loc[cells.groups["perturbation"] == "g1", "split"]) == {Split.TEST}


def test_a_perturbation_without_an_expressed_gene_is_an_error_that_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"2 of 3 are not: \['drug', 'g11'\] \(measured, and 0 in all .*: \['g11'\]\); rename"
    ):
        loaded(screen(names=("g0", "g11", "drug")))
    with pytest.raises(ValueError, match=r"1 of 2 are not: \['G1'\]; did you mean 'g1'.*include, or give a file"):
        loaded(screen(names=("g0", "G1")))


def test_training_perturbations_are_held_out_whole_where_test_perturbations_are_new():
    rows = [
        ("d", c, p, Split.TEST if p == "p0" else Split.TRAIN, 0, 10) for c in "ab" for p in ("p0", "p1", "p2", "p3")
    ]
    groups = pd.DataFrame(rows, columns=["dataset", "context", "perturbation", "split", "start", "stop"])
    assert inner_folds(groups, "control", lambda name: [name], 2) == []
    folds = inner_folds(groups, "control", lambda name: [name], 2, by_vector=True)
    assert [fold.groups for fold in folds] == [{("d", "a", f"p{i}"), ("d", "b", f"p{i}")} for i in (1, 2)]


def test_so_many_folds_hold_ten_perturbations_out_where_there_are_so_many():
    def folds(number: int, asked: int = 2) -> list[int]:
        names = ("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7", "g8", "g9", "g10")[:number]
        cells, processor = loaded(screen(names=names), test_perturbations=["g0"])
        found = folds_of(SentenceDataset(cells, processor, Split.TRAIN, 4), asked)
        return [len({name for *_, name in fold.groups}) for fold in found]

    assert folds(5) == [1, 1, 1, 1]  # one is for the test
    assert folds(9) == [2, 2, 2, 1, 1]
    assert folds(5, asked=1) == [1, 1, 1, 1]


def test_contexts_are_held_out_as_without_vectors():
    """Every fold holds the same perturbations out, and other contexts keep them: two folds, as asked for."""
    adata = screen()
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) % 5 < 4, np.arange(adata.n_obs) % 5, 4).astype(str)
    cells, processor = loaded(adata, context_key="batch", test_contexts=["4"])
    found = folds_of(SentenceDataset(cells, processor, Split.TRAIN, 4), 2)
    assert len(found) == 2 and all({name for *_, name in fold.groups} == {"g0", "g1", "g2", "g3"} for fold in found)


def test_few_held_out_perturbations_ask_for_few_steps():
    ratios = np.array([[1, 0.9, 0.95, 0.8], [1, 0.95, 0.9, 0.5], [1, 0.99, 0.9, 1.1]])
    assert chosen_step(ratios, careful=False) == 3
    # The lowest mean is 0.8, and its standard error 0.17.
    assert chosen_step(ratios, careful=True) == 1
    assert chosen_step(ratios * [1, 1.1, 1, 1], careful=True) == 2
    assert chosen_step(ratios + [0, 1, 1, 1], careful=True) == 0


def test_a_stream_has_no_such_vectors():
    with pytest.raises(ValueError, match="coexpression: expected files or a store, found a stream"):
        check_fields(DataArguments(perturbation_features="coexpression"), None)


@pytest.mark.parametrize("told", [True, False])
def test_the_ridge_of_the_anchor_is_the_one_that_leaves_out_best(told):
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(20, 5))
    changes = generator.normal(size=(20, 8)) + 2 + (3 * vectors @ generator.normal(size=(5, 8)) if told else 0)
    errors = {}
    for ridge in (0.1, 1.0, 10.0, 100.0, np.inf):
        errors[ridge] = 0.0
        for out in range(20):
            kept = np.arange(20) != out
            center, mean = vectors[kept].mean(axis=0), changes[kept].mean(axis=0)
            weight = 0 if ridge == np.inf else ridge_weights(vectors[kept] - center, changes[kept] - mean, ridge)
            found = mean + (vectors[out] - center) @ weight if ridge < np.inf else mean
            errors[ridge] += ((changes[out] - found) ** 2).sum()
    ridge, share = chosen_ridge_and_share(vectors, changes)
    assert ridge == min(errors, key=errors.get)
    assert (ridge < 10) is told and share == 1.0
    assert chosen_ridge_and_share(vectors[:1], changes[:1]) == (np.inf, 1.0)


def test_of_perturbations_that_mostly_do_little_a_share_of_the_mean_change_is_predicted():
    vectors, changes = np.zeros((8, 2)), np.zeros((8, 5))
    changes[0] = 8
    # Of the first, the others show 0; of each other one, they show 8 / 7. A share s is off by 8 + 7 s 8 / 7.
    assert chosen_ridge_and_share(vectors, changes)[1] == 0.25
    changes[:5] = 8
    # Of each of the five the others show 32 / 7, of the rest 40 / 7: off by 5 (8 - s 32 / 7) + 3 s 40 / 7.
    assert chosen_ridge_and_share(vectors, changes)[1] == 1.0


def test_the_anchor_of_vectors_holds_the_share():
    """From vectors that tell nothing, each perturbation gets a quarter of the mean change of three, of which one changes cells."""
    means = GroupMeans(
        "control",
        [("d", "c", name) for name in ("a", "b", "control", "e")],
        np.full(4, 10),
        np.array([[8.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]], dtype=np.float32),
    )
    table = PerturbationFeatures(["a", "b", "e"], np.ones((3, 2)))
    processor = StateProcessor(Vocabulary(["x", "y"], ["a", "b", "e"], ["c"], []), perturbation_features=table)
    anchor = Anchor(2, 2, 0, expression=False, by_features=True)
    fit_anchor(anchor, means, processor)
    moved = anchor(torch.zeros(1, 1, 2), perturbation_features=torch.ones(1, 2))
    torch.testing.assert_close(moved, torch.tensor([[[0.25 * 2.0, 0.0]]]))
