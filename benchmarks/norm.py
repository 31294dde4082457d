"""
Time of the root mean square norm of the backbone on a CPU, forward and backward, beside torch's own.

    python benchmarks/norm.py [--threads 1]

Both take turns; the fastest of each counts. The last column is the largest difference of the gradients, over the largest gradient.
"""

import argparse
import time

import torch
from torch import nn

from pertstate.base.modeling_layers import RMSNorm


SHAPES = ((8, 64, 328), (8, 64, 512), (4, 512, 512), (16, 512, 512))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} threads\n{'cells':<16}{'torch, ms':>10}{'ours, ms':>10}{'ratio':>8}{'error':>10}"
    )
    for shape in SHAPES:
        torch.manual_seed(0)
        x, grad, norm = torch.randn(shape, requires_grad=True), torch.randn(shape), RMSNorm(shape[-1], eps=1e-6)

        def of(forward, x=x, norm=norm, grad=grad):
            return torch.autograd.grad(forward(x), (x, norm.weight), grad)

        sides = {"torch": lambda x, norm=norm: nn.RMSNorm.forward(norm, x), "ours": norm}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeat):
            for name, forward in sides.items():
                start = time.perf_counter()
                of(forward)
                seconds[name].append(time.perf_counter() - start)
        theirs, ours = (1000 * min(seconds[name]) for name in sides)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(of(norm), of(sides["torch"])))
        print(f"{shape!s:<16}{theirs:>10.2f}{ours:>10.2f}{ours / theirs:>8.2f}{error:>10.1e}", flush=True)


if __name__ == "__main__":
    main()
