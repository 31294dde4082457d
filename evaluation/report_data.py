"""What a report shows, computed from scores: changes, tests of genes, a map of cells, and how well what was expected ranks errors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pertstate.base.bounded_text import DAMAGED, LARGEST_TABLES, load_json
from pertstate.base.files import PARTIAL
from pertstate.evaluation.confidence import calibration, ranked
from pertstate.evaluation.expected_error import held_out_errors
from pertstate.evaluation.metrics import METRICS
from pertstate.evaluation.scores import SUMMARY, Scores


SCORES_FOLDER, STATE_FILE = "scores", "trainer_state.json"
KINDS = ("control", "observed", "predicted")
# Columns of the table of scores that are not figures of merit.
COUNTS = ("predicted_cells", "real_cells", "control_cells")
_NO_FIGURES = {
    "dataset",
    "context",
    "perturbation",
    "method",
    "reason",
    "seen",
    "confidence",
    "expected_energy",
    "expected_mae",
    *COUNTS,
}
# More points than these are slow to draw, and hide one another.
MAP_POINTS = 3000
_COMPONENTS, _FEWEST = 50, 15


@dataclass
class Expectation:
    """
    What a model expected of its errors, and what was found.

    Args:
        rows (`pandas.DataFrame`): the groups.
        expected, found (`str`): the columns of both figures.
        labels (`tuple[str, str]`): what they are called.
        rank_correlation (`float`): Spearman's, NaN if it is not defined.
    """

    rows: pd.DataFrame
    expected: str
    found: str
    labels: tuple[str, str]
    rank_correlation: float


def expectation(table: pd.DataFrame) -> Expectation | None:
    """The confidence of a model beside the energy distance; where it has none, the expected MAE beside the MAE; None where it has neither."""
    confidence = calibration(table)
    if confidence is not None:
        labels = ("loss that the model expects", "energy distance that was found")
        return Expectation(confidence[0], "confidence", "energy", labels, confidence[1])
    rows = held_out_errors(table)
    if rows is None:
        return None
    rank = ranked(rows["expected_mae"], rows["mae"])[0]
    return Expectation(rows, "expected_mae", "mae", ("MAE that the run expects", "MAE that was found"), rank)


def find_scores(path: str | os.PathLike) -> Path:
    """
    The folder of scores at a path: the folder of a run, the folder of scores, or the file `scores.json` in it.

    Raises:
        FileNotFoundError: neither holds scores.
    """
    if Path(path).name == SUMMARY and Path(path).is_file():
        return Path(path).parent
    for folder in (Path(path), Path(path) / SCORES_FOLDER):
        if (folder / SUMMARY).is_file():
            return folder
    families = sorted(str(found.parent) for found in Path(path, SCORES_FOLDER).glob(f"*/{SUMMARY}"))
    if families:
        raise FileNotFoundError(
            f"{path} holds the scores of each family apart; name one of them: {', '.join(families)}"
        )
    raise FileNotFoundError(
        f"{path} holds no scores: expected {SUMMARY} in it or in its folder {SCORES_FOLDER}; pertstate train writes them where it "
        "holds out a test, and pertstate evaluate with --scores"
    )


def read_log(path: str | os.PathLike) -> list[dict[str, float]]:
    """
    The log of a run: that of its own trainer state or of a checkpoint's, whichever has the most steps.

    Args:
        path: the folder of a run, or the folder of scores in it.

    Returns:
        `list[dict[str, float]]`: figures by name, one entry for each logging; empty if there is no log, as for models that
        are fitted in one pass.

    Raises:
        ValueError: the state is damaged.
    """
    folder = Path(path)
    for run in (folder, folder.parent) if folder.name == SCORES_FOLDER else (folder,):
        found = [*run.glob(STATE_FILE), *run.glob(f"checkpoint-*/{STATE_FILE}")]
        states = [state for state in found if not state.parent.name.endswith(PARTIAL)]
        if states:
            return max(
                (_log_of(state) for state in states), key=lambda log: max((row["step"] for row in log), default=-1)
            )
    return []


def _log_of(path: Path) -> list[dict[str, float]]:
    try:
        history = load_json(path, LARGEST_TABLES)["log_history"]
        return [
            {str(key): value for key, value in row.items() if _is_number(value)} for row in history if "step" in row
        ]
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: expected log_history of a Trainer, found {error!r}; remove it") from error


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def by_step(log: list[dict[str, float]]) -> pd.DataFrame:
    """
    The log of a Trainer as a table with one row for each step: `step`, `epoch`, and a column for each figure; NaN if a step does
    not have it. If a step has a figure twice, the later one counts.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in log:
        rows.setdefault(int(entry["step"]), {}).update(entry)
    table = pd.DataFrame([rows[step] for step in sorted(rows)])
    first = [name for name in ("step", "epoch") if name in table]
    return table[first + [name for name in table if name not in first]]


def metrics_of(table: pd.DataFrame) -> list[str]:
    """The columns of a table of scores that are figures of merit: [`METRICS`] first."""
    numbers = [name for name in table if name not in _NO_FIGURES and table[name].dtype.kind in "fiu"]
    return [name for name in METRICS if name in numbers] + [name for name in numbers if name not in METRICS]


def mean_changes(scores: Scores) -> dict[str, np.ndarray]:
    """`observed` and `predicted` mean changes from control, `(groups, genes)` float32 each, if the scores have them."""
    control = scores.changes.get("control")
    if control is None:
        return {}
    return {name: scores.changes[name] - control for name in KINDS[1:] if name in scores.changes}


