"""
Training steps on sentences of different lengths, in the ways of batching them, in one run.

    python benchmarks/short_sentences.py
    python benchmarks/short_sentences.py --device cuda --preset base --sentences 16 --cells 512 --dtype bfloat16
    python benchmarks/short_sentences.py --preset tiny --cells 12 --genes 20 --steps 1    # only shows that it runs

The lengths are drawn between a tenth of the longest and the longest. The ways take turns on equal sentences:

- whole: sentences are padded to the longest of their batch, and the padding is computed (a batch of so many sentences)
- packed: the same batches, and nothing is computed of the padding
- by cells: batches of as many cells as full sentences would have (`cells_per_batch: auto`), packed

The fastest time of an epoch of each is shown, because other work on the machine only adds time.
"""

import argparse
import contextlib
import time

import torch
from torch import nn

from pertstate import StateConfig, StateForPerturbation, objective_for
from pertstate.data.sentences import SentenceCollator


def batches(sentences: list[dict], cells: int, device: str, places: bool) -> list[dict]:
    """Sentences in their order, in batches of up to so many cells."""
    groups: list[list[dict]] = [[]]
    for sentence in sentences:
        if sum(len(one["labels"]) for one in groups[-1]) + len(sentence["labels"]) > cells:
            groups.append([])
        groups[-1].append(sentence)
    return collated(groups, device, places)


def collated(groups: list[list[dict]], device: str, places: bool) -> list[dict]:
    collate = SentenceCollator(places=places)
    return [{key: value.to(device) for key, value in collate(group).items()} for group in groups]


class Whole(StateForPerturbation):
    """The model as it is with `torch.compile`, and on a GPU without `cell_places`: the padding is computed."""

    def _packing(self, mask, places, options):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--sentences", type=int, default=8, help="of a batch")
    parser.add_argument("--cells", type=int, default=128, help="of the longest sentence")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="other than float32: autocast"
    )
    parser.add_argument("--steps", type=int, default=4, help="batches of an epoch, of so many sentences")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lengths = torch.randint(max(1, args.cells // 10), args.cells + 1, (args.sentences * args.steps,)).tolist()
    sentences = [
        {
            "control_cells": torch.randn(n, args.genes).sub(0.5).relu().numpy(),
            "labels": torch.randn(n, args.genes).sub(0.5).relu().numpy(),
            "perturbation_ids": torch.randint(args.genes, (1,)).numpy(),
        }
        for n in lengths
    ]
    of_sentences = [sentences[i : i + args.sentences] for i in range(0, len(sentences), args.sentences)]
    config = StateConfig.from_preset(
        args.preset, input_dim=args.genes, output_dim=args.genes, num_perturbations=args.genes
    )
    ways = {
        "whole": (Whole, collated(of_sentences, args.device, False)),
        "packed": (StateForPerturbation, collated(of_sentences, args.device, True)),
        "by cells": (
            StateForPerturbation,
            batches(sentences, args.sentences * args.cells, args.device, True),
        ),
    }
    epochs, seconds = {}, {name: [] for name in ways}
    for name, (of_class, of_way) in ways.items():
        torch.manual_seed(1)
        model, objective = of_class(config).to(args.device).train(), objective_for(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        half = args.dtype != "float32"

        def epoch(model=model, objective=objective, optimizer=optimizer, of_way=of_way, half=half):
            for batch in of_way:
                optimizer.zero_grad()
                with torch.autocast(args.device, torch.bfloat16) if half else contextlib.nullcontext():
                    outputs = model(**batch)
                objective(outputs, batch)["loss"].backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
            if args.device == "cuda":
                torch.cuda.synchronize()

        epochs[name] = epoch
    for turn in range(1 + args.repeat):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            epoch()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    padding = 1 - sum(lengths) / sum(batch["control_cells"].shape[:2].numel() for batch in ways["whole"][1])
    print(
        f"{args.preset}, {len(lengths)} sentences of {min(lengths)} to {max(lengths)} cells, {padding:.0%} padding;",
        end=" ",
    )
    print(f"{args.device}, {args.dtype}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'':<12}{'batches':>10}{'cells/s':>12}{'of whole':>10}")
    for name, times in seconds.items():
        ratio = min(seconds["whole"]) / min(times)
        print(f"{name:<12}{len(ways[name][1]):>10}{sum(lengths) / min(times):>12,.0f}{ratio:>10.2f}")


if __name__ == "__main__":
    main()
