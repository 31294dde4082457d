"""`pertstate predict`."""

import argparse

from pertstate.base.console import say
from pertstate.base.messages import counted
from pertstate.cli.reading import add_reading_arguments, reading_of


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="folder or Hub repository of a checkpoint or an adapter")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of a Hub repository")
    parser.add_argument("--adata", required=True, metavar="IN.h5ad", help="file with control cells of each context")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="OUT.h5ad", help="file to write, .h5ad or .zarr, whole or not at all")
    what.add_argument(
        "--summary",
        metavar="TABLE.parquet",
        help="table to write instead of cells, .parquet or .csv: mean, change and interval of each group and gene",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--perturbation",
        nargs="+",
        metavar="NAME",
        help="perturbations to predict, A+B for a combination; by default those of the file's own cells",
    )
    which.add_argument("--all", action="store_true", help="every single perturbation that the model was trained on")
    parser.add_argument(
        "--perturbation-features",
        metavar="FILE",
        help="vectors of further perturbations, for a model on perturbation features: .safetensors, .npz, .csv, .parquet",
    )
    parser.add_argument(
        "--dose",
        "--doses",
        nargs="+",
        type=float,
        metavar="D",
        help="predict each perturbation at each of these doses, for a model that was trained with dose_key",
    )
    parser.add_argument(
        "--context",
        nargs="+",
        metavar="NAME",
        help="contexts (cell types or lines); by default all. If the file has no such column, one name, the context of all cells",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--all-are-controls",
        action="store_true",
        help="every cell of the file is a control; no perturbation column is read",
    )
    parser.add_argument(
        "--cells-per-perturbation",
        metavar="N",
        help="at most N control cells of each context; by default all. Or a CSV table with the columns target_gene and n_cells: "
        "so many cells of each, and by default these perturbations",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draw of cells and of their grouping into sentences"
    )
    parser.add_argument(
        "--sample-counts",
        type=int,
        metavar="SEED",
        help="for a model on counts: draw cells, with the noise that real counts have, from this seed",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sentences in one forward pass")
    parser.add_argument("--input", help="read cells from X, layers/NAME or obsm/NAME instead of the model's own choice")
    parser.add_argument(
        "--missing-genes",
        choices=("error", "zero"),
        default="error",
        help="what to do if the file lacks genes of the model; zero reads them as not expressed",
    )
    parser.add_argument(
        "--max-missing-genes",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="with --missing-genes zero, the largest share of the model's genes that may be missing",
    )
    parser.add_argument(
        "--convert-scale",
        action="store_true",
        help="convert log1p values whose cells sum to another total than those of the training cells",
    )
    parser.add_argument(
        "--obs-columns",
        nargs="+",
        metavar="NAME",
        help="obs columns to copy from each control cell to its predicted cell; columns of var are always copied",
    )
    layout = parser.add_argument_group("layout of the output")
    controls = layout.add_mutually_exclusive_group()
    controls.add_argument(
        "--with-controls",
        action="store_true",
        help="real control cells as rows, before the predicted cells; their perturbation is the control",
    )
    controls.add_argument(
        "--control-layer",
        action="store_true",
        help="each predicted cell's control cell beside it, in layers/control; by default each is stored once",
    )
    layout.add_argument("--sparse", action="store_true", help="write matrices as CSR")
    layout.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the matrices; float16 keeps three digits"
    )
    others = parser.add_argument_group("for cell-eval and the Virtual Cell Challenge")
    others.add_argument(
        "--cell-eval",
        nargs="?",
        const="",
        metavar="REAL.h5ad",
        help="write the output as cell-eval takes it, with control cells, and the real cells of the same perturbations to this "
        "file, if one is named",
    )
    others.add_argument(
        "--cell-eval-column", metavar="NAME", help="column of obs with the perturbation (default target_gene)"
    )
    others.add_argument(
        "--cell-eval-control", metavar="NAME", help="label of control cells in it (default non-targeting)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ..; by default an accelerator if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _load(name: str, revision: str, device: str | None, quiet: bool):
    """The model, on its device, and the processor of a checkpoint folder or Hub repository; and the name of what was loaded."""
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    from pertstate.hub.trained import on_device, open_checkpoint

    if quiet:
        disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    opened = open_checkpoint(name, revision, "--model")
    return on_device(opened.model, device, "--device"), opened.processor, opened.name


def run(args: argparse.Namespace):
    from contextlib import nullcontext

    from pertstate.evaluation.predicted_file import claimed_output
    from pertstate.evaluation.shared_passes import SharedPasses

    _cell_eval(args)
    shared = SharedPasses(args.device)
    # Before there is any work to lose.
    claimed = (
        claimed_output(args.output or args.summary, args.adata, args.overwrite) if shared.writes else nullcontext()
    )
    with claimed:
        _predict(args, shared)


def _cell_eval(args: argparse.Namespace):
    """How cell-eval wants the output; None where nobody asks for that."""
    from pertstate.evaluation.cell_eval import CellEval

    names = {"column": args.cell_eval_column, "control": args.cell_eval_control}
    named = {name: value for name, value in names.items() if value is not None}
    if args.cell_eval is None:
        if named:
            raise ValueError("--cell-eval-column and --cell-eval-control have no effect without --cell-eval")
        return None
    return CellEval(real=args.cell_eval or None, **named)


def _layout(args: argparse.Namespace):
    """The layout that is asked for; None where it is the default."""
    from pertstate.evaluation.predicted_file import LAYER, ONCE, ROWS, OutputLayout

    controls = ROWS if args.with_controls else LAYER if args.control_layer else ONCE
    layout = OutputLayout(controls, args.sparse, args.dtype)
    return None if layout == OutputLayout() else layout


def _cells(text: str | None):
    """A number of cells, or a table of them."""
    from pertstate.evaluation.cell_eval import read_cell_counts

    if text is None:
        return None
    return int(text) if text.lstrip("-").isdigit() else read_cell_counts(text)


def _predict(args: argparse.Namespace, shared):
    from pertstate.base.checkpoint_files import hub_arguments
    from pertstate.data.perturbation_features import read_perturbation_features
    from pertstate.data.record import RunRecord
    from pertstate.evaluation.prediction import predict

    layout, cells = _layout(args), _cells(args.cells_per_perturbation)
    further = read_perturbation_features(args.perturbation_features) if args.perturbation_features else None
    model, processor, loaded = _load(args.model, args.revision, shared.device, args.quiet)
    if further is not None:
        processor.add_perturbation_features(further.names, further.vectors)
    needs_record = args.summary or getattr(model.config, "confidence_token", False)
    record = RunRecord.load(args.model, hub_arguments({"revision": args.revision})) if needs_record else None
    done = predict(
        model,
        processor,
        args.adata,
        args.output,
        perturbations="all" if args.all else args.perturbation,
        contexts=args.context,
        cells_per_perturbation=cells,
        seed=args.seed,
        batch_size=args.batch_size,
        missing_genes=args.missing_genes,
        input=args.input,
        sample_counts=args.sample_counts,
        checkpoint=loaded,
        quiet=args.quiet,
        reading=reading_of(args),
        all_are_controls=args.all_are_controls,
        doses=args.dose,
        convert_scale=args.convert_scale,
        max_missing_genes=args.max_missing_genes,
        obs_columns=args.obs_columns,
        overwrite=args.overwrite,
        layout=layout,
        summary=args.summary,
        cell_eval=_cell_eval(args),
        intervals=None if record is None else record.intervals,
        calibration=None if record is None else record.calibration,
        shared=shared,
    )
    if not shared.writes:
        return
    cells = counted(done["cells"], "cell")
    if done["control_rows"]:
        cells = f"{counted(done['cells'], 'predicted cell')} and {counted(done['control_rows'], 'control cell')}"
    doses = f" ({done['dosed']:,} with their doses)" if done["dosed"] > done["perturbations"] else ""
    say(
        f"{args.output or args.summary}: {cells}, {counted(done['perturbations'], 'perturbation')}{doses} "
        f"in {counted(done['contexts'], 'context')}"
    )
