"""`pertstate predict`."""

import argparse
from pathlib import Path
from typing import Any

from pertstate.base.console import say
from pertstate.base.public import last_part
from pertstate.cli.reading import add_reading_arguments, reading_of


HELP = "Predict perturbed cells from the control cells of an .h5ad."


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="folder or Hub repository of a checkpoint or an adapter")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of a Hub repository")
    parser.add_argument("--adata", required=True, metavar="IN.h5ad", help="file with control cells of each context")
    parser.add_argument("--output", required=True, metavar="OUT.h5ad", help="file to write, whole or not at all")
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
        help="contexts (cell types or lines); by default all. One name is that of all cells where the file has no such column",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--all-are-controls",
        action="store_true",
        help="every cell of the file is a control; no perturbation column is read",
    )
    parser.add_argument(
        "--cells-per-perturbation",
        type=int,
        metavar="N",
        help="at most N control cells of each context; by default all",
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
        help="columns of obs of the control cells that the predicted cells get; columns of var come through by themselves",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ..; by default an accelerator if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _load(name: str, revision: str, device: str | None, quiet: bool):
    """The model, on its device, and the processor of a checkpoint folder or Hub repository; and the name of what was loaded."""
    import torch
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    from pertstate.hub.checkpoints import check_name, load_whole
    from pertstate.hub.push import fetch_checkpoint
    from pertstate.hub.unfinished import model_folder

    check_name(name, "--model")
    path, loaded = Path(name), last_part(name)
    if path.is_dir():
        path = model_folder(path)
        loaded = loaded if path == Path(name) else f"{loaded}/{path.name}"
    else:
        if quiet:
            disable_progress_bars()
        path = fetch_checkpoint(name, revision)
        loaded = f"{name}@{path.name}"
    transformers.utils.logging.disable_progress_bar()
    model: Any  # the library's `to` is wrapped so that no argument fits its type
    model, processor = load_whole(str(path))
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        return model.to(device), processor, loaded
    except (RuntimeError, AssertionError) as error:
        # torch raises either for a device that it does not know or was not built for.
        raise ValueError(f"--device {device}: {error}") from error


def run(args: argparse.Namespace):
    from pertstate.evaluation.prediction import claimed_output

    # Before there is any work to lose.
    with claimed_output(args.output, args.adata, args.overwrite):
        _predict(args)


def _predict(args: argparse.Namespace):
    from pertstate.data.perturbation_features import read_perturbation_features
    from pertstate.evaluation.prediction import predict

    further = read_perturbation_features(args.perturbation_features) if args.perturbation_features else None
    model, processor, loaded = _load(args.model, args.revision, args.device, args.quiet)
    if further is not None:
        processor.add_perturbation_features(further.names, further.vectors)
    done = predict(
        model,
        processor,
        args.adata,
        args.output,
        perturbations=processor.vocabulary.perturbations if args.all else args.perturbation,
        contexts=args.context,
        cells_per_perturbation=args.cells_per_perturbation,
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
    )
    say(f"{args.output}: {done['cells']:,} cells, {done['perturbations']} perturbations in {done['contexts']} contexts")
