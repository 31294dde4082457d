"""Cells put together as the sentences of a batch: in training, in prediction, in evaluation and by a processor."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from transformers import BatchFeature

from .constants import CELL_MASK


class CellSentences(BatchFeature):
    """
    Model-ready tensors, `model(**sentences)`, and where each cell came from.

    Attributes:
        obs (`pandas.DataFrame`): one row per real (not padded) cell, in the order of the tensors.
        var (`pandas.DataFrame`): the model's genes, with the columns of var of the data.
        controls (`str`): which control cells went in, in words.
        groups (`list[tuple[str, str]]`): each (context, perturbation).
        weights (`list[float]`, *optional*): doses that a model without doses takes as weights.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    controls: str
    groups: list[tuple[str, str]]
    weights: list[float] | None


class SentenceLayout:
    """
    How the cells of B sentences lie in a batch: each sentence is padded with zeros to the longest one, of S cells.

    Args:
        sizes (sequence of `int`): cells of each sentence.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.shape = (len(self.sizes), int(self.sizes.max()))
        self.full = bool((self.sizes == self.shape[1]).all())
        self.mask = np.arange(self.shape[1]) < self.sizes[:, None]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of all cells, one sentence after another, `(cells, ..)`, as `(B, S, ..)`."""
        if self.full:
            return values.reshape(*self.shape, *values.shape[1:])
        spread = np.zeros((*self.shape, *values.shape[1:]), dtype=values.dtype)
        spread[self.mask] = values
        return spread

    def read(self, rows: list[np.ndarray], width: int, take: Callable[[np.ndarray, np.ndarray], object]) -> np.ndarray:
        """
        Features of cells `(B, S, width)` float32, read into their places.

        Args:
            rows (`list[np.ndarray]`): the rows of the cells of each sentence.
            take (`Callable`): reads some rows into an array `(len(rows), width)`.
        """
        cells = np.empty((*self.shape, width), dtype=np.float32)
        if self.full:  # all sentences in one go
            take(np.concatenate(rows), cells.reshape(-1, width))
            return cells
        for sentence, of_sentence in zip(cells, rows):
            take(of_sentence, sentence[: len(of_sentence)])
            sentence[len(of_sentence) :] = 0
        return cells

    def batch(self, values: "Mapping[str, np.ndarray | torch.Tensor]", masked: bool = False) -> dict[str, torch.Tensor]:
        """
        The tensors of the batch, with `cell_mask` where a sentence is padded.

        Args:
            values (`dict[str, np.ndarray]`): by the keys of a batch. Tensors stay as they are.
            masked (`bool`): with `cell_mask` in any case.
        """
        masks = {CELL_MASK: self.mask} if masked or not self.full else {}
        return {
            key: value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            for key, value in {**values, **masks}.items()
        }


__all__ = ["CellSentences"]
