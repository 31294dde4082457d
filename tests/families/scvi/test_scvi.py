"""scVI: the distributions of counts, the objective, units from end to end, and what the model learns."""

import json
import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from family_tests import FamilyTests, screen  # noqa: F401
from mpmath import mp, mpf
from scipy import stats
from scipy.special import gammaln

import pertstate.cli
from pertstate import (
    SCVIConfig,
    SCVIForPerturbation,
    StateProcessor,
    train,
)
from pertstate.base.count_distributions import (
    negative_binomial_log_prob,
    negative_binomial_mean_log1p,
    sample_negative_binomial,
    sample_zero_inflated_negative_binomial,
    zero_inflated_negative_binomial_log_prob,
)
from pertstate.data import simulate_screen
from pertstate.evaluation import controls_of
from pertstate.training import objective_for
from pertstate.training.trainer import StateTrainer


COUNTS = [0, 1, 2, 7, 150, 1e4, 1e6]
MEANS = [1e-12, 1e-3, 0.7, 9.0, 400.0, 1e6]
INVERSE_DISPERSIONS = [1e-9, 1e-2, 0.8, 9.99, 10.0, 55.0, 1e5, 1e9]


def grid(*axes) -> list[torch.Tensor]:
    return [
        axis.flatten() for axis in torch.meshgrid(*(torch.tensor(a, dtype=torch.float64) for a in axes), indexing="ij")
    ]


def exact_log_prob(count: float, mean: float, theta: float) -> float:
    """The definition, computed with more digits than any of its terms loses."""
    with mp.workdps(80):
        k, m, t = mpf(count), mpf(mean), mpf(theta)
        value = mp.loggamma(k + t) - mp.loggamma(t) - mp.loggamma(k + 1)
        return float(value - t * mp.log1p(m / t) + k * mp.log(m / (t + m)))


class TestSCVI(FamilyTests):
    model_type = "state-scvi"
    data = {"normalize": "none"}
    golden = [2.354756, 1.412704, 2.097496, 2.54734]
    golden_mean = 2.26407

    def batch(self):
        batch = super().batch()
        return {**batch, **{key: (4 * batch[key]).floor() for key in ("control_cells", "labels")}}


class TestSCVIOnNegativeBinomial(TestSCVI):
    fields = {"likelihood": "nb", "prediction": "log1p_mean", "library_size": None}
    golden = [1.285117, 2.305014, 1.652884, 1.618147]
    golden_mean = 1.450382
    model_section = {"likelihood": "nb", "prediction": "log1p_mean", "library_size": None, "kl_warmup_steps": 4}


# Distributions of counts


def test_negative_binomial_agrees_with_its_definition_in_80_digits():
    counts, means, thetas = grid(COUNTS, MEANS, INVERSE_DISPERSIONS)
    expected = [exact_log_prob(*case) for case in zip(counts.tolist(), means.tolist(), thetas.tolist())]
    found = negative_binomial_log_prob(counts, means, thetas)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_log_probabilities_agree_with_scipy():
    counts, means, thetas, logits = grid(COUNTS, MEANS, INVERSE_DISPERSIONS, [-30.0, -1.0, 0.5, 30.0])
    k, m, t = (values.numpy() for values in (counts, means, thetas))
    p = t / (t + m)
    # scipy gets a rounded p and subtracts log-gammas. If that costs it the seventh digit, it cannot serve as a reference.
    rounding = np.finfo(float).eps * (k / (1 - p).clip(1e-300) + t / p + np.abs(gammaln(t)) + gammaln(k + t))
    trusted = rounding < 1e-7
    assert trusted.mean() > 0.6 and all(trusted[k == count].any() for count in COUNTS)
    assert all(trusted[m == mean].any() for mean in MEANS) and all(
        trusted[t == x].any() for x in INVERSE_DISPERSIONS[:7]
    )
    observed = stats.nbinom(t, p).logpmf(k)
    found = negative_binomial_log_prob(counts, means, thetas).numpy()
    np.testing.assert_allclose(found[trusted], observed[trusted], rtol=0, atol=1e-6)

    log_zero, log_kept = -np.logaddexp(0, -logits.numpy()), -np.logaddexp(0, logits.numpy())
    mixture = np.where(k == 0, np.logaddexp(log_zero, log_kept + observed), log_kept + observed)
    found = zero_inflated_negative_binomial_log_prob(counts, means, thetas, logits).numpy()
    np.testing.assert_allclose(found[trusted], mixture[trusted], rtol=0, atol=1e-6)


