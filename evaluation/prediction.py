"""Virtual experiments on a whole file: control cells in, predicted cells out, in bounded memory."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pertstate.base.cell_ids import cell_ids, order_of
from pertstate.base.constants import CONTROL_CELLS, LABELS, Values
from pertstate.base.files import whole_file
from pertstate.base.finite import check_predicted
from pertstate.base.gene_names import MAX_MISSING_GENES
from pertstate.base.messages import counted, some
from pertstate.base.model_features import carried_columns
from pertstate.base.modeling_layers import UnseenWarning
from pertstate.base.modeling_perturbation import UnseenPerturbationError
from pertstate.base.outputs import check_apart
from pertstate.base.printable import get_logger
from pertstate.data.change_intervals import ChangeIntervals
from pertstate.data.confidence_calibration import ConfidenceCalibration
from pertstate.data.in_memory import CellData, open_cells
from pertstate.data.reading import AnnDataFile, read_labels
from pertstate.data.splits import without_doses
from pertstate.evaluation.cell_eval import CellEval, real_rows, wanted_cells, write_real
from pertstate.evaluation.cells_file import SUFFIXES, whole_cells
from pertstate.evaluation.confidence import confidence_text, expectations
from pertstate.evaluation.experiment import (
    Arm,
    BatchReader,
    Unit,
    cell_name,
    observed_arms,
    packs,
    plan_arms,
)
from pertstate.evaluation.group_scores import is_log1p
from pertstate.evaluation.others_data import read_as
from pertstate.evaluation.predicted_file import ROWS, OutputLayout, PredictedFile, claimed_output
from pertstate.evaluation.shared_passes import SharedPasses
from pertstate.evaluation.summary import TABLES, SummaryFile
from pertstate.processing import StateProcessor


logger = get_logger(__name__)

CEILING = "decoded from the observed perturbed cells: the ceiling of decoding, not a prediction"


def predict(
    model,
    processor: StateProcessor,
    adata: CellData,
    output: str | os.PathLike | h5py.File | None = None,
    perturbations: list[str] | str | None = None,
    contexts: list[str] | None = None,
    cells_per_perturbation: int | Mapping[str, int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    missing_genes: str = "error",
    input: str | None = None,
    sample_counts: int | None = None,
    checkpoint: str | None = None,
    quiet: bool = False,
    reading: dict[str, str | None] | None = None,
    all_are_controls: bool = False,
    doses: list[float] | None = None,
    convert_scale: bool = False,
    max_missing_genes: float = MAX_MISSING_GENES,
    obs_columns: list[str] | None = None,
    overwrite: bool = False,
    layout: OutputLayout | None = None,
    summary: str | os.PathLike | None = None,
    cell_eval: CellEval | None = None,
    intervals: ChangeIntervals | None = None,
    confidences: dict[tuple[str, str], float] | None = None,
    calibration: ConfidenceCalibration | None = None,
    shared: SharedPasses | None = None,
) -> dict[str, int]:
    r"""
    Predict every chosen perturbation from the control cells of every chosen context, and write one `.h5ad` or `.zarr`;
    [`predict_in_memory`] writes none.

    Args:
        model ([`PerturbationPreTrainedModel`]): in any mode, on any device; it is put into evaluation mode.
        processor ([`StateProcessor`]): of the same checkpoint.
        adata: `.h5ad` or `.zarr` with the control cells, which is read block by block, or an AnnData.
        output (*optional*): `.h5ad` or `.zarr` to write, with the layout of [`StateProcessor.decode`], but for the control cells: see
            [`OutputLayout`] and [`controls_of`]. It appears whole or not at all. Or an open file of h5py to write into.
        perturbations (`list[str]`, *optional*): names, `"A+B"` for a combination, or `"all"`, see [`Experiments.named`]. By
            default those that the file itself has in each context, so that the output can be compared with the file.
        contexts (`list[str]`, *optional*): by default all contexts of the file.
        cells_per_perturbation (`int` or `Mapping[str, int]`, *optional*): use at most this many control cells of a context,
            drawn at random, or so many for each perturbation, see [`read_cell_counts`], whose perturbations are then predicted
            by default; all control cells by default. Each of them is used once for each perturbation. (A model that is a
            ceiling is given the perturbed cells instead, and at most this many.)
        seed (`int`): of the draw, and of the order in which cells are put into sentences.
        batch_size (`int`): full sentences in one forward pass; of shorter ones, as many as there is room for.
        missing_genes, input: see [`StateProcessor.__call__`].
        sample_counts (`int`, *optional*): for a model on counts. Write cells that are drawn with this seed and have the
            noise of real counts, instead of the model's expectation.
        checkpoint (`str`, *optional*): where the model came from, recorded in the output.
        quiet (`bool`): no progress bar.
        reading, all_are_controls: how to read a file that was made elsewhere, see [`read_as`].
        doses (`list[float]`, *optional*): predict each perturbation at each of these doses; for a model that knows doses.
        max_missing_genes (`float`): with `missing_genes="zero"`, the largest share of the model's genes that may be missing.
        convert_scale (`bool`): convert log1p values whose cells sum to another total than those of the training cells.
        obs_columns (`list[str]`, *optional*): columns of obs to copy from each control cell to its predicted cell. Columns of
            var are always copied.
        overwrite (`bool`): replace an output that is there.
        layout ([`OutputLayout`], *optional*): where control cells are, and how numbers are stored.
        summary (*optional*): `.parquet` or `.csv` to write instead of cells: means and changes of each group and gene, see
            [`SummaryFile`].
        cell_eval ([`CellEval`], *optional*): write the output, and a file of real cells, as `cell-eval` takes them.
        intervals ([`ChangeIntervals`], *optional*): those of the model's record, for the summary.
        confidences (`dict`, *optional*): is filled with the confidence of each (context, perturbation), see [`PerturbationOutput`], as a
            mean over its sentences. It stays empty for a model that has none.
        calibration ([`ConfidenceCalibration`], *optional*): that of the model's record; the output says what energy distance to expect.
        shared ([`SharedPasses`], *optional*): the processes that predict together. The first one writes the output, which is that of
            one process.

    Returns:
        `dict[str, int]`: the numbers of `cells` predicted, of `control_rows` written before them, of `contexts`, of
        `perturbations`, of these at their doses (`dosed`), and of `unseen` groups. A group (context, perturbation) is unseen if its
        perturbation or context has no training cells, so that the model predicts it in another way. A warning names these groups.

    Raises:
        KeyError, ValueError: see [`StateProcessor.__call__`]; or there is nothing to predict.
        UnseenPerturbationError: the model cannot predict some of the perturbations; it names them.
        FloatingPointError: a prediction is NaN or infinite; the error names cell and gene, and nothing is left behind.
        FileExistsError, FileNotFoundError, InUseError: see [`claimed_output`].
        OSError: the output cannot be written; nothing is left behind.
    """
    for name, value in (("cells_per_perturbation", cells_per_perturbation), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    for name, value in (("seed", seed), ("sample_counts", sample_counts)):
        if value is not None and not 0 <= value < 2**63:
            raise ValueError(f"{name} must be a number from 0 to {2**63 - 1}, found {value}")
    if not 0 <= max_missing_genes <= 1:
        raise ValueError(f"max_missing_genes must be a share from 0 to 1, found {max_missing_genes}")
    if (output is None) == (summary is None):
        raise ValueError("predict writes cells (output) or their summary, one of the two")
    if summary is not None:
        _check_summary(summary, {"layout": layout, "cell_eval": cell_eval, "obs_columns": obs_columns}, model)
    if shared is not None and shared.processes > 1 and sample_counts is not None:
        raise ValueError(
            f"several processes ({shared.processes}) predict expectations; counts are drawn (sample_counts) by one process alone"
        )
    writes = shared is None or shared.writes
    layout = OutputLayout() if layout is None else layout
    if cell_eval is not None:
        layout = replace(layout, controls=ROWS)
    target = Path("predicted.h5ad" if isinstance(output, h5py.File) else str(output if summary is None else summary))
    files = [] if isinstance(output, h5py.File) else [target]
    files += [] if cell_eval is None or cell_eval.real is None else [Path(cell_eval.real)]
    for path in files if summary is None else ():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    check_apart(**dict(zip(("output", "cell_eval"), files, strict=False)))
    model.eval()
    with ExitStack() as stack:
        for path in files if writes else ():
            stack.enter_context(claimed_output(path, adata, overwrite))
        data = stack.enter_context(open_cells(adata))
        decoded, uses_batches = model.config.gene_dim is not None, bool(model.config.embeds_batches)
        processor = read_as(processor, data, reading or {}, contexts, all_are_controls, uses_batches)
        perturbations, cells_of = _asked(processor, perturbations, doses, cells_per_perturbation)
        processor.check_scale(data, input, convert_scale)
        lacking = processor.check_genes(data, input, max_missing_genes) if missing_genes == "zero" else None
        if lacking is not None and writes:
            logger.warning(lacking)
        labels = read_labels(data, processor)
        groups = processor.control_groups(labels, contexts)
        chosen = {}
        for context, rows in groups.items():
            # Cells are drawn by their barcodes, so that the draw does not depend on where they stand in the file.
            rows = rows[order_of(cell_ids(labels.index[rows]), len(rows), seed)]
            chosen[context] = rows if cells_of is not None else rows[:cells_per_perturbation]
        if uses_batches:
            check_batches(processor, labels["batch"].to_numpy()[np.concatenate([*chosen.values()])])
        arms = plan_arms(processor, labels, chosen, perturbations, cells_of)
        check_perturbations(
            model, {key: np.stack([arm.encoded[key] for arm in arms]) for key in arms[0].encoded}, processor
        )
        if model.is_ceiling:
            arms = observed_arms(arms, labels, cells_per_perturbation if cells_of is None else cells_of, seed)
        if writes:
            _warn(processor, arms, cells_of)
        in_order = layout.in_order or summary is not None or sample_counts is not None
        reader = BatchReader(processor, data, labels, groups, missing_genes, input, model.device, held=in_order)

        def expression(rows: np.ndarray) -> np.ndarray:
            """Cells of the data in the units and genes of predictions."""
            if not decoded:
                return processor.as_predicted(reader.features(rows))
            wanted = np.unique(rows)
            return processor.gene_features(data, wanted)[np.searchsorted(wanted, rows)]

        losses: dict[tuple[str, str], list[float]] = {}

        def expected_of(arm: Arm) -> dict[str, float]:
            of = losses.get((arm.context, arm.perturbation))
            return {} if of is None else expectations(float(np.mean(of)), calibration)

        log1p = is_log1p(processor, decoded)
        sink: PredictedFile | SummaryFile | None = None
        if not writes:
            _check_layout(layout, model, processor)
        elif summary is not None:
            names = processor.vocabulary.genes or processor.output_names(model.config.output_dim)
            partial = stack.enter_context(whole_file(target))
            sink = stack.enter_context(
                SummaryFile(
                    partial, target.suffix, processor, names, arms, log1p, expression, seed, intervals, expected_of
                )
            )
        else:
            _check_layout(layout, model, processor)
            note = "; ".join(f"{c}: {len(chosen[c])} of {len(rows)} control cells" for c, rows in groups.items())
            uns = processor.describe_output(
                decoded, note, checkpoint, [(arm.context, arm.perturbation) for arm in arms]
            )
            uns |= {} if lacking is None else {"missing_genes": lacking}
            if sample_counts is not None:
                uns["X"] += f", of counts drawn with seed {sample_counts}"
            if model.is_ceiling:
                uns |= {"controls": "none", "ceiling": CEILING}
            carried = None
            if obs_columns:
                everything = np.arange(len(labels))
                carried = carried_columns(data.some_obs(slice(None), obs_columns), obs_columns, everything)
            var = _var_of_output(processor, model.config, data, input)
            if cell_eval is not None:
                cell_eval.check(target, log1p)
                uns["processor"] = cell_eval.reader_of(processor).reading_settings()
                if cell_eval.real is not None:
                    names_of = (processor.output_columns()["context"], processor.control)
                    of_real = real_rows(arms, labels, processor.control)
                    # It appears after the predicted cells, if these come to their end.
                    opened = stack.enter_context(whole_cells(Path(cell_eval.real)))
                    write_real(*opened, cell_eval, of_real, labels, names_of, var, expression, layout.sparse)
            if isinstance(output, h5py.File):
                group, check_disk = output, output.flush
            else:
                group, check_disk = stack.enter_context(whole_cells(target))
            sink = stack.enter_context(
                PredictedFile(
                    group,
                    processor,
                    model.config,
                    layout,
                    labels,
                    _stored_controls(layout, chosen, arms, model.is_ceiling),
                    arms,
                    uns,
                    var,
                    carried,
                    cell_eval,
                    check_disk,
                )
            )
            sink.write_controls(reader.features, expression)
        total = sum(len(arm.cells) for arm in arms)
        bar = stack.enter_context(
            tqdm(total=total, unit="cells", unit_scale=True, disable=quiet or not writes, desc="predict")
        )
        unseen: dict[tuple[str, str], None] = {}
        passes = packs(processor, arms, batch_size, alone=sample_counts is not None, in_order=in_order)

        def compute(own: Iterator[list[Unit]]):
            """Each result with what the model says of its loss in this pass."""
            of_pass: dict[tuple[str, str], list[float]] = {}
            for result in _predicted(model, reader, own, sample_counts, unseen, of_pass):
                yield *result, {**of_pass}
                of_pass.clear()

        results = compute(passes) if shared is None else shared.results(passes, compute)
        for packed, values, embedding, inputs, said in results:
            for group, of in said.items():
                losses.setdefault(group, []).extend(of)
            assert sink is not None, "results are the writer's alone"
            sink.write(packed, values, embedding, inputs)
            bar.update(len(values))
        expected = {group: float(np.mean(of)) for group, of in losses.items()}
        if expected and isinstance(sink, PredictedFile):
            sink.describe("confidence", confidence_text(expected, calibration))
    if confidences is not None:
        confidences |= expected
    if shared is not None:
        unseen = dict.fromkeys(shared.merged([*unseen]))
    if unseen and writes:
        logger.warning(
            f"{len(unseen)} of {len(arms)} groups (context / perturbation) have a perturbation or a context without training "
            f"cells: {[' / '.join(group) for group in unseen][:10]}; the model card says how these are predicted"
        )
    dosed = {arm.perturbation for arm in arms}
    counts = {"contexts": len(chosen), "perturbations": len({*map(without_doses, dosed)}), "dosed": len(dosed)}
    controls = sum(map(len, chosen.values())) if layout.controls == ROWS else 0
    return {"cells": total, "control_rows": controls, **counts, "unseen": len(unseen)}


def predict_in_memory(model, processor: StateProcessor, adata: CellData, **options) -> ad.AnnData:
    """
    [`predict`] without a file.

    Args:
        options: arguments of [`predict`] that write none.

    Returns:
        `AnnData`: what the file would hold.
    """
    with h5py.File("predicted.h5ad", "w", driver="core", backing_store=False) as file:
        predict(model, processor, adata, file, **options)
        return ad.io.read_elem(file)


def _check_summary(summary: str | os.PathLike, others: dict, model):
    """ValueError if a summary cannot be written, or something is asked for that only an output of cells has."""
    if Path(summary).suffix not in TABLES:
        raise ValueError(f"--summary {summary}: expected a name that ends in {' or '.join(TABLES)}")
    asked = [name for name, value in others.items() if value is not None]
    if asked:
        raise ValueError(f"{', '.join(asked)}: a summary holds no cells; leave it out, or write an output")
    if model.is_ceiling:
        raise ValueError(
            "this model decodes observed cells (the ceiling of decoding), which no control cell is paired with"
        )


def _warn(processor: StateProcessor, arms: list[Arm], cells_of: dict[str, int] | None):
    """
    Say what is new to the model, which perturbations had no clear change in training, and where there are fewer control cells
    than predicted cells are asked for.
    """
    names = dict.fromkeys(arm.perturbation for arm in arms)
    new_doses = processor.unseen_doses(names)
    if new_doses:
        logger.warning(f"no training cell had the dose of {counted(len(new_doses), 'perturbation')}: {some(new_doses)}")
    found = [] if processor.origin is None else processor.origin.indistinguishable(names, processor.split_combination)
    if found:
        logger.warning(
            f"the change in training of {counted(len(found), 'perturbation')} is not distinguishable from none, so "
            f"predictions of it may be noise: {some(found)}"
        )
    short = [arm for arm in arms if cells_of is not None and len(arm.cells) < cells_of[arm.perturbation]]
    if short:
        named = [f"{a.context} / {a.perturbation}: {len(a.cells)} of {(cells_of or {})[a.perturbation]}" for a in short]
        logger.warning(
            f"{len(short)} of {len(arms)} groups have fewer control cells than predicted cells are asked for, and get one for "
            f"each: {some(named)}"
        )


def _check_layout(layout: OutputLayout, model, processor: StateProcessor):
    """ValueError where control cells cannot be rows beside the predicted cells."""
    config = model.config
    if layout.controls == ROWS and processor.values == Values.EMBEDDING and config.input_dim != config.output_dim:
        raise ValueError(
            f"the model reads embeddings of {config.input_dim} dimensions and predicts others of {config.output_dim}, so that "
            "control cells cannot stand among the predicted ones; leave --with-controls out"
        )


def _stored_controls(
    layout: OutputLayout, chosen: dict[str, np.ndarray], arms: list[Arm], is_ceiling: bool
) -> np.ndarray:
    """The rows of the input whose cells are stored by themselves, each once, context by context."""
    if layout.controls == ROWS:
        return np.concatenate([*chosen.values()])
    if is_ceiling:
        return np.concatenate([arm.cells for arm in arms])  # what went in
    most = {context: max((len(arm.cells) for arm in arms if arm.context == context), default=0) for context in chosen}
    return np.concatenate([rows[: most[context]] for context, rows in chosen.items()])


def _var_of_output(processor: StateProcessor, config, data: AnnDataFile, input: str | None) -> pd.DataFrame:
    if processor.vocabulary.genes:
        return processor.output_var(data, input)
    return pd.DataFrame(index=pd.Index(processor.output_names(config.output_dim), dtype=object))


def _predicted(
    model,
    reader: BatchReader,
    passes: Iterator[list[Unit]],
    sample_counts: int | None,
    unseen: dict[tuple[str, str], None],
    losses: dict[tuple[str, str], list[float]],
) -> Iterator[tuple[list[Unit], np.ndarray, np.ndarray | None, np.ndarray]]:
    """
    Of each pass the predicted cells `(cells, genes)`, where the model decodes them its embedding `(cells, output_dim)`, and the
    features of the cells that went in. The groups that the model predicts in another way are added to `unseen`, and what the
    model says of its own loss in the sentences of a group to `losses`.
    """
    processor = reader.processor
    generator = None if sample_counts is None else torch.Generator(model.device).manual_seed(sample_counts)

    def checked(values: np.ndarray, names: list[str]) -> np.ndarray:
        check_predicted(values, names, lambda row: cell_name(packed, row, reader.labels.index))
        return values

    for packed in passes:
        batch, cells, mask = reader.batch(packed)
        if model.is_ceiling:
            batch[LABELS] = batch[CONTROL_CELLS]
        embedding = None
        with torch.inference_mode(), counted_elsewhere():
            if generator is None:
                outputs = model(**batch)
                values = outputs.predictions.float().cpu().numpy()[mask]
            else:
                drawn = model.sample_counts(**batch, generator=generator).cpu().numpy()[mask]
                values = processor.as_predicted(drawn)
        of_sentences = [unit for unit in packed for _ in unit.sentences]
        if generator is None and outputs.confidence is not None:
            for loss, unit in zip(outputs.confidence.float().tolist(), of_sentences):
                losses.setdefault((unit.arm.context, unit.arm.perturbation), []).append(loss)
        if generator is None and outputs.unseen is not None:
            for flag, unit in zip(outputs.unseen.tolist(), of_sentences):
                if flag:
                    unseen[unit.arm.context, unit.arm.perturbation] = None
        if model.config.gene_dim is not None:
            embedding = checked(values, processor.output_names(values.shape[1]))
            values = outputs.gene_predictions.float().cpu().numpy()[mask]
        names = processor.vocabulary.genes or processor.output_names(values.shape[1])
        yield packed, checked(values, names), embedding, cells


def check_perturbations(model, encoded: dict[str, np.ndarray], processor: StateProcessor):
    """
    Check that a model can predict these perturbations, which its processor has encoded.

    Raises:
        UnseenPerturbationError: it cannot predict some of them, which are named.
    """
    try:
        model.check_perturbations(**{key: torch.from_numpy(v).to(model.device) for key, v in encoded.items()})
    except UnseenPerturbationError as error:
        raise UnseenPerturbationError(error.ids, error.reason, processor.vocabulary.perturbations) from None


def check_batches(processor: StateProcessor, names: np.ndarray):
    """ValueError that names the batches of cells that a model, which uses batches, was not trained on."""
    found = pd.unique(names)
    unknown = [name for name, number in zip(found, processor.encode_batches(found)) if number < 0]
    if unknown:
        several = processor.batch_datasets is not None and processor.dataset is None
        raise ValueError(
            f"control cells of batches without training cells: {some(unknown)}; "
            + (
                f"say which of the datasets {processor.batch_datasets} they are of (--dataset)"
                if several
                else f"the model knows {some(processor.vocabulary.batches)}, and predicts only from control cells of these"
            )
        )


@contextmanager
def counted_elsewhere() -> Iterator[None]:
    """Silence the model's warnings about what was not in training. The caller counts such cases over all batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnseenWarning)
        yield


def _asked(
    processor: StateProcessor,
    perturbations: list[str] | str | None,
    doses: list[float] | None,
    cells: "int | Mapping[str, int] | None",
) -> tuple[list[str] | None, dict[str, int] | None]:
    """
    Canonical names of what is asked for, at each dose; and the number of cells of each, where a table says it.

    Raises:
        ValueError: doses are given and no perturbation is named, or the model knows no doses; the table lacks a perturbation.
    """
    if not isinstance(cells, Mapping):
        if perturbations is None and doses is not None:
            raise ValueError("doses: name the perturbations that are predicted at them (--perturbation, or --all)")
        return None if perturbations is None else processor.named(perturbations, doses), None
    table = {name: number for name, number in cells.items() if processor.canonical(name) != processor.control}
    if perturbations is not None:
        known = {processor.canonical(name): number for name, number in table.items()}
        table = wanted_cells(known, processor.named(perturbations))
    named = {at: number for name, number in table.items() for at in processor.named([name], doses)}
    return list(named), named
