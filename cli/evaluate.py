"""`pertstate evaluate`."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pertstate.base.console import say, show
from pertstate.base.messages import counted
from pertstate.cli.reading import add_reading_arguments, reading_of


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--predicted", metavar="P.h5ad", help="predicted cells of `pertstate predict` or another tool")
    parser.add_argument(
        "--model",
        metavar="CHECKPOINT",
        help="folder or Hub repository of a checkpoint. Its record says what it was trained on. Without --predicted it predicts "
        "the cells that are scored",
    )
    parser.add_argument("--revision", help="revision of the Hub repository")
    parser.add_argument("--real", required=True, metavar="R.h5ad", help="real perturbed and control cells")
    parser.add_argument(
        "--train", metavar="TRAIN.h5ad", help="cells that the baselines learn from, if no record of a model says which"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="OTHER",
        help="compare with these, each a checkpoint or a file of predicted cells, on the groups that all of them predict: one table, "
        "each beside the first by the paired bootstrap",
    )
    parser.add_argument("--output", metavar="TABLE.csv", help="also write the table, .csv or .json")
    parser.add_argument("--scores", metavar="FOLDER", help="also write the folder that `pertstate report` reads")
    parser.add_argument("--plots", metavar="FOLDER", help="also write the pictures of the report, each as PNG and PDF")
    parser.add_argument("--overwrite", action="store_true", help="replace a table, scores and pictures that are there")
    add_reading_arguments(parser)
    parser.add_argument("--context", nargs="+", help="score these contexts; if the files have no such column, one name")
    parser.add_argument("--perturbation", nargs="+", metavar="NAME", help="score these perturbations")
    parser.add_argument("--input", help="where real cells are read: X, layers/NAME or obsm/NAME")
    parser.add_argument(
        "--convert-scale", action="store_true", help="convert log1p values of another total than the model's"
    )
    parser.add_argument(
        "--common-genes",
        action="store_true",
        help="score the genes that both files have, if the real cells lack some of the predicted ones",
    )
    parser.add_argument(
        "--cells",
        default="1000",
        metavar="N",
        help="at most N cells of each kind in a group, drawn at random (default 1000), or all. Time grows with the square of N",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also show these figures: mse, variance_ratio, zeros, mmd, sinkhorn, discrimination, or all",
    )
    parser.add_argument(
        "--cell-eval",
        action="store_true",
        help="also find the metrics of the package cell-eval for the same cells: differential expression, discrimination, ..",
    )
    parser.add_argument("--include-seen", action="store_true", help="average over groups that were trained on, too")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw and of the intervals")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask scheduler whose workers score (tcp://HOST:8786, or its scheduler file); they see the files under the same names, and "
        "the cells are predicted already",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace):
    from pertstate.base.outputs import check_apart, claimed_folder, whole_folder
    from pertstate.evaluation.cell_eval_scores import check_cell_eval
    from pertstate.evaluation.comparison import claimed_table, evaluate, table_of, write_table
    from pertstate.evaluation.further_metrics import check_metrics
    from pertstate.evaluation.metrics import FURTHER
    from pertstate.evaluation.pictures import FOLDER, save_pictures
    from pertstate.evaluation.plots import check_matplotlib
    from pertstate.evaluation.scores import SCORES, format_scores

    if args.overwrite and not (args.output or args.scores or args.plots):
        raise ValueError("--overwrite has no effect without --output, --scores or --plots")
    if args.plots:
        check_matplotlib()
    if args.predicted is None and args.model is None:
        raise ValueError("name the predicted cells with --predicted, or the model that is to predict them with --model")
    if args.cells != "all" and not (args.cells.isdigit() and int(args.cells) > 0):
        raise ValueError(f"--cells {args.cells}: expected a number of at least 1, or all")
    check_metrics(args.metrics, (*FURTHER, "all"))
    metrics = tuple(name for name in FURTHER if name in args.metrics or "all" in args.metrics)
    check_metrics(metrics, FURTHER)
    if args.cell_eval:
        check_cell_eval()
    if args.against:
        _names(args)
    # The scores and the plots may share a folder.
    check_apart(output=args.output, scores=args.scores)
    check_apart(output=args.output, plots=args.plots)
    # Before there is any work to lose.
    with (
        claimed_table(args.output, args.overwrite) if args.output else nullcontext(),
        claimed_folder(args.scores, SCORES, args.overwrite) if args.scores else nullcontext(),
        claimed_folder(args.plots, FOLDER, args.overwrite) if args.plots else nullcontext(),
    ):
        model = processor = record = None
        if args.model is not None:
            model, processor, record = _checkpoint(args.model, args.revision, "--model")
        options = {
            "quiet": args.quiet,
            "convert_scale": args.convert_scale,
            "max_cells": None if args.cells == "all" else int(args.cells),
            "seed": args.seed,
            "include_seen": args.include_seen,
            "common_genes": args.common_genes,
            "scheduler": args.scheduler,
            **reading_of(args),
            "input": args.input,
        }
        scores = evaluate(
            args.predicted,
            args.real,
            args.train,
            model=model if args.predicted is None else None,
            processor=processor,
            record=record,
            contexts=args.context,
            perturbations=args.perturbation,
            metrics=metrics,
            cell_eval=args.cell_eval,
            **options,
        )
        if args.against:
            _compare(scores, args, options)
        for note in scores.notes:
            say(f"note: {note}", sys.stderr)
        show(format_scores(scores, tuple(name for name in metrics if name in scores.table)))
        if args.scores:
            with whole_folder(args.scores, SCORES) as folder:
                scores.save(folder)
        if args.plots:
            save_pictures(scores, [], args.plots)
        if args.output:
            write_table(table_of(scores), args.output, args.overwrite)


def _compare(scores, args: argparse.Namespace, options: dict[str, Any]):
    """Compare the scored model with others, on the groups that all predict: a table, and a note for each other model."""
    from dataclasses import replace

    from pertstate.evaluation.scores import against, compare_models

    first, *others = _names(args)
    models = {first: scores} | {
        name: _scored(scores, word, args, options) for name, word in zip(others, args.against, strict=True)
    }
    scores.models = compare_models(models, args.seed)
    groups = [{result.group for result in of.results} for of in models.values()]
    common = set.intersection(*groups)
    if left := len(set.union(*groups) - common):
        scores.notes.append(f"{counted(left, 'group')} left out of the comparison, as not all of the models have them")
    shared = {
        name: replace(of, results=[result for result in of.results if result.group in common])
        for name, of in models.items()
    }
    scores.notes += [against(shared[first], shared[other], (first, other), args.seed) for other in others]


def _names(args: argparse.Namespace) -> list[str]:
    """What the models are called, the scored one first: the last part of a path, or all of it if two models share that."""
    words = [args.model or args.predicted, *args.against]
    short = [Path(word).name for word in words]
    names = short if len(set(short)) == len(short) else words
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--against: {twice} is named twice; name each model once")
    return names


def _scored(scores, other: str, args: argparse.Namespace, options: dict[str, Any]):
    """The scores of another model on the groups of these scores."""
    from pertstate.evaluation.comparison import evaluate

    groups = [result.group for result in scores.results]
    chosen: dict[str, Any] = {
        "contexts": sorted({context for _, context, _ in groups}),
        "perturbations": sorted({perturbation for *_, perturbation in groups}),
    }
    if Path(other).is_file():
        return evaluate(other, args.real, **chosen, **options)
    model, processor, record = _checkpoint(other, None, "--against")
    return evaluate(None, args.real, model=model, processor=processor, record=record, **chosen, **options)


def _checkpoint(name: str, revision: str | None, flag: str):
    """The model, the processor and the record of a checkpoint."""
    import transformers

    from pertstate.hub.trained import open_checkpoint

    transformers.utils.logging.disable_progress_bar()
    opened = open_checkpoint(name, revision, flag)
    return opened.model, opened.processor, opened.record
