"""Knock-downs that did not work: their cells are left out of a store."""

from collections import defaultdict

import numpy as np

from pertstate.base.messages import counted, some
from pertstate.data.arguments import PrepareArguments
from pertstate.data.source import FileSource


def filter_knockdowns(source: FileSource, options: PrepareArguments, target_sum: float | None) -> list[str]:
    """
    Leave the cells of ineffective knock-downs out of a source, as [`PrepareArguments`] describes.

    Args:
        target_sum (`float`): what the counts of a cell are scaled to.

    Returns:
        `list[str]`: what was left out, and which perturbations could not be judged.
    """
    groups, reader, recipe = source.groups, source.reader, source.recipe()
    position = {gene: i for i, gene in enumerate(recipe.genes)}
    names = groups["perturbation"].to_numpy()
    targets = {name: reader.split_combination(name) for name in dict.fromkeys(names)}
    judged = {
        name: [position[part] for part in parts]
        for name, parts in targets.items()
        if parts and all(part in position for part in parts)
    }
    no_gene = sorted(name for name, parts in targets.items() if parts and name not in judged)
    if not judged:
        return [
            f"knock-down filter: kept {counted(len(no_gene), 'perturbation')} without a gene in the data: {some(no_gene)}"
        ]
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
    values = [np.full((len(file.codes), most), np.nan, dtype=np.float32) for file in source.parts]
    for number, block in source.read_parts(recipe):
        amounts = block.log1p(target_sum)[:, columns].astype(np.float64)
        np.expm1(amounts.data, out=amounts.data)
        context = where[block.codes]
        control = is_control[block.codes]
        for place_of in np.unique(context[control]):
            of_context = control & (context == place_of)
            sums[place_of] += np.asarray(amounts[of_context].sum(axis=0)).ravel()
            counts[place_of] += of_context.sum()
        own = parts_of[block.codes]
        for part in range(most if len(columns) else 0):
            found = np.asarray(amounts[np.arange(len(own)), np.maximum(own[:, part], 0)]).ravel()
            values[number][block.rows, part] = np.where(own[:, part] >= 0, found, np.nan)
    means = sums / np.maximum(counts, 1)[:, None]
    base = np.where(parts_of >= 0, np.take_along_axis(means[where], np.maximum(parts_of, 0), axis=1), np.nan)

    # An arm is a perturbation in a context; its batches are taken together.
    arm = groups.groupby(["dataset", "context", "perturbation"], sort=False).ngroup().to_numpy()
    total, cells = np.zeros((arm.max() + 1, most)), np.zeros(arm.max() + 1)
    for file, of_file in zip(source.parts, values):
        kept = file.codes >= 0
        np.add.at(total, arm[file.codes[kept]], np.nan_to_num(of_file[kept], nan=0.0))
        cells += np.bincount(arm[file.codes[kept]], minlength=len(cells))
    mean_of_group = (total / np.maximum(cells, 1)[:, None])[arm]
    has_target, unexpressed = parts_of >= 0, (base == 0).any(axis=1)
    judge = has_target.any(axis=1) & ~unexpressed
    weak = judge & (~has_target | (mean_of_group <= options.knockdown_residual * base)).all(axis=1)
    left_cells = np.zeros(len(cells), dtype=np.int64)
    stays = []
    for file, of_file in zip(source.parts, values):
        codes = file.codes
        low = np.isnan(of_file) | (of_file <= options.knockdown_cell_residual * base[codes])
        stay = (codes >= 0) & (~judge[codes] | (weak[codes] & low.all(axis=1)))
        left_cells += np.bincount(arm[codes[stay]], minlength=len(cells))
        stays.append(stay)
    enough = ~judge | (left_cells[arm] >= options.knockdown_min_cells)
    notes: list[str] = []
    lost: dict[int, int] = defaultdict(int)
    for file, stay in zip(source.parts, stays):
        stay &= enough[file.codes]
        gone = (file.codes >= 0) & ~stay
        for code, number in zip(*np.unique(file.codes[gone], return_counts=True)):
            lost[arm[code]] += int(number)
        file.codes = np.where(stay, file.codes, -1).astype(np.int32)
    source.drop_empty()
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
            f"knock-down filter: kept {counted(len(no_gene), 'perturbation')} without a gene in the data: {some(no_gene)}"
        )
    silent = sorted(set(names[has_target.any(axis=1) & unexpressed]))
    if silent:
        notes.append(
            f"knock-down filter: kept {counted(len(silent), 'perturbation')} where the controls of a context do not express the target: "
            f"{some(silent)}"
        )
    return notes
