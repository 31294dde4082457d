"""Averages over groups with their intervals, and what follows from them in words."""

import numpy as np
import pandas as pd

from pertstate.base.messages import counted
from pertstate.evaluation.bootstrap import interval, resampled_average
from pertstate.evaluation.metrics import CEILING, HIGHER_IS_BETTER, METRICS, MODEL, NAMES
from pertstate.evaluation.scoring import GroupResult, methods_of, metrics_of


def averages_of(results: list[GroupResult], seed: int = 0) -> pd.DataFrame:
    """
    The average of each method and metric over groups, with a 95 % interval by the bootstrap over groups and, within each,
    over cells. See [`Scores`] for the columns.
    """
    chosen = _resampled_groups(results, _draws(results), seed)
    rows, values = [], {}
    for method in methods_of(results):
        for metric in metrics_of(results):
            figures = _figures(results, method, metric)
            if not np.isfinite(figures[:, 0]).any():
                continue
            draws = resampled_average(figures, chosen)
            low, high = interval(draws)
            values[method, metric] = draws[0]
            number = int(np.isfinite(figures[:, 0]).sum())
            rows.append(
                {"method": method, "metric": metric, "value": draws[0], "low": low, "high": high, "groups": number}
            )
    for row in rows:
        row["share"] = _share(values, row["metric"]) if row["method"] == MODEL else np.nan
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "groups", "share"])


def best_baseline(values: dict[tuple[str, str], float], metric: str) -> str | None:
    """The baseline with the best average of a metric. None if no baseline has one."""
    found = {method: value for (method, of), value in values.items() if of == metric and method not in (MODEL, CEILING)}
    if not found:
        return None
    return (max if HIGHER_IS_BETTER[metric] else min)(found, key=lambda method: found[method])


def _share(values: dict[tuple[str, str], float], metric: str) -> float:
    """
    How far the model goes from the best baseline (0) to the ceiling (1). NaN if one of the three is missing, the ceiling is not
    better than the baseline, or neither high nor low values are better.
    """
    if metric not in HIGHER_IS_BETTER:
        return float("nan")
    best, ceiling = best_baseline(values, metric), values.get((CEILING, metric))
    if best is None or ceiling is None or (MODEL, metric) not in values:
        return float("nan")
    way = ceiling - values[best, metric]
    ahead = way > 0 if HIGHER_IS_BETTER[metric] else way < 0
    return float((values[MODEL, metric] - values[best, metric]) / way) if ahead else float("nan")


def verdict_of(results: list[GroupResult], name: str = "the model", seed: int = 0) -> str:
    """
    A text that compares the model with each baseline, metric by metric, by the paired bootstrap. It says "better" or "worse"
    only if the 95 % interval of the difference, over the groups that both have, leaves out 0.
    """
    if not results:
        return "No verdict: no group is left that the model was not trained on."
    if not any(MODEL in result.figures for result in results):
        return "No verdict: no model was scored, only baselines."
    chosen = _resampled_groups(results, _draws(results), seed)
    said = [f"In {NAMES[metric]}: {_of_metric(results, metric, chosen)}." for metric in METRICS]
    number = f"{len(results)} group{'s' if len(results) > 1 else ''}"
    return " ".join([f"Verdict on {name}, from {number}.", *said])


def _of_metric(results: list[GroupResult], metric: str, chosen: np.ndarray) -> str:
    model = _figures(results, MODEL, metric)
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    better: list[tuple[float, float, float, str]] = []
    worse: list[tuple[float, float, float, str]] = []
    alike: list[tuple[float, float, float, str]] = []
    unknown: list[tuple[float, float, float, str]] = []
    for method in methods_of(results):
        if method in (MODEL, CEILING):
            continue
        draws = resampled_average(sign * (model - _figures(results, method, metric)), chosen)
        if not np.isfinite(draws[0]):
            continue
        low, high = interval(draws)
        kind = unknown if low != low else better if low > 0 else worse if high < 0 else alike
        kind.append((float(draws[0]), low, high, method))
    if not (better or worse or alike):
        return "no verdict, as there are too few cells for an interval" if unknown else "no baseline to compare with"
    parts = []
    if worse:
        parts.append("worse than " + ", ".join(_named(found, sign) for found in sorted(worse)))
    if alike:
        parts.append("not distinguishable from " + ", ".join(method for *_, method in sorted(alike)))
    if better and not (worse or alike or unknown):
        every = "every baseline" if len(better) > 1 else "the one baseline"
        parts.append(f"better than {every}, the nearest of which is {_named(min(better), sign)}")
    elif better:
        parts.append("better than " + ", ".join(method for *_, method in sorted(better)))
    if unknown:
        parts.append("no interval of the difference from " + ", ".join(method for *_, method in unknown))
    return "; ".join(parts)


