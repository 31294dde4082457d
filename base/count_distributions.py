"""Distributions of counts: negative binomial and zero-inflated negative binomial, exact at their limits."""

import math

import torch
from torch.nn.functional import softplus


# From this inverse dispersion on, Stirling's series is exact to the last bits of float64, and no longer the difference of
# two huge log-gammas.
_STIRLING_FROM = 10.0


def _stirling_rest(x: torch.Tensor) -> torch.Tensor:
    """`lgamma(x) - ((x - 1/2) log x - x + log(2 pi) / 2)` for x from 10: Abramowitz & Stegun 6.1.41."""
    y = 1 / x
    square = y * y
    return y * (1 / 12 + square * (-1 / 360 + square * (1 / 1260 + square * (-1 / 1680 + square / 1188))))


def _digamma_rest(x: torch.Tensor) -> torch.Tensor:
    """`digamma(x) - (log x - 1 / (2 x))` for x from 10: Abramowitz & Stegun 6.3.18."""
    square = 1 / (x * x)
    return -square * (1 / 12 + square * (-1 / 120 + square * (1 / 252 + square * (-1 / 240 + square / 132))))


def _log_ratio(counts: torch.Tensor, mean: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """`log((theta + counts) / (theta + mean))` where theta is finite and above 0, precise also where the ratio is near 1."""
    change = (counts - mean) / (theta + mean)
    near = change.abs() < 0.5
    return torch.where(near, torch.log1p(change), torch.log((theta + counts) / (theta + mean)))


class _NegativeBinomial(torch.autograd.Function):
    """
    The log-probability and its derivatives, written out, so that only the three inputs are kept for the backward pass, and
    neither pass subtracts infinity from infinity on its way to a finite value. With k counts, mean m and inverse dispersion t,

        log p = lgamma(k + t) - lgamma(t) - lgamma(k + 1) + t log(t / (t + m)) + k log(m / (t + m))
        d log p / dm = (k / m - 1) / (1 + m / t)
        d log p / dt = digamma(k + t) - digamma(t) + log(t / (t + m)) + (m - k) / (t + m)

    For t from 10, Stirling's series for both log-gammas turns the first into

        (t + k) log((t + k) / (t + m)) - log(1 + k / t) / 2 + k log m - k - lgamma(k + 1) + rest(k + t) - rest(t),

    whose limit at infinity is the Poisson distribution's k log m - m - lgamma(k + 1).
    """

    @staticmethod
    def forward(ctx, k: torch.Tensor, mean: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(k, mean, theta)
        large = theta >= _STIRLING_FROM
        t = torch.where(large, 1.0, theta)
        log_prob = torch.lgamma(k + t) - torch.lgamma(t) + t * (t.log() - (t + mean).log()) - k * (t + mean).log()
        t = torch.where(large, theta, _STIRLING_FROM)
        change = torch.where(t.isinf(), k - mean, (t + k) * _log_ratio(k, mean, t))
        stirling = change - 0.5 * torch.log1p(k / t) - k + _stirling_rest(k + t) - _stirling_rest(t)
        log_prob = torch.where(large, stirling, log_prob) + torch.xlogy(k, mean) - torch.lgamma(k + 1)
        # At an inverse dispersion of 0 all mass lies at 0 counts.
        return torch.where(theta == 0, torch.where(k == 0, 0.0, -torch.inf), log_prob)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        k, mean, theta = ctx.saved_tensors
        grad_mean = grad_theta = None
        if ctx.needs_input_grad[1]:
            grad_mean = grad * torch.where(k == 0, -1.0, k / mean - 1) / (1 + mean / theta)
        if ctx.needs_input_grad[2]:
            large = theta >= _STIRLING_FROM
            t = torch.where(large, 1.0, theta)
            slope = torch.digamma(k + t) - torch.digamma(t) + t.log() - (t + mean).log() + (mean - k) / (t + mean)
            t = torch.where(large, theta, _STIRLING_FROM)
            stirling = _log_ratio(k, mean, t) - (k - mean) / (t + mean) + k / (k + t) / (2 * t)
            stirling = stirling + _digamma_rest(k + t) - _digamma_rest(t)
            grad_theta = grad * torch.where(large, stirling.masked_fill(t.isinf(), 0.0), slope)
        return None, grad_mean, grad_theta


def negative_binomial_log_prob(
    counts: torch.Tensor, mean: torch.Tensor, inverse_dispersion: torch.Tensor
) -> torch.Tensor:
    """
    Log-probability of counts under the negative binomial distribution of a mean m and an inverse dispersion t, whose
    variance is `m + m^2 / t`: scipy's `nbinom(t, t / (t + m))`.

    Args:
        counts (`torch.Tensor`): whole numbers from 0. No gradient flows to them.
        mean (`torch.Tensor`): from 0. At 0 all mass lies at 0 counts.
        inverse_dispersion (`torch.Tensor`): from 0; infinity is the Poisson distribution, at 0 all mass lies at 0 counts.

    Returns:
        `torch.Tensor` of the shape that the arguments, float32 or float64, broadcast to.

    Example:
    ```python
    >>> negative_binomial_log_prob(torch.tensor([0.0, 3.0]), torch.tensor(2.0), torch.tensor(1.0))
    tensor([-1.0986, -2.3150])
    ```
    """
    return _NegativeBinomial.apply(*torch.broadcast_tensors(counts, mean, inverse_dispersion))


def zero_inflated_negative_binomial_log_prob(
    counts: torch.Tensor, mean: torch.Tensor, inverse_dispersion: torch.Tensor, dropout_logits: torch.Tensor
) -> torch.Tensor:
    """
    Log-probability of counts that are 0 with the probability `sigmoid(dropout_logits)`, and else follow the negative
    binomial distribution (Lopez et al. 2018, Nature Methods 15, eq. of the generative model).

    Args:
        counts, mean, inverse_dispersion (`torch.Tensor`): see [`negative_binomial_log_prob`].
        dropout_logits (`torch.Tensor`): log-odds of the additional zeros.

    Returns:
        `torch.Tensor` of the shape that the arguments broadcast to.
    """
    observed = negative_binomial_log_prob(counts, mean, inverse_dispersion) - softplus(dropout_logits)
    return torch.where(counts == 0, torch.logaddexp(-softplus(-dropout_logits), observed), observed)


def negative_binomial_mean_log1p(
    mean: torch.Tensor, inverse_dispersion: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """
    The mean of `log1p(scale * counts)`, counts following the distribution of [`negative_binomial_log_prob`].

    With `log(1 + x) = integral (1 - exp(-x t)) exp(-t) / t dt` from 0 to infinity (Frullani), the mean is that integral of
    1 - M, M being the distribution's known `E exp(-scale t counts)`. The trapezoidal rule over log t gives it to 1e-5 in
    33 steps.

    Args:
        mean, inverse_dispersion (`torch.Tensor`): of that distribution; finite and above 0 (a mean of 0 gives 0).
        scale (`torch.Tensor`): what counts are multiplied by, finite, from 0.

    Returns:
        `torch.Tensor` of the shape that the arguments broadcast to.
    """
    step, first, steps = 0.75, -21.0, 33
    # Before the first step the integrand is exponential in log t, and the rule's sum a geometric series.
    total = mean * scale * (math.exp(first) * step / math.expm1(step))
    for i in range(steps):
        t = math.exp(first + i * step)
        log_m = -inverse_dispersion * torch.log1p(mean * -torch.expm1(-scale * t) / inverse_dispersion)
        total = total - torch.expm1(log_m) * (step * math.exp(-t))
    return total


def sample_negative_binomial(
    mean: torch.Tensor, inverse_dispersion: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Counts drawn from the distribution of [`negative_binomial_log_prob`], as Poisson counts of Gamma rates.

    Args:
        mean, inverse_dispersion (`torch.Tensor`): of that distribution; both above 0.
        generator (`torch.Generator`, *optional*): on their device; the same state gives the same counts.

    Returns:
        `torch.Tensor` of the shape that the arguments broadcast to and their type.
    """
    mean, theta = torch.broadcast_tensors(mean, inverse_dispersion)
    finite = torch.where(theta.isinf(), 1.0, theta)
    noise = torch._standard_gamma(finite, generator=generator) / finite
    return torch.poisson(torch.where(theta.isinf(), mean, mean * noise), generator=generator)


def sample_zero_inflated_negative_binomial(
    mean: torch.Tensor,
    inverse_dispersion: torch.Tensor,
    dropout_logits: torch.Tensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Counts drawn from the distribution of [`zero_inflated_negative_binomial_log_prob`]; see [`sample_negative_binomial`]."""
    mean, inverse_dispersion, dropout_logits = torch.broadcast_tensors(mean, inverse_dispersion, dropout_logits)
    counts = sample_negative_binomial(mean, inverse_dispersion, generator)
    return counts * torch.bernoulli(torch.sigmoid(-dropout_logits), generator=generator)


__all__ = [
    "negative_binomial_log_prob",
    "negative_binomial_mean_log1p",
    "sample_negative_binomial",
    "sample_zero_inflated_negative_binomial",
    "zero_inflated_negative_binomial_log_prob",
]
