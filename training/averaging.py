"""The moving average of the weights. It is evaluated and saved; training steps continue from the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pertstate.base.files import share


# The weights that a training continues from, beside the averaged ones of a checkpoint.
LAST_WEIGHTS = "last_weights.safetensors"


class WeightAverage(TrainerCallback):
    r"""
    The exponential moving average of the trainable weights over steps (Polyak & Juditsky 1992; as in Tarvainen & Valpola
    2017): after step t it is moved towards the weights by `1 - min(decay, t / (t + 9))`, so that the first steps count less
    and less.

    Args:
        model (`torch.nn.Module`): whose weights are averaged.
        decay (`float`): between 0 and 1; about the last `1 / (1 - decay)` steps count.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = model, decay
        self._average: dict[str, torch.Tensor] = {}
        self._swapped = False
        self._checkpoint: str | None = None

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def continue_from(self, checkpoint: str | None):
        """The checkpoint that the next training continues, whose weights are the averaged ones; None where it starts anew."""
        if checkpoint is not None and not Path(checkpoint, LAST_WEIGHTS).is_file():
            raise ValueError(
                f"average_decay: {checkpoint} is of a run that did not average its weights; continue it without average_decay"
            )
        self._checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        self._average = {name: weight.detach().clone() for name, weight in self._weights().items()}
        if self._checkpoint is not None:
            last = load_file(Path(self._checkpoint, LAST_WEIGHTS))
            with torch.no_grad():
                for name, weight in self._weights().items():
                    weight.copy_(last[name])

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        share = 1 - min(self.decay, state.global_step / (state.global_step + 9))
        for name, weight in self._weights().items():
            self._average[name].lerp_(weight.detach(), share)

    @torch.no_grad()
    def _swap(self):
        for name, weight in self._weights().items():
            last = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name] = last
        self._swapped = not self._swapped

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        if self._swapped or not self._average:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save_last(self, folder: Path):
        """Write, inside [`WeightAverage.applied`], the weights that the training goes on from."""
        save_file({name: weight.contiguous() for name, weight in self._average.items()}, folder / LAST_WEIGHTS)
        share(folder / LAST_WEIGHTS)

    def finish(self, keep: bool = True):
        """
        End the averaging.

        Args:
            keep (`bool`): leave the model with the averaged weights; without, with those that it has.
        """
        if keep and self._average and not self._swapped:
            self._swap()
        self._average, self._swapped = {}, False