def test_log_probabilities_at_their_limits():
    inf, zero = torch.tensor(torch.inf).double(), torch.zeros((), dtype=torch.float64)
    counts, means = grid(COUNTS, MEANS)
    poisson = stats.poisson(means.numpy()).logpmf(counts.numpy())
    np.testing.assert_allclose(negative_binomial_log_prob(counts, means, inf).numpy(), poisson, rtol=0, atol=1e-6)
    far = negative_binomial_log_prob(counts, means, torch.tensor(1e300).double())
    np.testing.assert_allclose(far.numpy(), poisson, rtol=0, atol=1e-6)
    all_at_zero = torch.where(counts == 0, 0.0, -torch.inf).double()
    assert torch.equal(negative_binomial_log_prob(counts, means, zero), all_at_zero)
    for theta in (1e-3, 20.0, 1e300):
        assert torch.equal(negative_binomial_log_prob(counts, zero, torch.tensor(theta).double()), all_at_zero)
    half = zero_inflated_negative_binomial_log_prob(counts, zero, torch.tensor(2.0).double(), zero)
    assert torch.equal(half, all_at_zero)
    never, always = -inf, inf
    nb = negative_binomial_log_prob(counts, means, torch.tensor(2.0).double())
    inflated = zero_inflated_negative_binomial_log_prob(counts, means, torch.tensor(2.0).double(), never)
    torch.testing.assert_close(inflated, nb, rtol=1e-15, atol=0)
    inflated = zero_inflated_negative_binomial_log_prob(counts, means, torch.tensor(2.0).double(), always)
    assert torch.equal(inflated, all_at_zero)


def test_probabilities_sum_to_one():
    counts = torch.arange(20_000, dtype=torch.float64)
    for mean, theta in ((0.3, 0.2), (40.0, 9.99), (40.0, 10.0), (3.0, 1e6)):
        mean, theta = torch.tensor(mean).double(), torch.tensor(theta).double()
        assert negative_binomial_log_prob(counts, mean, theta).exp().sum().item() == pytest.approx(1, abs=1e-9)
        inflated = zero_inflated_negative_binomial_log_prob(counts, mean, theta, torch.tensor(-0.4).double())
        assert inflated.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_derivatives_are_those_of_the_definition():
    counts, means, thetas = grid([0, 1, 30, 2000], [0.01, 2.0, 300.0], [0.05, 9.0, 11.0, 400.0])
    logits = torch.linspace(-2, 2, len(counts), dtype=torch.float64)
    inputs = [value.clone().requires_grad_() for value in (means, thetas, logits)]
    assert torch.autograd.gradcheck(lambda m, t: negative_binomial_log_prob(counts, m, t), inputs[:2], rtol=1e-4)
    assert torch.autograd.gradcheck(
        lambda m, t, d: zero_inflated_negative_binomial_log_prob(counts, m, t, d), inputs, rtol=1e-4
    )
    at_zero = torch.zeros(3, requires_grad=True)
    negative_binomial_log_prob(torch.zeros(3), at_zero, torch.tensor([0.1, 20.0, torch.inf])).sum().backward()
    assert torch.equal(at_zero.grad, -torch.ones(3))


def test_gradients_in_float32_are_finite_and_right():
    counts, log_means, log_thetas, logits = grid(
        [0, 1, 5, 300, 50_000],
        [-25.0, -8.0, 0.0, 6.0, 11.0],
        [-12.0, -3.0, 0.0, 2.3, 2.31, 8.0, 20.0],
        [-15.0, 0.0, 9.0],
    )
    grads = {}
    for dtype in (torch.float32, torch.float64):
        inputs = [value.to(dtype).requires_grad_() for value in (log_means, log_thetas, logits)]
        log_prob = zero_inflated_negative_binomial_log_prob(
            counts.to(dtype), inputs[0].exp(), inputs[1].exp(), inputs[2]
        )
        assert torch.isfinite(log_prob).all()
        grads[dtype] = torch.autograd.grad(log_prob.sum(), inputs)
    for found, expected in zip(grads[torch.float32], grads[torch.float64]):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-2)