def gene_tests(scores: Scores) -> np.ndarray | None:
    """
    Test whether each gene differs between real perturbed and control cells: Welch's t-test in the sample of cells that the scores
    keep, with p-values adjusted over the genes of a group (Benjamini & Hochberg 1995).

    A group without control cells of its own takes those of its context. A gene that does not vary in either sample is not tested, and
    has p-value 1.

    Returns:
        `np.ndarray` of shape `(groups, genes)`, float32: adjusted p-values; NaN in groups with fewer than two cells of either kind.
        None if the scores keep no cells.
    """
    cells = scores.cells
    if not {"observed", "control"} <= set(cells):
        return None
    found = np.full((len(scores.groups), len(scores.genes)), np.nan, np.float32)
    rows = {kind: _rows_of(cells[f"{kind}_group"], len(scores.groups)) for kind in KINDS[:2]}
    of_context: dict[tuple[str, str], list[np.ndarray]] = {}
    for number, group in enumerate(scores.groups):
        of_context.setdefault(group[:2], []).append(rows["control"][number])
    for number, group in enumerate(scores.groups):
        own = rows["control"][number]
        controls = own if len(own) else np.concatenate(of_context[group[:2]])
        if len(rows["observed"][number]) > 1 and len(controls) > 1:
            found[number] = _welch(cells["observed"][rows["observed"][number]], cells["control"][controls])
    return found


def _rows_of(groups: np.ndarray, number: int) -> list[np.ndarray]:
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.searchsorted(groups[order], np.arange(1, number)))


def _welch(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Adjusted p-values of each column."""
    from scipy import stats

    x, y = x.astype(np.float64), y.astype(np.float64)
    parts = [values.var(axis=0, ddof=1) / len(values) for values in (x, y)]
    error = parts[0] + parts[1]
    varies = error > 0
    p = np.ones(x.shape[1])
    part_x, part_y, error = parts[0][varies], parts[1][varies], error[varies]
    freedom = error**2 / (part_x**2 / (len(x) - 1) + part_y**2 / (len(y) - 1))
    t = (x[:, varies].mean(axis=0) - y[:, varies].mean(axis=0)) / np.sqrt(error)
    p[varies] = 2 * stats.t.sf(np.abs(t), freedom)
    return stats.false_discovery_control(p) if len(p) else p


def cell_map(scores: Scores, most: int = MAP_POINTS, seed: int = 0) -> pd.DataFrame | None:
    """
    Real perturbed, control and predicted cells in two dimensions: PCA of all of them together, then UMAP (McInnes et al. 2018).

    Args:
        scores ([`Scores`]): scores with cells. Of each kind the same number is drawn if there are enough.
        most (`int`): the largest number of cells.
        seed (`int`): seed of the draw and of UMAP.

    Returns:
        `pandas.DataFrame`: columns `x`, `y`, `kind` (one of `KINDS`) and `group`, a number; None if there are too few cells.
    """
    if not scores.genes:
        return None
    places = places_of(scores.cells, most, seed)
    if places is None:
        return None
    of_kind = [scores.cells[f"{kind}_group"][rows["row"]] for kind, rows in places.groupby("kind", sort=False)]
    return places.drop(columns="row").assign(group=np.concatenate(of_kind))


def places_of(
    cells: Mapping[str, np.ndarray], most: int = MAP_POINTS, seed: int = 0, umap: bool = True
) -> pd.DataFrame | None:
    """
    Cells of several kinds in two dimensions: PCA of all of them together, then UMAP (McInnes et al. 2018).

    Args:
        cells (`Mapping[str, np.ndarray]`): `(cells, features)` of each of the `KINDS`; a kind may be absent. Of each the same
            number is drawn if there are enough.
        most (`int`): the largest number of cells.
        seed (`int`): seed of the draw and of UMAP.
        umap (`bool`): without UMAP, the first two principal components. Distances between groups of cells then have a meaning.

    Returns:
        `pandas.DataFrame`: columns `x`, `y`, `kind` and `row`, which cell of its kind it is; None if there are too few cells.
    """
    kinds = [kind for kind in KINDS if len(cells.get(kind, ()))]
    if sum(len(cells[kind]) for kind in kinds) < _FEWEST:
        return None
    from sklearn.decomposition import PCA

    generator = np.random.default_rng(seed)
    drawn = {kind: np.sort(generator.permutation(len(cells[kind]))[: max(1, most // len(kinds))]) for kind in kinds}
    values = np.concatenate([cells[kind][rows] for kind, rows in drawn.items()]).astype(np.float32)
    components = min(_COMPONENTS if umap else 2, *values.shape)
    reduced = PCA(components, svd_solver="randomized" if components < min(values.shape) else "full", random_state=seed)
    places = reduced.fit_transform(values)
    if umap:
        from umap import UMAP

        neighbors = min(15, len(values) - 1)
        # With a seed, the library uses one job whatever it is told, and warns if it is told another number.
        places = UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1).fit_transform(places)
    return pd.DataFrame(
        {
            "x": places[:, 0],
            "y": places[:, 1] if places.shape[1] > 1 else np.zeros(len(places)),
            "kind": np.repeat(kinds, [len(rows) for rows in drawn.values()]),
            "row": np.concatenate([*drawn.values()]),
        }
    )