def _named(found: tuple[float, float, float, str], sign: int) -> str:
    """A baseline, with the model's figure minus its own, and the interval of that difference."""
    difference, low, high, method = found
    # Plus 0: a difference of 0 has no sign.
    ends = sorted((sign * low + 0.0, sign * high + 0.0))
    return f"{method} ({sign * difference + 0.0:+.4f}, 95 % interval {ends[0]:+.4f} to {ends[1]:+.4f})"


def _figures(results: list[GroupResult], method: str, metric: str) -> np.ndarray:
    """A metric of a method in each group, `(groups, 1 + draws)`. NaN in groups in which the method has no figure."""
    found = np.full((len(results), 1 + _draws(results)), np.nan)
    for row, result in zip(found, results):
        of_group = result.of(method, metric)
        if of_group is not None:
            row[:] = of_group
    return found


def _draws(results: list[GroupResult]) -> int:
    return len(next(iter(results[0].figures.values()))) - 1 if results else 0


def _resampled_groups(results: list, draws: int, seed: int) -> np.ndarray:
    """The groups of each resampling, `(draws, groups)`."""
    return np.random.default_rng([seed, 1]).integers(0, max(1, len(results)), (draws, len(results)))


def compare(first: list[GroupResult], second: list[GroupResult], names: tuple[str, str], seed: int = 0) -> str:
    """A text that compares two models on the groups that both predicted, metric by metric, by the paired bootstrap."""
    of_second = {result.group: result for result in second if MODEL in result.figures}
    pairs = [(a, of_second[a.group]) for a in first if a.group in of_second and MODEL in a.figures]
    if not pairs:
        return f"{names[0]} and {names[1]} have no group in common."
    chosen = _resampled_groups(pairs, _draws(first), seed)
    said = []
    for m, metric in enumerate(METRICS):
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        difference = np.stack([sign * (a.figures[MODEL][:, m] - b.figures[MODEL][:, m]) for a, b in pairs])
        draws = resampled_average(difference, chosen)
        low, high = interval(draws)
        word = "not distinguishable from" if not (low > 0 or high < 0) else "better than" if low > 0 else "worse than"
        said.append(f"In {NAMES[metric]}: {word} {_named((float(draws[0]), low, high, names[1]), sign)}.")
    return " ".join([f"Verdict on {names[0]}, from {counted(len(pairs), 'group')}.", *said])


def side_by_side(models: dict[str, list[GroupResult]], seed: int = 0) -> pd.DataFrame:
    """
    Several models on the same groups in the same order, each beside the first by the paired bootstrap. See
    [`~pertstate.evaluation.scores.compare_models`] for the columns.
    """
    first = next(iter(models))
    chosen = _resampled_groups(models[first], _draws(models[first]), seed)
    rows = []
    for metric in METRICS:
        own = _figures(models[first], MODEL, metric)
        for name, results in models.items():
            figures = _figures(results, MODEL, metric)
            value, difference = (resampled_average(of, chosen) for of in (figures, figures - own))
            ends = (np.nan, np.nan) if name == first else interval(difference)
            rows.append(
                {
                    "metric": metric,
                    "model": name,
                    "value": value[0],
                    **dict(zip(("low", "high"), interval(value))),
                    "groups": int(np.isfinite(figures[:, 0]).sum()),
                    "difference": np.nan if name == first else difference[0] + 0.0,
                    **dict(zip(("difference_low", "difference_high"), ends)),
                    "beside": "" if name == first else _beside(*ends, metric),
                }
            )
    return pd.DataFrame(rows)


def _beside(low: float, high: float, metric: str) -> str:
    """What the interval of a difference allows to say."""
    if low != low:
        return "no interval"
    if not (low > 0 or high < 0):
        return "not distinguishable"
    return "better" if (low > 0) == HIGHER_IS_BETTER[metric] else "worse"
