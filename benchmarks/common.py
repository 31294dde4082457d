"""What the accuracy benchmarks share."""

import torch


def threads(count: int | None):
    """Let torch compute with so many threads; None leaves it as it is."""
    if count:
        torch.set_num_threads(count)
