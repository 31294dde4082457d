"""What a file or a cell store holds, in words."""

import json
import os
from pathlib import Path

import pandas as pd
import scipy.sparse as sp

from pertstate.base.cell_values import matrix_of, take_rows
from pertstate.base.constants import Values
from pertstate.base.finite import are_finite
from pertstate.base.gene_view import log_base_of, rows_looked_at, view_of
from pertstate.base.labels import looks_like_control
from pertstate.base.messages import counted, some
from pertstate.base.printable import joined_lines
from pertstate.base.tables import table_text
from pertstate.base.value_scale import look_at, other_matrices
from pertstate.data.columns import find_columns
from pertstate.data.manifest import STORE_FILE
from pertstate.data.reading import AnnDataFile, is_zarr
from pertstate.data.store import CellStore


_LARGEST_TABLE = 12


def describe(path: str | os.PathLike, input: str = "X", control: str | None = None, **keys: str | None) -> str:
    """
    What a `.h5ad` or `.zarr` file or a cell store holds, and what is missing before a model can be trained on it. (Of a
    checkpoint: [`describe_checkpoint`].)

    Args:
        path: the file or folder.
        input (`str`): which matrix of a file, `"X"`, `"layers/NAME"` or `"obsm/NAME"`.
        control (`str`, *optional*): label of unperturbed cells; guessed by default.
        keys: `perturbation_key`, `context_key`, `batch_key`: columns of a file's obs; guessed if None.

    Raises:
        FileNotFoundError, ValueError, KeyError: the path does not exist or cannot be read, or a column does not exist.
    """
    path = Path(path)
    if path.is_dir() and (path / STORE_FILE).is_file():
        return _describe_store(path)
    if path.is_dir() and not is_zarr(path):
        raise ValueError(
            f"{path}: expected a cell store ({STORE_FILE}), a checkpoint (config.json or adapter_config.json) or a .zarr, "
            "found none of them"
        )
    return _describe_file(path, input, control, keys)


def _describe_store(path: Path) -> str:
    store = CellStore(path)
    manifest = store.manifest
    size = sum(shard["bytes"] for shard in manifest.shards)
    holds = []
    if manifest.expression is not None:
        holds.append(f"{manifest.layout} {manifest.expression} ({manifest.dtype}) of {len(manifest.genes):,} genes")
    if manifest.embedding_dim is not None:
        holds.append(f"an embedding of {manifest.embedding_dim} dimensions ({manifest.reading['input']})")
    lines = [
        f"{path}: cell store of {counted(manifest.cells, 'cell')} in {counted(len(manifest.shards), 'file')}, {size / 1e6:,.1f} MB",
        "holds: " + " and ".join(holds),
    ]
    if manifest.expression == Values.COUNTS:
        lines.append(
            f"a model sees: counts scaled to {manifest.target_sum:,g} per cell, log1p (or counts: normalize none)"
        )
    if manifest.highly_variable is not None:
        lines.append(f"genes: the {manifest.highly_variable:,} most variable in training cells")
    sources = ", ".join(f"{Path(s['path']).name} ({s['cells']:,} cells)" for s in manifest.sources[:5])
    lines.append(
        f"made of {counted(len(manifest.sources), 'file')}: {sources}{', ..' if len(manifest.sources) > 5 else ''}"
    )
    sizes = (store.groups["stop"] - store.groups["start"]).rename("cells")
    control = manifest.reading["control"]
    lines += ["", *_table(store.groups.assign(cells=sizes), control), ""]
    problems = _problems_of_labels(store.groups.assign(cells=sizes), control)
    lines += [*manifest.notes, *verdict(problems, f"pertstate train RUN.yaml --store {path}")]
    return joined_lines(lines)


def _describe_file(path: Path, input: str, control: str | None, keys: dict[str, str | None]) -> str:
    with AnnDataFile(path) as data:
        found = find_columns(data, control, **keys)
        view, place = view_of(data, input, None, False)
        matrix = matrix_of(view, place)
        lines = [
            f"{path}: {data.n_obs:,} cells x {matrix.shape[1]:,} " + ("dimensions" if "obsm" in input else "genes")
        ]
        have = [
            *(["X"] if data.X is not None else []),
            *(f"layers/{k}" for k in data.layers),
            *(f"obsm/{k}" for k in data.obsm),
            *(["raw/X"] if data.raw is not None else []),
        ]
        lines.append("has: " + ", ".join(have))
        base = log_base_of(view, place)
        looks, problems = _look(take_rows(matrix, rows_looked_at(matrix.shape[0])), input, base, data)
        lines.append(f"{input}: {looks}")
        if not view.var_names.is_unique:
            problems.append("gene names stand twice: set duplicate_genes: first, or sum")
        problems += found.missing_columns(data.obs_columns)
        if None in (found.keys["perturbation_key"], found.keys["context_key"]):
            return joined_lines([*lines, *verdict(problems, "")])
        reader = found.reader()
        try:
            labels = reader.labels_of(found.table)
        except ValueError as error:  # cells without a label
            problems.append(str(error))
            reader = found.reader(unlabelled="drop")
            labels = reader.labels_of(found.table).dropna()
        labels = labels.assign(dataset=path.stem)
    names = labels["perturbation"].unique()
    control = None if found.control is None else reader.control
    groups = labels.groupby(["dataset", "context", "perturbation"]).size().rename("cells").reset_index()
    lines += ["", *_table(groups, control), ""]
    problems += found.missing_control()
    if not isinstance(found.control, str) or "*" in found.control:
        alike = [name for name in found.labels if reader.label_reader.is_control(name)]
        if len(alike) > 1:
            lines.append(f"{len(alike)} labels look like controls and are taken together: {some(sorted(alike))}")
            lines.append("")
    others = [name for name in names if name != control and looks_like_control(name)]
    if others:
        lines.append(f"these labels look like controls too: {some(others)}; list all of them in control: [..]")
    lines += reader.label_reader.doubts(labels)
    problems += _problems_of_labels(groups, control)
    section = {**found.keys, "control": found.control, "input": input if input != "X" else None}
    yaml = [
        f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in section.items() if value is not None
    ]
    return joined_lines(
        lines + ["data:", f"  datasets: {json.dumps(str(path))}", *yaml, "", *verdict(problems, "train with these")]
    )


