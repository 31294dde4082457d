"""A run from Python: from cells to a model, its scores and its card."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad

from pertstate.data.in_memory import CellData, check_cells
from pertstate.hub.trained import TrainedModel, load
from pertstate.training.run import check_further, run_of_fields
from pertstate.training.run_folder import run_folder
from pertstate.training.whole_run import train_run


# The dataset of a single object.
NAME = "screen"


def fit(
    cells: CellData | Mapping[str, CellData],
    output_dir: str | os.PathLike | None = None,
    quiet: bool = False,
    **fields: Any,
) -> TrainedModel:
    """
    Train a model, as `pertstate train` does. Columns, sizes and steps that are not given are found in the data or chosen for them;
    the log says each.

    Args:
        cells (`AnnData`, path, or `dict` of these): the cells, or of several datasets those of each by name. A path may be that of
            a file, folder, glob or store of cells, or of a run file.
        output_dir (*optional*): folder of the run: checkpoints, model, card, scores. By default a temporary one, which is gone
            with the model that is returned; [`TrainedModel.save`] keeps it.
        quiet (`bool`): say only what goes wrong.
        fields: any fields of the sections data, model and training, as the flags of `pertstate train`, see `pertstate train
            --help`: `test_contexts=["NK"]`, `max_steps=500`. A name that two sections have is written `{"model.NAME": ..}`.

    Returns:
        [`TrainedModel`], with the scores of the test groups, if there are some.

    Raises:
        ValueError, KeyError, OSError, ImportError: the run cannot be; the message says what to do.
        FloatingPointError: the training diverged.
        StoppedError: a signal stopped it.

    Example:
    ```python
    import anndata as ad
    import pertstate

    adata = ad.read_h5ad("screen.h5ad")
    trained = pertstate.fit(adata, test_contexts=["NK"])
    print(trained.scores.verdict)
    predicted = trained.predict(adata, perturbations=["IFN-beta"], contexts=["NK"])
    trained.report("report.html")
    trained.save("model")
    ```
    """
    if fields.get("dry_run"):
        raise ValueError("dry_run trains no model that could be returned; use pertstate train .. --dry_run")
    temporary = None
    if output_dir is None:
        temporary = TemporaryDirectory(prefix="pertstate-run-")
        output_dir = Path(temporary.name, "run")
    run = run_of_fields(_named(cells), {**fields, "output_dir": str(output_dir)})
    check_further(run)
    with run_folder(run) as resume:
        _, scores = train_run(run, resume, quiet)
    trained = load(output_dir)
    trained.scores, trained._temporary = scores, temporary
    return trained


def _named(cells: CellData | Mapping[str, CellData]) -> str | dict[str, CellData]:
    if isinstance(cells, ad.AnnData):
        return {NAME: cells}
    if not isinstance(cells, Mapping):
        check_cells("cells", cells)
        return str(cells)
    for name, data in cells.items():
        check_cells(f"cells[{name!r}]", data)
    return {str(name): data if isinstance(data, ad.AnnData) else str(data) for name, data in cells.items()}
