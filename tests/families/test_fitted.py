"""The families that are fitted without gradients: exact means, closed forms, and what they say of the unseen."""

import warnings

import numpy as np
import pytest
import torch
from family_tests import FamilyTests, screen  # noqa: F401 - a fixture
from sklearn.linear_model import Ridge

from pertstate import (
    AdditiveConfig,
    AdditiveForPerturbation,
    ContextMeanConfig,
    ContextMeanForPerturbation,
    LinearConfig,
    LinearForPerturbation,
    LogFoldChangeConfig,
    LogFoldChangeForPerturbation,
    PerturbationMeanConfig,
    PerturbationMeanForPerturbation,
)
from pertstate.base.modeling_fitted import TrainingMeans
from pertstate.base.modeling_layers import UnseenWarning
from pertstate.base.modeling_perturbation import UnseenPerturbationError
from pertstate.families import FAMILIES


D = 12


def rng(seed=0):
    return np.random.default_rng(seed)


def toy_means(by_features: int | None = None, dim: int = D) -> TrainingMeans:
    """Means of perturbations 0 and 1 and of the pair 1 and 2, in contexts 0 and 2."""
    return TrainingMeans(
        changes=rng(1).normal(size=(3, dim)),
        perturbation_ids=None if by_features else np.array([[0, -1], [1, -1], [2, 1]]),
        perturbation_features=rng(2).normal(size=(3, by_features)).astype(np.float32) if by_features else None,
        context_ids=np.array([0, 2]),
        context_means=rng(3).random((2, dim)),
        control_means=rng(4).random((2, dim)),
        log_folds=rng(6).normal(size=(3, dim)),
    )


def fitted(config, means=None):
    model = FAMILIES[config.model_type].model(config).eval()
    model.fit(toy_means(config.perturbation_dim) if means is None else means)
    return model


def cells(sentences: int, size: int = 5, dim: int = D) -> torch.Tensor:
    return torch.from_numpy(rng(5).random((sentences, size, dim)).astype(np.float32) + 3)


def ids(*rows) -> torch.Tensor:
    return torch.tensor(rows)