def _look(matrix, input: str, log_base: float | None, data: AnnDataFile) -> tuple[str, list[str]]:
    """What the values are, and what is wrong with them."""
    values = matrix.data if sp.issparse(matrix) else matrix
    if not are_finite(values):
        return "has values that are NaN or infinite", [f"{input} has values that are NaN or infinite (in float32)"]
    if input.startswith("obsm/"):
        if not values.size:
            return "an embedding", []
        return f"an embedding, {values.min():.3g} to {values.max():.3g}", []
    if values.size and values.min() < 0:
        return "has negative values: scaled or centred", [
            f"{input} is scaled; use counts or log1p expression{other_matrices(data, input) or ' (another layer?)'}"
        ]
    try:
        scale = look_at(matrix, log_base)
    except ValueError as error:  # a mixture
        return "several scales", [f"{input}: {error}{other_matrices(data, input)}"]
    shallow = scale.too_shallow()
    notes = [] if shallow is None else [shallow]
    if scale.values == Values.COUNTS:
        return "; ".join([scale.describe() + "; scaled to 10,000 and log1p in training", *notes]), []
    if scale.values == Values.FRACTIONAL:
        return scale.describe(), [
            f"{input} seems to hold counts that are not whole: set normalize: counts_to_log1p, which scales each cell and takes "
            "log1p (or normalize: none, if they are log1p values all the same)"
        ]
    if scale.values == Values.LINEAR:
        return scale.describe(), [
            f"{input} is normalised but not log1p: run sc.pp.log1p(adata), or set normalize: counts_to_log1p"
        ]
    if scale.values == Values.ZEROS:
        return "only zeros in the cells looked at", []
    if scale.total is None:
        notes.insert(
            0, "the genes here do not sum to one number per cell, so it was normalised over more genes or not at all"
        )
    return "; ".join([scale.describe(), *notes]), []


def _problems_of_labels(groups: pd.DataFrame, control: str | None) -> list[str]:
    """What keeps a model from being trained on these groups."""
    if control is None:
        return []
    is_control = groups["perturbation"] == control
    problems = []
    if not is_control.any():
        problems.append(f"no cell is a control ({control!r}): found {some(groups['perturbation'].unique())}")
    if is_control.all():
        problems.append("every cell is a control: there is nothing to learn")
    pairs = groups[["dataset", "context"]].apply(tuple, axis=1)
    without = [" / ".join(pair) for pair in pairs[~is_control].unique() if pair not in set(pairs[is_control])]
    if without and is_control.any():
        problems.append(
            f"{len(without)} contexts have no control cells: {some(without)}; list the other ones in data.contexts"
        )
    return problems


def verdict(problems: list[str], ready: str, purpose: str = "a model can be trained on it") -> list[str]:
    """The last lines of a description: what is in the way of a purpose, or the command that is ready to run."""
    if not problems:
        return [f"ready: {ready}"]
    return [f"before {purpose}:", *(f"- {problem}" for problem in problems)]


def _table(groups: pd.DataFrame, control: str | None) -> list[str]:
    """Cells of each context and perturbation; the largest of many."""
    counts = groups.pivot_table(index="context", columns="perturbation", values="cells", aggfunc="sum", fill_value=0)
    by_size = counts.sum().sort_values(ascending=False, kind="stable").index
    order = [name for name in by_size if name == control] + [name for name in by_size if name != control]
    shown = counts[order[:_LARGEST_TABLE]].astype(int)
    if len(order) > _LARGEST_TABLE:
        rest = counts[order[_LARGEST_TABLE:]]
        shown = shown.assign(**{f"{rest.shape[1]} others": rest.sum(axis=1).astype(int)})
    shown = shown.assign(all=counts.sum(axis=1).astype(int))
    perturbed = counted(len([name for name in order if name != control]), "perturbation")
    title = f"{counted(counts.shape[0], 'context')} x {perturbed}, cells of each:"
    text = table_text(shown.iloc[: 2 * _LARGEST_TABLE].rename_axis(None).rename_axis(None, axis=1), index=True)
    more = len(shown) - 2 * _LARGEST_TABLE
    return [title, *text.splitlines(), *([f"and {counted(more, 'more context')}"] if more > 0 else [])]
