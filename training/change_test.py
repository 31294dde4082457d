"""Whether training cells of a perturbation differ from their controls by more than chance: a permutation test."""

from functools import lru_cache

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from pertstate.base.cell_ids import order_of
from pertstate.base.constants import Split
from pertstate.base.messages import counted, some
from pertstate.base.origin import told_from_none
from pertstate.data.cells import Cells
from pertstate.data.training_sentences import TrainingSentences
from pertstate.evaluation.bootstrap import generator_of
from pertstate.evaluation.group_scores import scored_cells


# Relabellings of each perturbation, and the largest number of cells of each kind in a stratum: more would cost time.
PERMUTATIONS, MAX_CELLS = 300, 1000
# Components of the covariance of control cells.
COMPONENTS = 50
_SHOWN = 10

Rows = list[tuple[int, int]]


def change_tests(
    cells: Cells, features, control: str, part: int = 0, parts: int = 1, seed: int = 0
) -> dict[str, float]:
    r"""
    Test for each perturbation that has training cells whether these are a random draw from its control cells.

    The statistic is a regularised Hotelling's T^2 (Chen, Paul, Prentice & Wang 2011) of the mean change, in the units of
    predictions,

        T = d' (C + l I)^-1 d,   d = sum_s w_s (mean perturbed cell - mean control cell)_s,   w_s = n_s m_s / (n_s + m_s)

    over strata s with n_s perturbed and m_s control cells. A stratum is a batch of a (dataset, context), or all of the (dataset,
    context) where there are no batches, or none has cells of both kinds. C is the covariance of control cells within contexts,
    of which the leading components are taken, and l their mean variance over genes. Labels of cells are permuted within
    strata (Fisher 1935; Pitman 1937).

    Many perturbations need p-values smaller than one in the number of permutations, so the tail is that of the Pearson type
    III distribution with the moments of the permuted statistics (Mielke & Berry 2007; Minas & Montana 2014). Of its skewness,
    the larger one is taken of that of the permuted statistics and that of a scaled chi-squared distribution with their
    mean and variance.

    Args:
        cells ([`Cells`]): training cells and control cells.
        features (of shape `(cells, features)`): their values in the units of predictions; `features[rows]` gives an array.
        control (`str`): the perturbation of control cells.
        part, parts (`int`): test this share of the perturbations; together the shares are all of them.
        seed (`int`): seed of the permutations.

    Returns:
        `dict[str, float]`: perturbation to its p-value. Perturbations without control cells are not in it.
    """
    strata = _strata(cells, control)
    if not strata:
        return {}  # control cells alone

    def drawn(spans: Rows) -> np.ndarray:
        rows = np.concatenate([np.arange(*span) for span in spans])
        ids = None if cells.ids is None else cells.ids(rows)
        rows = np.sort(rows[order_of(ids, len(rows), seed)[:MAX_CELLS]])
        return np.asarray(features[rows], dtype=np.float32)

    # The perturbations of a context have the same control cells.
    controls = lru_cache(maxsize=32)(lambda spans: drawn([*spans]))
    spread = _Spread(
        [controls(of) for of in dict.fromkeys(tuple(of) for name in sorted(strata) for _, of in strata[name])]
    )
    return {
        name: _p_value(
            [(drawn(own), controls(tuple(of))) for own, of in strata[name]], spread, generator_of(seed, name)
        )
        for name in sorted(strata)[part::parts]
    }


def gather_tests(data: TrainingSentences, decoded: bool, accelerator: Accelerator) -> dict[str, float]:
    """
    The adjusted p-values of all perturbations with training cells, the same on every process; see [`change_tests`] and
    [`adjusted`]. Empty where no training cells are at hand.

    Args:
        decoded (`bool`): whether what is predicted are decoded genes.
    """
    cells, processor = data.training_cells(), data.processor
    if cells is None:
        return {}
    features = scored_cells(cells, processor, decoded)
    own = change_tests(cells, features, processor.control, accelerator.process_index, accelerator.num_processes)
    return adjusted({name: p for found in gather_object([own]) for name, p in found.items()})


def describe_tests(tests: dict[str, float]) -> str:
    """How many perturbations have a change that is more than chance, and the names of a few, for the log of a run."""
    told, other = told_from_none(tests)
    line = f"{len(told)} of {counted(len(tests), 'perturbation')} changed in training by more than chance explains"
    line += f": {some(told, _SHOWN)}" if told else ""
    return line + (f"; predictions of the others may be noise: {some(other, _SHOWN)}" if other else "")


