"""Knock-downs that did not work: their cells are left out of a store."""

from collections import defaultdict

import numpy as np
import pandas as pd

from pertstate.base.messages import some
from pertstate.data.arguments import PrepareArguments
from pertstate.data.source import Recipe, Source, open_source
from pertstate.processing import StateProcessor


def filter_knockdowns(
    sources: list[Source],
    groups: pd.DataFrame,
    recipe: Recipe,
    reader: StateProcessor,
    options: PrepareArguments,
    target_sum: float,
    progress,
) -> list[str]:
    """
    Leave out the cells of ineffective knock-downs, as [`PrepareArguments`] describes; their codes in `sources` become -1.

    Args:
        groups (`pandas.DataFrame`): the groups; the sources' codes are their numbers.
        recipe ([`Recipe`]): with all genes that the files share.
        reader ([`StateProcessor`]): splits combinations.
        target_sum (`float`): what the counts of a cell are scaled to.
        progress (`Callable[[int], None]`): called with the number of cells that were just read.

    Returns:
        `list[str]`: what was left out, and which perturbations could not be judged.
    """
    position = {gene: i for i, gene in enumerate(recipe.genes)}
    names = groups["perturbation"].to_numpy()
    targets = {name: reader.split_combination(name) for name in dict.fromkeys(names)}
    judged = {
        name: [position[part] for part in parts]
        for name, parts in targets.items()
        if parts and all(part in position for part in parts)
    }
    no_gene = sorted(name for name, parts in targets.items() if parts and name not in judged)
    columns = np.array(sorted({column for parts in judged.values() for column in parts}), dtype=np.int64)
    place = {column: i for i, column in enumerate(columns)}
    most = max([1, *map(len, judged.values())])
    # For each group, the places of its targets among `columns`; -1 pads.
    parts_of = np.full((len(groups), most), -1)
    for code, name in enumerate(names):
        of_name = [place[column] for column in judged.get(name, [])]
        parts_of[code, : len(of_name)] = of_name
    where = groups.groupby(["dataset", "context"], sort=False).ngroup().to_numpy()
    is_control = names == reader.control

    # The sum of the controls of each context, and the expression of its own targets in each cell.
    sums, counts = np.zeros((where.max() + 1, len(columns))), np.zeros(where.max() + 1)
    values = [np.full((len(source.codes), most), np.nan, dtype=np.float32) for source in sources]
    for source, of_source in zip(sources, values):
        with open_source(source, recipe) as reading:
            for rows, block in reading.blocks():
                amounts = block.log1p(target_sum)[:, columns].astype(np.float64)
                np.expm1(amounts.data, out=amounts.data)
                context = where[block.codes]
                control = is_control[block.codes]
                for number in np.unique(context[control]):
                    of_context = control & (context == number)
                    sums[number] += np.asarray(amounts[of_context].sum(axis=0)).ravel()
                    counts[number] += of_context.sum()
                own = parts_of[block.codes]
                for part in range(most if len(columns) else 0):
                    found = np.asarray(amounts[np.arange(len(own)), np.maximum(own[:, part], 0)]).ravel()
                    of_source[block.rows, part] = np.where(own[:, part] >= 0, found, np.nan)
                progress(rows.stop - rows.start)
    means = sums / np.maximum(counts, 1)[:, None]
    base = np.where(parts_of >= 0, np.take_along_axis(means[where], np.maximum(parts_of, 0), axis=1), np.nan)

    # An arm is a perturbation in a context; its batches are taken together.
    arm = groups.groupby(["dataset", "context", "perturbation"], sort=False).ngroup().to_numpy()
    total, cells = np.zeros((arm.max() + 1, most)), np.zeros(arm.max() + 1)
    for source, of_source in zip(sources, values):
        kept = source.codes >= 0
        np.add.at(total, arm[source.codes[kept]], np.nan_to_num(of_source[kept], nan=0.0))
        cells += np.bincount(arm[source.codes[kept]], minlength=len(cells))
    mean_of_group = (total / np.maximum(cells, 1)[:, None])[arm]
    has_target, unexpressed = parts_of >= 0, (base == 0).any(axis=1)
    judge = has_target.any(axis=1) & ~unexpressed
    weak = judge & (~has_target | (mean_of_group <= options.knockdown_residual * base)).all(axis=1)
    left_cells = np.zeros(len(cells), dtype=np.int64)
    stays = []
    for source, of_source in zip(sources, values):
        codes = source.codes
        low = np.isnan(of_source) | (of_source <= options.knockdown_cell_residual * base[codes])
        stay = (codes >= 0) & (~judge[codes] | (weak[codes] & low.all(axis=1)))
        left_cells += np.bincount(arm[codes[stay]], minlength=len(cells))
        stays.append(stay)
    enough = ~judge | (left_cells[arm] >= options.knockdown_min_cells)
    notes: list[str] = []
    lost: dict[int, int] = defaultdict(int)
    for source, stay in zip(sources, stays):
        stay &= enough[source.codes]
        gone = (source.codes >= 0) & ~stay
        for code, number in zip(*np.unique(source.codes[gone], return_counts=True)):
            lost[arm[code]] += int(number)
        source.codes = np.where(stay, source.codes, -1).astype(np.int32)
    first = {number: i for i, number in reversed(list(enumerate(arm)))}
    whole = [
        " / ".join(groups.loc[first[number], ["dataset", "context", "perturbation"]])
        for number, gone in sorted(lost.items())
        if gone == cells[number]
    ]
    notes.append(
        f"knock-down filter: {sum(lost.values())} cells left out, among them all of {len(whole)} perturbations in their "
        f"context: {some(whole)}"
    )
    if no_gene:
        notes.append(
            f"knock-down filter: {len(no_gene)} perturbations are no gene of the data, so kept: {some(no_gene)}"
        )
    silent = sorted(set(names[has_target.any(axis=1) & unexpressed]))
    if silent:
        notes.append(
            f"knock-down filter: the controls of a context do not express the target of {len(silent)} perturbations, kept "
            f"there: {some(silent)}"
        )
    return notes
