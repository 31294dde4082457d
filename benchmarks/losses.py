"""
The time of the losses, forward and backward, beside geomloss in the same run.

    python benchmarks/losses.py
    python benchmarks/losses.py --device cuda
    python benchmarks/losses.py --small    # only shows that it runs

Ours and geomloss' take turns; the fastest time of each is shown, because other work on the machine only adds time. Padded batches
have sentences of all lengths from a quarter of the cells up. Geomloss has no masks: it takes them one after another.
"""

import argparse
import time

import torch
from geomloss import SamplesLoss

from pertstate.losses import EnergyLoss, SinkhornLoss


SHAPES = ((8, 64, 2000), (16, 128, 2000), (4, 512, 2000), (16, 178, 50))
KINDS = {
    "energy": (EnergyLoss(), SamplesLoss("energy", backend="tensorized")),
    "sinkhorn": (SinkhornLoss(0.05), SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")),
}


def seconds(work, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(kind: str, shape: tuple[int, int, int], padded: bool, device: str, repeat: int):
    """The fastest times of ours and of geomloss', and the largest relative difference of their values."""
    torch.manual_seed(0)
    ours, theirs = KINDS[kind]
    x, y = (torch.randn(shape, device=device).relu() for _ in range(2))
    x.requires_grad_()
    mask = None
    if padded:
        lengths = torch.linspace(shape[1] / 4, shape[1], shape[0], device=device).long()
        mask = torch.arange(shape[1], device=device) < lengths[:, None]

    def of_theirs():
        if mask is None:
            return theirs(x, y)
        return torch.cat([theirs(one[m][None], other[m][None]) for one, other, m in zip(x, y, mask)])

    both = (lambda: ours(x, y, mask)), of_theirs
    values = [value().detach() for value in both]
    times = [
        [seconds(lambda value=value: torch.autograd.grad(value().sum(), x), device) for value in both]
        for _ in range(1 + repeat)
    ]
    apart = ((values[0] - values[1]).abs() / values[1].abs()).max().item()
    return *(min(column) for column in zip(*times[1:])), apart


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a size that takes a second")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}; sentences, cells, genes")
    print(f"{'':<34}{'ours, ms':>12}{'geomloss, ms':>14}{'geomloss/ours':>15}{'values differ by':>18}")
    for kind in KINDS:
        for shape in ((2, 8, 20),) if args.small else SHAPES:
            for padded in (False, True):
                ours, theirs, apart = compare(kind, shape, padded, args.device, args.repeat)
                name = f"{kind} {shape}{' padded' if padded else ''}"
                print(
                    f"{name:<34}{1e3 * ours:>12.2f}{1e3 * theirs:>14.2f}{theirs / ours:>15.2f}{apart:>18.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
