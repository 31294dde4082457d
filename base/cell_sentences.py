"""What a processor makes of control cells: sentences for a model."""

import pandas as pd
from transformers import BatchFeature


class CellSentences(BatchFeature):
    """
    Model-ready tensors, `model(**sentences)`, and where each cell came from.

    Attributes:
        obs (`pandas.DataFrame`): one row per real (not padded) cell, in the order of the tensors.
        controls (`str`): which control cells went in, in words.
    """

    obs: pd.DataFrame
    controls: str


__all__ = ["CellSentences"]