def adjusted(p_values: dict[str, float]) -> dict[str, float]:
    """
    The p-values of perturbations, adjusted so that those up to a level have at most this expected share of false ones
    (Benjamini & Hochberg 1995), to three digits.
    """
    if not p_values:
        return {}
    # scipy.stats has this and the distribution below, and takes a quarter of a second to import.
    values = np.array([*p_values.values()])
    order, number = np.argsort(values), len(values)
    found = np.empty(number)
    found[order] = np.minimum.accumulate((values[order] * number / np.arange(1, number + 1))[::-1])[::-1]
    return {name: float(f"{min(value, 1):.3g}") for name, value in zip(p_values, found)}


def _strata(cells: Cells, control: str) -> dict[str, list[tuple[Rows, Rows]]]:
    """For each perturbation, the rows of its training cells and those of their control cells, stratum by stratum."""
    groups = cells.groups
    batches = groups["batch"].astype(str) if "batch" in groups else np.full(len(groups), "")
    spans: dict[tuple[str, str], dict[str, dict[str, Rows]]] = {}
    columns = (groups[name] for name in ("dataset", "context", "perturbation", "split", "start", "stop"))
    for dataset, context, name, split, start, stop, batch in zip(*columns, batches):
        if split == Split.TRAIN or name == control:
            of_name = spans.setdefault((str(dataset), str(context)), {}).setdefault(str(name), {})
            of_name.setdefault(str(batch), []).append((int(start), int(stop)))
    found: dict[str, list[tuple[Rows, Rows]]] = {}
    for _, of_place in sorted(spans.items()):
        controls = of_place.pop(control, {})
        for name, own in of_place.items() if controls else ():
            pairs = [(rows, controls[batch]) for batch, rows in sorted(own.items()) if batch in controls]
            found.setdefault(name, []).extend(pairs or [(sum(own.values(), []), sum(controls.values(), []))])
    return found


class _Spread:
    """
    The covariance of control cells within strata, by its leading components.

    Args:
        strata (list of `np.ndarray` of shape `(cells, features)`): control cells; of all strata together so many are used.
    """

    def __init__(self, strata: list[np.ndarray]):
        from scipy import linalg  # slow to import, and nothing needs it before the first step

        each = max(2, MAX_CELLS // max(1, len(strata)))
        parts = [cells[:: max(1, len(cells) // each)][:each] for cells in strata]
        cells = np.concatenate([part - part.mean(axis=0) for part in parts]).astype(np.float64)
        products, number = cells @ cells.T / len(cells), len(cells)
        # The others of its eigenvectors would take twice as long.
        variances, vectors = linalg.eigh(products, subset_by_index=(max(0, number - COMPONENTS), number - 1))
        self.mean = np.trace(products) / cells.shape[1]
        kept = np.flatnonzero(variances > self.mean * 1e-6)
        self.variances = variances[kept]
        self.components = (vectors[:, kept] / np.sqrt(len(cells) * self.variances)).T @ cells

    def squares(self, changes: np.ndarray) -> np.ndarray:
        """`d' (C + l I)^-1 d`, times l, of each change d `(changes, features)`."""
        along = (changes @ self.components.T) ** 2
        return (changes**2).sum(axis=1) - along @ (self.variances / (self.variances + self.mean))


def _p_value(strata: list[tuple[np.ndarray, np.ndarray]], spread: _Spread, generator: np.random.Generator) -> float:
    """That of some strata of perturbed cells and control cells, `(cells, features)` each."""
    total = np.zeros((1 + PERMUTATIONS, strata[0][0].shape[1]))
    for perturbed, controls in strata:
        n, m = len(perturbed), len(controls)
        pool = np.concatenate([perturbed, controls])
        pool -= pool.mean(axis=0)
        chosen = np.zeros((1 + PERMUTATIONS, n + m), dtype=np.float32)
        chosen[0, :n] = 1
        drawn = np.argpartition(generator.random((PERMUTATIONS, n + m)), n - 1, axis=1)[:, :n]
        np.put_along_axis(chosen[1:], drawn, 1, axis=1)
        # Of a pool with mean 0, the weighted difference of means is the sum of the chosen cells.
        total += chosen @ pool
    found = spread.squares(total)
    statistic, permuted = found[0], found[1:]
    mean, deviation = permuted.mean(), permuted.std()
    if deviation == 0:
        return 1.0
    skewness = max(float((((permuted - mean) / deviation) ** 3).mean()), 2 * deviation / mean)
    return pearson3_tail((statistic - mean) / deviation, skewness)


def pearson3_tail(value: float, skewness: float) -> float:
    """
    The probability that a variable of the Pearson type III distribution with mean 0, variance 1 and a positive skewness is larger
    than a value: that of a gamma distribution of shape 4 / skewness^2, moved and scaled.
    """
    from scipy.special import gammaincc  # nothing needs it before the first step

    shape = 4 / skewness**2
    return float(gammaincc(shape, max(0.0, shape + 2 * value / skewness)))