class FittedTests(FamilyTests):
    learns = False

    def fill(self, model):
        model.fit(toy_means())

    def test_it_is_frozen_and_float32_fitted_or_loaded(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        for one in (model, type(model).from_pretrained(tmp_path)):
            assert [name for name, value in one.named_parameters() if value.requires_grad] == []
            assert {value.dtype for value in one.parameters()} == {torch.float32}

    def test_before_it_is_fitted_it_knows_nothing(self):
        """A new model has initial values, whatever its memory held before."""
        model = FAMILIES[self.model_type].model(self.config())
        for tensor in model.state_dict().values():
            tensor.fill_(1)
        for tensor in (model, *model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = False
        model.initialize_weights()
        # Without an id, the entry of no perturbation.
        blank = {name: -1 if name == "entries" else 0 for name in model.state_dict()}
        assert {name: value.unique().tolist() for name, value in model.state_dict().items()} == {
            name: [value] for name, value in blank.items()
        }

    def test_there_is_no_gene_decoder(self):
        with pytest.raises(ValueError, match=f"gene_dim=7: {self.model_type} predicts the features that it reads"):
            self.config(gene_dim=7)
        with pytest.raises(ValueError, match="expected output_dim=12, found 9"):
            self.config(output_dim=9)

    def test_means_that_do_not_fit_are_an_error(self):
        model = FAMILIES[self.model_type].model(self.config())
        with pytest.raises(ValueError, match=r"changes: expected shape \(num_entries, 12\) .* found \(3, 7\)"):
            model.fit(toy_means(dim=7))
        with pytest.raises(ValueError, match="expected perturbation_ids alone, .*; found the other"):
            model.fit(toy_means(by_features=6))
        wrong = toy_means()
        wrong.perturbation_ids = wrong.perturbation_ids + 2
        with pytest.raises(ValueError, match="perturbation_ids: expected at least one of 0 to 3 .* found 1 to 4"):
            model.fit(wrong)
        wrong = toy_means()
        wrong.context_ids = np.array([0, 3])
        with pytest.raises(ValueError, match="context_ids: expected 0 to 2, found 0 to 3"):
            model.fit(wrong)


class TestPerturbationMean(FittedTests):
    model_type = "state-perturbation-mean"
    fields = {"num_entries": 4, "entry_width": 2}
    golden = [2.20218, 2.513657, 2.012275, 0.0]
    golden_mean = 1.137104


class TestLogFoldChange(FittedTests):
    model_type = "state-log-fold-change"
    fields = {"num_entries": 4, "entry_width": 2}
    golden = [2.802447, 3.302498, 0.293056, 0.726282]
    golden_mean = 1.13312


class TestContextMean(FittedTests):
    model_type = "state-context-mean"
    golden = [0.085649, 0.236811, 0.801274, 0.582162]
    golden_mean = 0.587742


class TestLinear(FittedTests):
    model_type = "state-linear"
    fields = {"rank": 2, "intercept": True}
    model_section = {"rank": 2, "intercept": True}
    golden = [2.145301, 2.462173, 1.976368, 0.0]
    golden_mean = 1.124651


class TestAdditive(FittedTests):
    model_type = "state-additive"
    golden = [2.20218, 2.513657, 2.012275, 0.0]
    golden_mean = 1.184200

    def batch(self):
        """A batch in which perturbation 2 was never measured alone."""
        return {**super().batch(), "perturbation_ids": ids([0, -1], [1, 0], [-1, -1])}


# Perturbation mean


def perturbation_mean(**sizes) -> PerturbationMeanForPerturbation:
    sizes = sizes or {"num_perturbations": 4}
    return fitted(PerturbationMeanConfig(input_dim=D, **sizes))


def test_each_perturbation_and_combination_has_its_own_change():
    model, means, x = perturbation_mean(), toy_means(), cells(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = model(x, perturbation_ids=ids([0, -1], [-1, 1], [1, 2], [2, 1], [-1, -1]))
    change = np.stack([means.changes[i] for i in (0, 1, 2, 2)] + [np.zeros(D)])
    expected = torch.from_numpy(change.astype(np.float32))[:, None] + x
    assert torch.equal(outputs.predictions, expected.relu())
    assert outputs.unseen.tolist() == [False] * 5
    assert (model.config.num_entries, model.config.entry_width) == (4, 2)


def test_what_was_not_measured_changes_nothing_and_is_counted():
    model, x = perturbation_mean(), cells(4)
    with pytest.warns(UnseenWarning, match="^3 of 4 sentences: their perturbation has no training cells, so that noth"):
        outputs = model(x, perturbation_ids=ids([2, -1, -1], [0, 1, -1], [0, -1, -1], [2, 1, 0]))
    assert outputs.unseen.tolist() == [True, True, False, True]
    assert torch.equal(outputs.predictions[outputs.unseen], x[outputs.unseen])
    assert not torch.equal(outputs.predictions[2], x[2])


def test_predictions_of_expression_are_clipped_at_0():
    far = toy_means()
    far.changes -= 100
    config = PerturbationMeanConfig(input_dim=D, num_perturbations=4)
    assert torch.equal(fitted(config, far)(cells(1), ids([0])).predictions, torch.zeros(1, 5, D))
    embedding = PerturbationMeanConfig(input_dim=D, num_perturbations=4, nonnegative_output=False)
    assert (fitted(embedding, far)(cells(1), ids([0])).predictions < -90).all()


def test_a_dose_scales_a_single_change_and_not_a_combination():
    model, x = perturbation_mean(), cells(2)
    half = model(x, ids([0, -1], [2, 1]), torch.tensor([[0.5, 7.0], [1.0, 1.0]])).predictions
    expected = (
        x + torch.from_numpy(toy_means().changes[[0, 2]]).float()[:, None] * torch.tensor([0.5, 1])[:, None, None]
    )
    torch.testing.assert_close(half, expected.relu())
    with pytest.raises(
        ValueError, match="expected 1 for each perturbation of a combination, .* state-additive adds up"
    ):
        model(x, ids([0, -1], [2, 1]), torch.tensor([[0.5, 7.0], [1.0, 0.5]]))


@pytest.mark.parametrize("family", ["perturbation-mean", "linear", "additive", "context-mean"])
def test_multi_hot_vectors_are_ids_at_doses(family):
    config = FAMILIES[f"state-{family}"].config(input_dim=D, num_perturbations=4, num_contexts=3)
    model, x = fitted(config), cells(3)
    vectors = torch.tensor([[0.5, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    if family == "additive":
        vectors[1] = torch.tensor([2.0, -1, 0, 0])
    by_ids = ids([0, -1], [1, 2], [-1, -1]) if family != "additive" else ids([0, -1], [1, 0], [-1, -1])
    doses = (
        torch.tensor([[0.5, 1], [1, 1], [1, 1]]) if family != "additive" else torch.tensor([[0.5, 1], [-1, 2], [1, 1]])
    )
    context = torch.tensor([0, 2, 0])
    expected = model(x, by_ids, doses, context_ids=context).predictions
    found = model(x, perturbation_features=vectors, context_ids=context).predictions
    torch.testing.assert_close(found, expected)
    of_cells = vectors[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(model(x, perturbation_features=of_cells, context_ids=context).predictions, expected)
    assert not torch.equal(expected[0], x[0]) and not torch.equal(expected[1], x[1])


def test_perturbations_by_features_are_known_by_their_vector():
    model, means, x = perturbation_mean(perturbation_dim=6), toy_means(6), cells(4)
    vectors = torch.from_numpy(np.concatenate([means.perturbation_features[:2], np.zeros((2, 6), np.float32)]))
    vectors[3] = vectors[0] + 1e-6
    with pytest.warns(UnseenWarning, match="1 of 4 sentences"):
        outputs = model(x, perturbation_features=vectors)
    change = torch.from_numpy(means.changes[:2]).float()[:, None]
    assert torch.equal(outputs.predictions[:2], (x[:2] + change).relu())
    assert torch.equal(outputs.predictions[2:], x[2:]) and outputs.unseen.tolist() == [False, False, False, True]
    # Each cell may have its own perturbation. The sentence is unseen if one of them is.
    with pytest.warns(UnseenWarning, match="1 of 1 sentences"):
        mixed = model(x[:1, :4], perturbation_features=vectors[None])
    assert torch.equal(mixed.predictions[0, :2], (x[0, :2] + change[:, 0]).relu())
    assert torch.equal(mixed.predictions[0, 2:], x[0, 2:4])


def test_perturbations_of_one_vector_share_the_mean_of_their_changes():
    means = toy_means(6)
    means.perturbation_features[2] = means.perturbation_features[0]
    model = fitted(PerturbationMeanConfig(input_dim=D, perturbation_dim=6), means)
    assert model.config.num_entries == 3
    x = cells(1)
    found = model(x, perturbation_features=torch.from_numpy(means.perturbation_features[:1])).predictions
    torch.testing.assert_close(found, x + torch.from_numpy((means.changes[0] + means.changes[2]) / 2).float())


# Log fold change


def fold_change(**sizes) -> LogFoldChangeForPerturbation:
    return fitted(LogFoldChangeConfig(input_dim=D, **(sizes or {"num_perturbations": 4})))


def times(x: torch.Tensor, log_fold) -> torch.Tensor:
    return torch.from_numpy(np.log1p(np.expm1(x.numpy().astype(np.float64)) * np.exp(log_fold))).float()


def test_expression_is_multiplied_and_combinations_multiply_unless_they_were_measured():
    model, folds, x = fold_change(), toy_means().log_folds, cells(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = model(x, perturbation_ids=ids([0, -1], [1, 2], [0, 1], [1, 0], [-1, -1]))
    expected = [folds[0], folds[2], folds[0] + folds[1], folds[0] + folds[1], np.zeros(D)]
    torch.testing.assert_close(outputs.predictions, times(x, np.stack(expected)[:, None]), atol=1e-6, rtol=1e-6)
    assert torch.equal(outputs.predictions[4], x[4]) and outputs.unseen.tolist() == [False] * 5
    assert (model.config.num_entries, model.config.entry_width) == (4, 2)
    # No cell expresses a gene that it lacked.
    assert torch.equal(model(0 * x, perturbation_ids=ids([0], [1], [0], [1], [0])).predictions, 0 * x)


def test_a_dose_is_a_power_of_the_fold_change():
    model, folds, x = fold_change(), toy_means().log_folds, cells(3)
    doses = torch.tensor([[0.5, 7.0], [2.0, -1.0], [0.5, 1.0]])
    # The pair 1 and 2 was measured at doses of 1 alone, and 2 not without 1.
    with pytest.warns(UnseenWarning, match="^1 of 3 sentences: neither their perturbation nor all of its parts have"):
        outputs = model(x, ids([0, -1], [1, 0], [2, 1]), doses)
    assert outputs.unseen.tolist() == [False, False, True]
    expected = np.stack([0.5 * folds[0], 2 * folds[1] - folds[0]])[:, None]
    torch.testing.assert_close(outputs.predictions[:2], times(x[:2], expected), atol=1e-6, rtol=1e-6)
    assert not torch.equal(outputs.predictions[2], times(x[2], folds[2]))


def test_fold_changes_of_perturbations_by_features_are_known_by_their_vector():
    model, means, x = fold_change(perturbation_dim=6), toy_means(6), cells(2)
    vectors = torch.from_numpy(means.perturbation_features[[2, 2]])
    vectors[1] += 1e-6
    with pytest.warns(UnseenWarning, match="1 of 2 sentences"):
        outputs = model(x, perturbation_features=vectors)
    torch.testing.assert_close(outputs.predictions[0], times(x[0], means.log_folds[2]), atol=1e-6, rtol=1e-6)
    assert torch.equal(outputs.predictions[1], x[1])


def test_only_expression_is_multiplied():
    with pytest.raises(ValueError, match="multiplies expression, .* expected nonnegative_output=True, found False"):
        LogFoldChangeConfig(input_dim=D, num_perturbations=4, nonnegative_output=False)
    means = toy_means()
    means.log_folds = None
    with pytest.raises(ValueError, match="state-log-fold-change: expected log1p expression, .* found other values"):
        fitted(LogFoldChangeConfig(input_dim=D, num_perturbations=4), means)


# Context mean


def test_each_context_gives_its_means_and_an_unseen_one_that_of_the_sentence():
    model, means, x = fitted(ContextMeanConfig(input_dim=D, num_perturbations=4, num_contexts=3)), toy_means(), cells(6)
    mask = torch.arange(5).expand(6, -1) < torch.tensor([5, 5, 5, 3, 5, 2])[:, None]
    x[~mask] = float("nan")  # a padded cell is never looked at
    with pytest.warns(UnseenWarning, match="^3 of 6 sentences: their context has no perturbed training cells"):
        outputs = model(
            x,
            perturbation_ids=ids([0], [3], [-1], [2], [-1], [1]),
            context_ids=torch.tensor([0, 2, 2, 1, -1, -1]),
            cell_mask=mask,
        )
    rows = [means.context_means[0], means.context_means[1], means.control_means[1]]
    rows += [x[3, :3].double().mean(0).numpy(), x[4].double().mean(0).numpy(), x[5, :2].double().mean(0).numpy()]
    expected = torch.from_numpy(np.stack(rows)).float()[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(outputs.predictions, expected, atol=1e-6, rtol=1e-6)
    assert outputs.unseen.tolist() == [False] * 3 + [True] * 3


def test_a_context_mean_needs_contexts():
    with pytest.raises(ValueError, match="ContextMeanConfig needs num_contexts"):
        ContextMeanForPerturbation(ContextMeanConfig(input_dim=D, num_perturbations=4))
    model = fitted(ContextMeanConfig(input_dim=D, num_perturbations=4, num_contexts=3))
    with pytest.raises(ValueError, match=r"context_ids: expected shape \(2,\), found none"):
        model(cells(2), ids([0], [1]))
    with pytest.raises(ValueError, match=r"context_ids: expected shape \(2,\), found \(3,\)"):
        model(cells(2), ids([0], [1]), context_ids=torch.zeros(3, dtype=torch.int64))


# Linear


def many(entries: int, width: int, dim: int = D, by_features: bool = True) -> TrainingMeans:
    singles = np.stack([np.arange(entries) % width, np.full(entries, -1)], axis=1)
    singles[::3, 1] = (singles[::3, 0] + 1) % width
    features = rng(2).normal(size=(entries, width)).astype(np.float32)
    return TrainingMeans(
        changes=rng(1).normal(size=(entries, dim)),
        perturbation_ids=None if by_features else singles,
        perturbation_features=features if by_features else None,
        context_ids=np.array([0]),
        context_means=np.zeros((1, dim)),
        control_means=np.zeros((1, dim)),
    )


def design(means: TrainingMeans, width: int) -> np.ndarray:
    if means.perturbation_ids is None:
        return means.perturbation_features.astype(np.float64)
    return np.array([[(row == p).sum() for p in range(width)] for row in means.perturbation_ids], dtype=np.float64)


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("entries, width", [(30, 7), (9, 20)])
def test_linear_is_ridge_regression(by_features, intercept, entries, width):
    means = many(entries, width, by_features=by_features)
    size = {"perturbation_dim" if by_features else "num_perturbations": width}
    config = LinearConfig(input_dim=D, ridge=0.7, intercept=intercept, nonnegative_output=False, **size)
    model, features = fitted(config, means), design(means, width)
    reference = Ridge(alpha=0.7, fit_intercept=intercept).fit(features, means.changes)
    np.testing.assert_allclose(model.weight.T.numpy(), reference.coef_, atol=1e-6)
    x, inputs = cells(entries), torch.from_numpy(features).float()
    found = model(x, perturbation_features=inputs).predictions - x
    expected = torch.from_numpy(reference.predict(features)).float()[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    if not by_features:
        assert torch.equal(model(x, torch.from_numpy(means.perturbation_ids)).predictions - x, found)
    # The sum of squares is the least: no other weight lowers it.
    if not intercept:
        weight = model.weight.double().numpy()
        gradient = features.T @ (features @ weight - means.changes) + 0.7 * weight
        assert np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("intercept", [False, True])
def test_a_low_rank_projects_on_the_principal_components_and_a_full_one_changes_nothing(intercept):
    means = many(30, 7)
    options = {"input_dim": D, "perturbation_dim": 7, "intercept": intercept, "nonnegative_output": False}
    whole, full, low = (fitted(LinearConfig(rank=rank, **options), means) for rank in (None, D, 3))
    x, inputs = cells(30), torch.from_numpy(means.perturbation_features)
    changes = [model(x, perturbation_features=inputs).predictions - x for model in (whole, full, low)]
    torch.testing.assert_close(changes[1], changes[0], atol=2e-6, rtol=1e-5)
    base = means.changes.mean(axis=0) if intercept else 0
    covariance = (means.changes - base).T @ (means.changes - base)
    components = np.linalg.eigh(covariance)[1][:, ::-1][:, :3]
    projected = whole.weight.double().numpy() @ components @ components.T
    torch.testing.assert_close(
        low.weight.double() @ low.components.double(), torch.from_numpy(projected), atol=1e-6, rtol=1e-5
    )
    if intercept:
        expected = base - means.perturbation_features.mean(axis=0, dtype=np.float64) @ projected
        np.testing.assert_allclose(low.intercept.numpy(), expected, atol=1e-6)
    assert np.abs((changes[2] - changes[0]).numpy()).max() > 0.1
    with pytest.raises(ValueError, match="rank=5: expected at most 4, as the training data have 4 perturbations"):
        fitted(LinearConfig(rank=5, **options), many(4, 7))


@pytest.mark.parametrize("intercept", [False, True])
def test_linear_leaves_control_cells_alone_and_counts_unseen_ids(intercept):
    model, x = fitted(LinearConfig(input_dim=D, num_perturbations=4, intercept=intercept)), cells(3)
    with pytest.warns(UnseenWarning, match="^2 of 3 sentences: a perturbation of theirs has no training cells"):
        outputs = model(x, ids([-1, -1], [3, -1], [0, 3]))
    assert outputs.unseen.tolist() == [False, True, True]
    assert torch.equal(outputs.predictions[0], x[0])
    assert torch.equal(outputs.predictions[1], x[1]) is not intercept
    known = model(x[2:], ids([0, -1])).predictions
    assert torch.equal(outputs.predictions[2:], known)
    by_features = fitted(LinearConfig(input_dim=D, perturbation_dim=6, intercept=intercept))
    vectors = torch.cat([torch.zeros(1, 6), torch.ones(2, 6)])
    outputs = by_features(x, perturbation_features=vectors)
    assert torch.equal(outputs.predictions[0], x[0]) and outputs.unseen is None
    # One that was never measured has a prediction of its own.
    assert (outputs.predictions[1:] - x[1:]).abs().mean() > 0.1


def test_options_of_linear_are_checked():
    for ridge in (0, -1.0):
        with pytest.raises(ValueError, match="ridge must be above 0"):
            LinearConfig(input_dim=D, num_perturbations=4, ridge=ridge)
    for rank in (0, D + 1):
        with pytest.raises(ValueError, match=f"rank must lie between 1 and output_dim=12, found {rank}"):
            LinearConfig(input_dim=D, num_perturbations=4, rank=rank)


# Additive


def additive() -> AdditiveForPerturbation:
    return fitted(AdditiveConfig(input_dim=D, num_perturbations=4))


def test_additive_adds_up_single_changes_at_their_doses():
    changes, x = toy_means().changes, cells(4)
    doses = torch.tensor([[1.0, 1.0], [0.5, 2.0], [1.0, 1.0], [3.0, 1.0]])
    found = additive()(x, ids([0, 1], [0, 1], [-1, -1], [0, -1]), doses).predictions
    expected = np.stack(
        [changes[0] + changes[1], 0.5 * changes[0] + 2 * changes[1], np.zeros(D), 3 * changes[0]]
    ).astype(np.float32)
    torch.testing.assert_close(found, (x + torch.from_numpy(expected)[:, None]).relu())


def test_a_single_that_was_never_measured_is_an_error_with_its_id():
    model = additive()
    with pytest.raises(
        UnseenPerturbationError, match=r"^perturbation ids \[2, 3\]: no training cells have one of these"
    ):
        model(cells(3), ids([0, 3], [2, 1], [2, 3]))
    with pytest.raises(UnseenPerturbationError, match=r"perturbation ids \[2\]") as caught:
        model.check_perturbations(perturbation_ids=ids([0, 2]))
    assert caught.value.ids == [2]
    model.check_perturbations(perturbation_ids=ids([0, 1], [-1, -1]))


def test_additive_takes_no_features():
    with pytest.raises(
        ValueError, match="state-additive adds up .* found perturbation_dim=6; leave perturbation_featur"
    ):
        AdditiveConfig(input_dim=D, perturbation_dim=6)


def test_linear_and_context_mean_are_exported():
    assert {LinearForPerturbation, ContextMeanForPerturbation} <= {family.model for family in FAMILIES.values()}