def test_mean_of_log1p_is_the_sum_over_counts():
    for mean in (1e-4, 0.5, 30.0, 3000.0):
        for theta in (0.3, 4.0, 1e4):
            k = np.arange(int(mean * (1 + 60 / math.sqrt(theta))) + 400)
            probabilities = stats.nbinom(theta, theta / (theta + mean)).pmf(k)
            assert probabilities.sum() == pytest.approx(1, abs=1e-9)
            for scale in (1.0, 20.0, 500.0):
                expected = probabilities @ np.log1p(scale * k)
                arguments = (torch.tensor(value, dtype=torch.float64) for value in (mean, theta, scale))
                assert negative_binomial_mean_log1p(*arguments).item() == pytest.approx(expected, abs=2e-5)
    nothing = negative_binomial_mean_log1p(torch.zeros(()), torch.ones(()), torch.tensor(20.0))
    assert nothing.item() == 0


def test_drawn_counts_have_the_mean_and_variance_of_their_distribution():
    number = 100_000
    for mean, theta in ((0.4, 0.5), (20.0, 3.0), (5.0, math.inf)):
        p = theta / (theta + mean)
        law = stats.poisson(mean) if math.isinf(theta) else stats.nbinom(theta, p)
        expected, variance, excess = (float(v) for v in law.stats(moments="mvk"))
        drawn = [
            sample_negative_binomial(
                torch.tensor(mean), torch.full((number,), theta), torch.Generator().manual_seed(seed)
            )
            for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        counts = drawn[0].double()
        assert torch.equal(counts, counts.round()) and counts.min() >= 0
        # Standard errors of the sample mean and of the sample variance.
        assert abs(counts.mean().item() - expected) < 5 * math.sqrt(variance / number)
        assert abs(counts.var().item() - variance) < 5 * variance * math.sqrt((excess + 2) / number)
    logits = torch.full((number,), 0.3)
    counts = sample_zero_inflated_negative_binomial(
        torch.tensor(4.0), torch.tensor(2.0), logits, torch.Generator().manual_seed(0)
    )
    zeros = 1 / (1 + math.exp(-0.3)) + (1 - 1 / (1 + math.exp(-0.3))) * (2 / 6) ** 2
    assert abs((counts == 0).double().mean().item() - zeros) < 5 * math.sqrt(zeros * (1 - zeros) / number)


# The model


def numpy_forward(model: SCVIForPerturbation, batch: dict, latents: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What the model computes in evaluation mode, written from its definition."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def blocks(x, name):
        for i in range(2):
            x = linear(x, f"{name}.layers.{i}")
            norm = {
                part: weights[f"{name}.norms.{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
            }
            x = (x - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
            x = np.maximum(x, 0)
        return x

    x = batch["control_cells"].double().numpy()
    hidden = blocks(np.log1p(x), "encoder")
    mean, variance = linear(hidden, "posterior_mean"), np.logaddexp(0, linear(hidden, "posterior_variance")) + 1e-4
    rows = weights["perturbation_embedding.weight"]
    perturbation = [sum((rows[i] for i in ids if i >= 0), np.zeros(rows.shape[1])) for ids in batch["perturbation_ids"]]
    perturbation = np.stack(perturbation) + weights["perturbation_embedding.bias"]
    parts = [mean if latents is None else latents, perturbation[:, None]]
    for key, name in (("context_ids", "context_embedding"), ("batch_ids", "batch_embedding")):
        table = weights[f"{name}.weight"]
        table = np.concatenate((table, table.mean(axis=0, keepdims=True)))  # id -1
        embedded = table[batch[key].numpy()]
        parts.append(embedded if embedded.ndim == 3 else embedded[:, None])
    decoder_input = np.concatenate([np.broadcast_to(p, (*x.shape[:2], p.shape[-1])) for p in parts], axis=-1)
    hidden = blocks(decoder_input, "decoder")
    logits = linear(hidden, "share_head")
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    total = x.sum(axis=-1, keepdims=True)
    found = {"mean": shares * total, "posterior_mean": mean, "posterior_variance": variance, "total": total}
    found["inverse_dispersion"] = np.exp(weights["log_inverse_dispersion"])
    if model.config.likelihood == "zinb":
        found["dropout_logits"] = linear(hidden, "dropout_head")
    return found


@pytest.mark.parametrize("case", [TestSCVI, TestSCVIOnNegativeBinomial])
def test_forward_is_its_definition(case):
    model, batch = case().model(), case().batch()
    batch["batch_ids"][0, 1] = -1
    with torch.no_grad():
        outputs, expected = model(**batch), numpy_forward(model, batch)
    for name in ("mean", "posterior_mean", "posterior_variance", "inverse_dispersion", "dropout_logits"):
        if name in expected:
            np.testing.assert_allclose(outputs[name].numpy(), expected[name], rtol=2e-4, atol=1e-5)
    if case is TestSCVI:
        # The mean of log1p of scaled counts, estimated from drawn counts.
        drawn = np.random.default_rng(0).poisson(
            expected["mean"]
            * np.random.default_rng(1).gamma(
                expected["inverse_dispersion"], 1 / expected["inverse_dispersion"], (40_000, *expected["mean"].shape)
            )
        )
        kept = 1 / (1 + np.exp(expected["dropout_logits"]))
        drawn = np.log1p(1e4 / expected["total"] * drawn)
        error = 5 * drawn.std(axis=0) / math.sqrt(len(drawn)) + 1e-4
        assert (np.abs(outputs.predictions.numpy() - kept * drawn.mean(axis=0)) < error).all()
    else:
        np.testing.assert_allclose(outputs.predictions.numpy(), np.log1p(expected["mean"]), rtol=2e-4, atol=1e-5)
        assert outputs.dropout_logits is None


def test_log1p_of_the_mean_holds_library_size_counts():
    case = TestSCVI()
    model = case.model(prediction="log1p_mean", likelihood="nb", library_size=500)
    predictions = case.predict(model, case.batch())
    torch.testing.assert_close(predictions.expm1().sum(dim=-1), torch.full((3, 5), 500.0), rtol=1e-4, atol=0)
    # The mean of log1p lies below log1p of the mean (Jensen), gene by gene.
    other = case.model(prediction="mean_log1p", likelihood="nb", library_size=500)
    assert (case.predict(other, case.batch()) < predictions).all()


def test_a_control_cell_without_counts_is_predicted_without_counts():
    case = TestSCVI()
    batch = case.batch()
    batch["control_cells"][1, 2] = 0
    for prediction in ("mean_log1p", "log1p_mean"):
        predictions = case.predict(case.model(prediction=prediction), batch)
        assert (predictions[1, 2] == 0).all() and (predictions[1, 1] > 0).any()


def test_the_latent_state_is_drawn_in_training_alone():
    case = TestSCVI()
    model, batch = case.model(hidden_dropout=0.0), case.batch()
    assert torch.equal(model(**batch).mean, model(**batch).mean)
    model.train()
    first, second = model(**batch), model(**batch)
    assert not torch.equal(first.mean, second.mean)
    torch.testing.assert_close(first.posterior_mean, second.posterior_mean)


def test_contexts_and_batches_are_asked_for():
    case = TestSCVI()
    for name in ("context_ids", "batch_ids"):
        batch = {key: value for key, value in case.batch().items() if key != name}
        with pytest.raises(
            ValueError, match=f"was trained with {name} and needs them, found None; -1 is an unknown one"
        ):
            case.model()(**batch)
        without = case.model(**{"num_contexts" if name == "context_ids" else "num_batches": None})
        assert torch.isfinite(case.predict(without, batch)).all()


def test_features_and_doses_of_perturbations():
    case = TestSCVI()
    batch = case.batch()
    doses = torch.tensor([[2.0, 1.0], [0.5, 3.0], [1.0, 1.0]])
    multi_hot = torch.tensor([[2.0, 0, 0, 0], [0, 0.5, 3.0, 0], [0, 0, 0, 0]])
    by_id = case.predict(case.model(), {**batch, "perturbation_doses": doses})
    features = {key: value for key, value in batch.items() if key != "perturbation_ids"}
    features["perturbation_features"] = multi_hot
    torch.testing.assert_close(case.predict(case.model(), features), by_id)
    on_features = case.model(num_perturbations=None, perturbation_dim=4)
    torch.testing.assert_close(case.predict(on_features, features), by_id)


def test_drawn_cells_follow_the_distribution_that_the_model_gives():
    case = TestSCVI()
    for fields in ({}, {"likelihood": "nb"}):
        model = case.model(**fields)
        with torch.no_grad():
            # The draw of the latent state does not change the counts.
            model.decoder.layers[0].weight[:, : model.config.latent_dim] = 0
        batch = {key: value[:1] for key, value in case.batch().items() if key != "labels"}
        batch = {**batch, "control_cells": batch["control_cells"][:, :1].expand(1, 20_000, -1)}
        batch["batch_ids"] = batch["batch_ids"][:, :1].expand(1, 20_000)
        draw = lambda seed: model.sample_counts(**batch, generator=torch.Generator().manual_seed(seed))  # noqa: E731, B023
        counts = draw(0)
        assert torch.equal(counts, draw(0)) and not torch.equal(counts, draw(1))
        assert counts.shape == (1, 20_000, 12) and torch.equal(counts, counts.round())
        with torch.no_grad():
            outputs = model(
                **{
                    key: value[:, :1] if value.dim() > 2 or key == "batch_ids" else value
                    for key, value in batch.items()
                }
            )
        mean, theta = outputs.mean[0, 0].double(), outputs.inverse_dispersion.double()
        kept = torch.sigmoid(-outputs.dropout_logits[0, 0]).double() if not fields else torch.ones(12).double()
        variance = kept * (mean + mean**2 / theta) + kept * (1 - kept) * mean**2
        error = (counts[0].double().mean(dim=0) - kept * mean).abs()
        assert (error < 5 * (variance / 20_000).sqrt()).all()


def test_the_latent_state_of_drawn_cells_is_drawn_too():
    case = TestSCVI()
    model, batch = case.model(), {k: v for k, v in case.batch().items() if k != "labels"}
    with torch.no_grad():
        model.log_inverse_dispersion.fill_(30.0)  # hardly any noise but that of Poisson
        for parameter in (*model.posterior_mean.parameters(), model.posterior_variance.weight):
            parameter.zero_()
        model.posterior_variance.bias.fill_(1e4)
        batch["control_cells"] = batch["control_cells"] * 1e5
        counts = model.sample_counts(**batch, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0))
        posterior = model(**batch)
        latents = posterior.posterior_mean + posterior.posterior_variance.sqrt() * noise
        expected = numpy_forward(model, batch, latents.double().numpy())
    large = expected["mean"] > 1e4
    kept = (counts > 0).numpy()
    assert (large & kept).sum() > 30
    assert (np.abs(posterior.mean.numpy() / expected["mean"] - 1) > 0.2)[large].mean() > 0.5
    np.testing.assert_allclose(counts.numpy()[large & kept], expected["mean"][large & kept], rtol=0.06)


def test_counts_are_drawn_in_evaluation_mode_of_models_that_have_some():
    case = TestSCVI()
    batch = {key: value for key, value in case.batch().items() if key != "labels"}
    with pytest.raises(ValueError, match=r"needs evaluation mode, found training mode; call model\.eval\(\) first"):
        case.model().train().sample_counts(**batch)
    with pytest.raises(ValueError, match="state-scvi needs num_perturbations|SCVIConfig needs num_perturbations"):
        SCVIForPerturbation(SCVIConfig.from_preset("tiny"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"likelihood": "poisson"},
            r"likelihood='poisson' is not an option of SCVIConfig: expected one of \['nb', 'zinb'\]",
        ),
        ({"prediction": "mean"}, "prediction='mean' is not an option of SCVIConfig"),
        ({"library_size": 0}, "library_size must be a number above 0, or None, found 0"),
        (
            {"kl_warmup_steps": 3, "kl_warmup_epochs": 3},
            "set one of kl_warmup_epochs and kl_warmup_steps, found 3 and 3",
        ),
        ({"kl_warmup_steps": -1}, r"kl_warmup_steps must lie in \[0, inf\], found -1"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, found 0"),
        ({"gene_dim": 7}, "expected output_dim == input_dim, no gene_dim and nonnegative_output, found .* gene_dim=7"),
        ({"output_dim": 7}, "found output_dim=7, input_dim=2000"),
    ],
)
def test_contradictions_of_the_config_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        SCVIConfig.from_preset("tiny", num_perturbations=3, **fields)


# The objective


def test_terms_of_the_objective():
    case = TestSCVI()
    batch = case.batch()
    batch["cell_mask"] = torch.arange(5) < torch.tensor([[5], [3], [1]])
    batch["control_cells"][~batch["cell_mask"]] = 0
    for fields in ({"kl_warmup_steps": 8}, {"kl_warmup_steps": 8, "likelihood": "nb"}):
        model = case.model(**fields)
        objective = objective_for(model.config).train()
        objective.set_progress(2, 0.0)
        outputs = model(**batch)
        terms = {name: value.item() for name, value in objective(outputs, batch).items()}

        k, m = batch["labels"].numpy(), outputs.mean.detach().numpy()
        t = outputs.inverse_dispersion.detach().numpy()
        log_prob = stats.nbinom(t, t / (t + m)).logpmf(k)
        if not fields.get("likelihood"):
            d = outputs.dropout_logits.detach().numpy()
            log_prob = log_prob - np.logaddexp(0, d)
            log_prob = np.where(k == 0, np.logaddexp(-np.logaddexp(0, -d), log_prob), log_prob)
        q = torch.distributions.Normal(outputs.posterior_mean, outputs.posterior_variance.sqrt())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=-1).detach().numpy()
        mask = batch["cell_mask"].numpy()
        of_cells = {"reconstruction": -log_prob.sum(axis=-1), "kl": kl}
        expected = {n: np.mean([v[mask[i]].mean() for i, v in enumerate(of)]) for n, of in of_cells.items()}
        expected |= {"kl_weight": 0.25, "elbo": -(expected["reconstruction"] + expected["kl"])}
        expected["loss"] = expected["reconstruction"] + 0.25 * expected["kl"]
        assert terms == pytest.approx(expected, rel=1e-4)
        objective(outputs, batch)["loss"].backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        at_the_end = objective.eval()(outputs, batch)
        assert at_the_end["kl_weight"] == 1 and at_the_end["loss"].item() == pytest.approx(-expected["elbo"], rel=1e-4)


def test_the_weight_of_the_kl_divergence_rises_to_one():
    def weights(progress, **fields):
        case = TestSCVI()
        model, batch = case.model(**fields), case.batch()
        objective, found = objective_for(model.config).train(), []
        for step, epoch in progress:
            objective.set_progress(step, epoch)
            found.append(objective(model(**batch), batch)["kl_weight"].item())
        return found

    assert weights([(0, 0.0), (9, 100.0), (9, 400.0), (9, 900.0)]) == [0, 0.25, 1, 1]
    assert weights([(0, 5.0), (1, 5.0), (4, 0.0), (7, 0.0)], kl_warmup_steps=4) == [0, 0.25, 1, 1]
    assert weights([(0, 0.0)], kl_warmup_steps=0) == weights([(0, None)], kl_warmup_epochs=0) == [1]
    with pytest.raises(ValueError, match="kl_warmup_epochs=400 needs a stream's first look .* set kl_warmup_steps"):
        weights([(0, None)])


def test_control_cells_without_counts_stop_training():
    case = TestSCVI()
    model, batch = case.model(), case.batch()
    batch["cell_mask"] = torch.arange(5) < torch.tensor([[5], [3], [4]])
    batch["control_cells"][~batch["cell_mask"]] = 0
    objective = objective_for(model.config).train()
    assert torch.isfinite(objective(model(**batch), batch)["loss"])
    batch["control_cells"][0, 2:4] = 0
    with pytest.raises(
        ValueError, match="control cells without counts of the model's genes, found 2 in a batch; leave"
    ):
        objective(model(**batch), batch)


# Runs


def test_values_other_than_counts_are_refused_before_training(screen, tmp_path):  # noqa: F811
    case = TestSCVI()
    case.data = {}
    with pytest.raises(
        ValueError, match="trained on raw counts, found log1p .*normalize='counts_to_log1p'.* set normalize: none"
    ):
        train.main([str(case.run_yaml(screen, tmp_path))])
    case.data = {"input": "obsm/X_emb"}
    with pytest.raises(ValueError, match="trained on raw counts, found embedding .*input='obsm/X_emb'"):
        train.main([str(case.run_yaml(screen, tmp_path))])
    assert not (tmp_path / "run").exists()


def to_units(counts, total: float | None) -> np.ndarray:
    """Log1p expression computed by hand, from counts scaled over the given genes."""
    counts = np.asarray(counts.todense() if hasattr(counts, "todense") else counts, dtype=np.float64)
    return np.log1p(counts if total is None else counts / counts.sum(axis=1, keepdims=True) * total)


@pytest.mark.parametrize("library_size", [10_000, 800, None])
def test_units_from_training_to_evaluation(screen, tmp_path, library_size):  # noqa: F811
    case = TestSCVI()
    # Fewer genes than the file has: totals are those of the model's genes.
    case.data = {"input": "layers/counts", "normalize": "none", "genes": 25}
    case.model_section = {"library_size": library_size}
    metrics = train.main([str(case.run_yaml(screen, tmp_path))])
    folder, out, scores = tmp_path / "run", tmp_path / "out.h5ad", tmp_path / "scores.csv"
    settings = json.loads((folder / "processor_config.json").read_text())
    assert (settings["values"], settings["predicts"], settings["target_sum"]) == ("counts", "log1p", library_size)
    words = ["predict", "--model", folder, "--adata", screen, "--output", out, "--context", "type_3", "--quiet"]
    assert pertstate.cli.main([str(word) for word in words]) == 0
    words = ["evaluate", "--predicted", out, "--real", screen, "--train", screen, "--output", scores, "--quiet"]
    assert pertstate.cli.main([str(word) for word in words]) == 0

    real, predicted = ad.read_h5ad(screen), ad.read_h5ad(out)
    units = "unscaled counts" if library_size is None else f"{library_size} counts per cell"
    assert predicted.uns["pertstate"]["X"] == f"log1p expression ({units})"
    assert predicted.n_vars == 25 and predicted.X.min() >= 0
    counts = real[:, predicted.var_names].layers["counts"]
    values = pd.DataFrame(to_units(counts, library_size), index=real.obs_names)
    np.testing.assert_allclose(
        controls_of(predicted), values.loc[predicted.obs["control_barcode"]], rtol=1e-5, atol=1e-6
    )
    in_context = real.obs["cell_type"] == "type_3"
    base = values[in_context & (real.obs["perturbation"] == "control")].mean()
    table = pd.read_csv(scores).set_index(["perturbation", "method"])
    for name in ("pert_0", "pert_1", "pert_2"):
        truth = values[in_context & (real.obs["perturbation"] == name)].mean()
        guess = predicted.X[(predicted.obs["perturbation"] == name).to_numpy()].mean(axis=0, dtype=np.float64)
        assert table.loc[(name, "model"), "mae"] == pytest.approx(np.abs(guess - truth).mean(), rel=1e-4)
        pearson = np.corrcoef(guess - base, truth - base)[0, 1]
        assert table.loc[(name, "model"), "pearson"] == pytest.approx(pearson, rel=1e-4, abs=1e-6)
        assert table.loc[(name, "no change"), "mae"] == pytest.approx(np.abs(base - truth).mean(), rel=1e-4)
    # The mean change of the training contexts, in the same units, added to the control cells.
    change = [
        values[(real.obs["cell_type"] == c) & (real.obs["perturbation"] == "pert_0")].mean()
        - values[(real.obs["cell_type"] == c) & (real.obs["perturbation"] == "control")].mean()
        for c in ("type_0", "type_1", "type_2")
    ]
    moved = np.maximum(values[in_context & (real.obs["perturbation"] == "control")] + np.mean(change, axis=0), 0).mean()
    truth = values[in_context & (real.obs["perturbation"] == "pert_0")].mean()
    assert table.loc[("pert_0", "perturbation mean"), "mae"] == pytest.approx(np.abs(moved - truth).mean(), rel=1e-4)
    # Training logs figures of the test split on the same scale. Its control cells are a draw of those that were used here.
    assert metrics["test_no_change_mae"] == pytest.approx(table.loc[("mean", "no change"), "mae"], rel=0.3)

    # In memory, the processor says the same.
    processor = StateProcessor.from_pretrained(folder)
    sentences = processor(real, perturbation="pert_0", context="type_3")
    model = SCVIForPerturbation.from_pretrained(folder).eval()
    with torch.inference_mode():
        decoded = processor.decode(model(**sentences), sentences)
    np.testing.assert_allclose(
        decoded.layers["control"], values.loc[decoded.obs["control_barcode"]], rtol=1e-5, atol=1e-6
    )
    assert decoded.uns["pertstate"]["X"] == predicted.uns["pertstate"]["X"]


def test_cells_drawn_by_predict_have_whole_counts(screen, tmp_path, capsys):  # noqa: F811
    case = TestSCVI()
    train.main([str(case.run_yaml(screen, tmp_path))])

    def predict(name: str, *flags) -> ad.AnnData:
        words = [
            "predict",
            "--model",
            tmp_path / "run",
            "--adata",
            screen,
            "--output",
            tmp_path / name,
            "--quiet",
            *flags,
        ]
        assert pertstate.cli.main([str(word) for word in words]) == 0
        return ad.read_h5ad(tmp_path / name)

    first, again, other = (predict(f"{i}.h5ad", "--sample-counts", seed) for i, seed in enumerate((4, 4, 5)))
    np.testing.assert_array_equal(first.X, again.X)
    assert (first.X != other.X).any() and (first.X == 0).mean() > 0.1
    assert first.uns["pertstate"]["X"] == "log1p expression (10000 counts per cell), of counts drawn with seed 4"
    np.testing.assert_allclose(np.expm1(first.X.astype(np.float64)).sum(axis=1), 10_000, rtol=1e-4)
    # In each cell, all values are multiples of one number, that of a single count.
    counts = np.expm1(first.X[0].astype(np.float64)) / np.expm1(first.X[0][first.X[0] > 0].min())
    assert np.abs(counts - counts.round()).max() < 1e-2 * counts.max() and (first.X.std() > predict("m.h5ad").X.std())

    case = TestSCVI()
    case.model_type, case.data = "state-embed-sum", {}
    train.main([str(case.run_yaml(screen, tmp_path)), "--overwrite"])
    words = [
        "predict",
        "--model",
        tmp_path / "run",
        "--adata",
        screen,
        "--output",
        tmp_path / "x.h5ad",
        "--sample-counts",
        1,
    ]
    assert pertstate.cli.main([*map(str, words), "--quiet"]) == 1
    assert "state-embed-sum predicts no distribution of counts" in capsys.readouterr().err
    assert not (tmp_path / "x.h5ad").exists()


def test_a_store_of_counts_gives_the_same_run(screen, tmp_path):  # noqa: F811
    case = TestSCVI()
    config = case.run_yaml(screen, tmp_path)
    expected = train.main([str(config)])
    words = ["prepare", "--config", config, "--output", tmp_path / "store", "--quiet"]
    assert pertstate.cli.main([str(word) for word in words]) == 0
    found = train.main([str(config), "--store", str(tmp_path / "store"), "--output_dir", str(tmp_path / "stored")])
    timing = ("runtime", "per_second")
    assert {k: v for k, v in found.items() if not k.endswith(timing)} == {
        k: v for k, v in expected.items() if not k.endswith(timing)
    }
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("run", "stored")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_learns_held_out_pairs_of_a_simulated_screen(tmp_path):
    """
    The ELBO rises. Pairs of a context and a perturbation that were not seen are predicted better than by no change, in the
    error of the mean and, for drawn cells, in energy distance. Their predicted change points the right way.
    """
    adata = simulate_screen(
        num_contexts=6,
        num_perturbations=4,
        num_genes=60,
        cells_per_group=150,
        num_batches=1,
        num_lineages=1,
        effect=1.5,
        seed=3,
    )
    adata.write_h5ad(tmp_path / "screen.h5ad")
    held = {"type_0": "pert_1", "type_3": "pert_2", "type_4": "pert_0"}
    splits = ["[datasets]", f's = "{tmp_path}/screen.h5ad"', "[training]", 's = "train"']
    for context, name in held.items():
        splits += [f'[fewshot."s.{context}"]', f'test = ["{name}"]']
    (tmp_path / "splits.toml").write_text("\n".join(splits))
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "data": {"splits": str(tmp_path / "splits.toml"), "normalize": "none"},
                "model": {"model_type": "state-scvi", "preset": "tiny", "kl_warmup_steps": 100, "likelihood": "nb"},
                "training": {
                    "output_dir": str(tmp_path / "run"),
                    "max_steps": 1300,
                    "learning_rate": 3e-3,
                    "lr_decay_epochs": None,
                    "logging_steps": 65,
                    "save_strategy": "no",
                    "disable_tqdm": True,
                    "use_cpu": True,
                },
            }
        )
    )
    logged, log = [], StateTrainer.log

    def spy(trainer, logs, start_time=None):
        log(trainer, logs, start_time)
        logged.append(dict(logs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateTrainer, "log", spy)
        metrics = train.main([str(tmp_path / "run.yaml")])
    elbo = [logs["elbo"] for logs in logged if "elbo" in logs]
    assert len(elbo) == 20 and np.mean(elbo[-5:]) > np.mean(elbo[5:10]) > np.mean(elbo[:2])
    assert metrics["test_pearson"] > 0.45 and metrics["test_mae"] < 0.85 * metrics["test_no_change_mae"]

    out = tmp_path / "drawn.h5ad"
    words = ["predict", "--model", tmp_path / "run", "--adata", tmp_path / "screen.h5ad", "--output", out]
    assert pertstate.cli.main([str(word) for word in [*words, "--quiet", "--sample-counts", 0]]) == 0
    drawn = ad.read_h5ad(out)
    keep = [held.get(c) == p for c, p in zip(drawn.obs["cell_type"], drawn.obs["perturbation"])]
    drawn[keep].write_h5ad(out)
    words = ["evaluate", "--predicted", out, "--real", tmp_path / "screen.h5ad", "--train", tmp_path / "screen.h5ad"]
    words += ["--output", tmp_path / "scores.csv", "--quiet"]
    assert pertstate.cli.main([str(word) for word in words]) == 0
    table = pd.read_csv(tmp_path / "scores.csv")
    energy = table[table["context"] == "mean"].set_index("method")["energy"]
    assert table["context"].nunique() == 4 and energy["model"] < 0.5 * energy["no change"]
