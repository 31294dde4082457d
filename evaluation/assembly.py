"""Puts the results of single groups together: table, averages, verdict, and marks of groups that were trained on."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from pertstate.base.messages import counted, some
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.record import RunRecord
from pertstate.evaluation.confidence import confidence_worth
from pertstate.evaluation.expected_error import expected_error_worth, expected_maes
from pertstate.evaluation.further_metrics import discrimination
from pertstate.evaluation.metrics import CEILING, CEILING_MODEL, MODEL
from pertstate.evaluation.scores import Scores
from pertstate.evaluation.scoring import Group, GroupResult, methods_of, metrics_of
from pertstate.evaluation.verdict import averages_of, verdict_of


# The largest number of cells of each kind that are kept for pictures, over all groups.
KEPT_CELLS = 1000
# A note says so if the shares of zeros of predicted and real values differ by so much.
ZEROS_DIFFER = 0.1
_COUNTS = ("predicted_cells", "real_cells", "control_cells")


def samples_of(groups: int) -> int:
    """How many cells of each kind a group keeps for pictures, if there are so many groups."""
    return min(50, KEPT_CELLS // max(1, groups))


def scores_of(
    results: list[GroupResult],
    features: list[str],
    record: RunRecord | None,
    name: str,
    notes: list[str] | None = None,
    seed: int = 0,
    include_seen: bool = False,
    seen: Callable[[Group], str] | None = None,
    is_ceiling: bool = False,
    settings: dict | None = None,
    intervals: ChangeIntervals | None = None,
) -> Scores:
    """
    The scores of some groups.

    Args:
        results (`list[GroupResult]`): the result of each group.
        features (`list[str]`): names of the features.
        record ([`RunRecord`], *optional*): what the model was trained on.
        name (`str`): what the verdict calls the model.
        notes (`list[str]`, *optional*): notes that come before those made here.
        seed (`int`): seed of the resamplings.
        include_seen (`bool`): average over groups that were trained on, too.
        seen (`Callable`, *optional*): says how a group was trained on, in a text that is empty if it was not. By default the
            record says it.
        is_ceiling (`bool`): the model was given the real cells.
        settings (`dict`, *optional*): settings of the evaluation, to be kept with the scores.
        intervals ([`ChangeIntervals`], *optional*): of the scored features, from the record; they say which error is to be expected.
    """
    notes = list(notes or [])
    of_record = (lambda group: record.seen(*group)) if record is not None else (lambda group: "")
    how = {result.group: (seen or of_record)(result.group) for result in results}
    averaged = [result for result in results if include_seen or not how[result.group]]
    marked = [group for group in how if how[group]]
    if marked:
        listed = "; ".join(
            f"{context} / {perturbation}: {how[d, context, perturbation]}" for d, context, perturbation in marked[:5]
        )
        notes.append(
            f"{len(marked)} of {len(results)} scored groups were seen in training ({listed}): "
            + ("they are in the averages, as was asked for" if include_seen else "they are left out of the averages")
        )
    if record is not None:
        # Groups of a file that is scored by itself are of no dataset of the run.
        notes += record.warnings({(dataset or None, context, perturbation) for dataset, context, perturbation in how})
        scored = {perturbation for *_, perturbation in how}
        if found := record.indistinguishable(scored):
            notes.append(
                f"the training cells do not tell the change of {len(found)} of {counted(len(scored), 'scored perturbation')} from "
                f"none: {some(found)}"
            )
    _discriminate(results, features)
    averages = averages_of(averaged, seed)
    notes += _of_zeros(averages)
    methods, metrics = methods_of(results), metrics_of(results)
    table = pd.DataFrame([row for result in results for row in _rows(result, methods, metrics, how[result.group])])
    if is_ceiling:
        notes.append(f"the figures of {CEILING_MODEL!r} do not score a prediction: it was given the real cells")
        for frame in (table, averages):
            frame["method"] = frame["method"].replace(MODEL, CEILING_MODEL)
    if record is not None and record.calibration is not None and table["confidence"].notna().any():
        table["expected_energy"] = record.calibration.expected(table["confidence"].to_numpy(dtype=np.float64))
    if intervals is not None and len(intervals.spread) == len(features) and not is_ceiling:
        own = [result for result in results if MODEL in result.figures]
        table["expected_mae"] = np.nan
        table.loc[table["method"] == MODEL, "expected_mae"] = expected_maes(own, intervals)
    worth = [found for found in (confidence_worth(table, seed), expected_error_worth(table, seed)) if found is not None]
    shown = [name for name in ("control", "observed", "predicted") if all(name in result.means for result in results)]
    return Scores(
        table=table,
        averages=averages,
        verdict=" ".join([verdict_of(averaged, name, seed), *map(str, worth)]),
        notes=list(dict.fromkeys(notes)),
        genes=list(features),
        groups=[result.group for result in results],
        changes={name: np.stack([result.means[name] for result in results]) for name in shown},
        cells=_samples(results, shown),
        settings={"seed": seed, **(settings or {})},
        record={} if record is None else record.to_dict(),
        results=averaged,
    )


def _discriminate(results: list[GroupResult], features: list[str]):
    """Find the discrimination score of each method, over all groups of a context, where changes were kept for it."""
    of_context: dict[tuple[str, str, str], list[GroupResult]] = {}
    for result in results:
        for method in result.changes:
            of_context.setdefault((*result.group[:2], method), []).append(result)
    for (*_, method), group in of_context.items():
        observed = np.stack([result.means["observed"] - result.means["control"] for result in group])
        predicted = np.stack([result.changes[method] for result in group])
        found = discrimination(predicted, observed, [result.group[2] for result in group], features)
        for result, score in zip(group, found):
            result.further[method]["discrimination"] = np.array([score])


def _of_zeros(averages: pd.DataFrame) -> list[str]:
    """A note if predicted values are 0 more or less often than real ones, so that tests of genes mislead."""
    share = averages[averages["metric"] == "zeros"].set_index("method")["value"]
    if not {MODEL, CEILING} <= set(share.index) or abs(share[MODEL] - share[CEILING]) < ZEROS_DIFFER:
        return []
    return [
        f"{share[MODEL]:.0%} of the predicted values are 0, and {share[CEILING]:.0%} of the real ones: p-values of tests on "
        "predicted cells mislead; read the changes of means"
    ]


def _rows(result: GroupResult, methods: list[str], metrics: list[str], seen: str) -> list[dict]:
    dataset, context, perturbation = result.group
    rows = []
    for method in methods:
        if method == MODEL and method not in result.figures:
            continue
        figures = {metric: result.of(method, metric) for metric in metrics}
        rows.append(
            {
                "dataset": dataset,
                "context": context,
                "perturbation": perturbation,
                "method": method,
                **{metric: np.nan if of is None else float(of[0]) for metric, of in figures.items()},
                "reason": result.reasons.get(method, ""),
                "seen": "" if method == CEILING else seen,
                **{count: float(result.numbers.get(count, np.nan)) for count in _COUNTS},
                "confidence": np.nan if result.confidence is None or method != MODEL else result.confidence,
            }
        )
    return rows


def _samples(results: list[GroupResult], names: list[str]) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        parts = [result.samples[name] for result in results if name in result.samples]
        if parts and len(parts) == len(results):
            found[name] = np.concatenate(parts)
            found[f"{name}_group"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return found
