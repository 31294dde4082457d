"""Where the batches of a training are made: in memory, or on the device, where the cells then stay."""

from pertstate.base.printable import get_logger
from pertstate.data.cells import Cells
from pertstate.data.cells_on_device import CellsOnDevice
from pertstate.data.sentences import SentenceDataset
from pertstate.training.arguments import StateTrainingArguments


logger = get_logger(__name__)


class Placing:
    """
    Puts the cells of a training on its device, where the arguments ask for it.

    Args:
        args ([`StateTrainingArguments`]): `cells_on_device`.
    """

    def __init__(self, args: StateTrainingArguments):
        self.args = args
        self._placed: tuple[Cells, CellsOnDevice] | None = None

    def place(self, dataset):
        """
        Put the cells of a training dataset on the device, and make its batches there.

        Raises:
            ValueError: all cells are asked for, and they do not fit, or the cells of the dataset are not known in advance.
        """
        if not self.args.keeps_cells_on_device:
            return
        whole = self.args.cells_on_device is True
        if not isinstance(dataset, SentenceDataset):
            if whole:
                raise ValueError(
                    "cells_on_device=true: expected cells in memory or in a store, found a stream, whose cells are not known in "
                    "advance; leave it out"
                )
            return
        if self._placed is None or self._placed[0] is not dataset.cells:
            there = CellsOnDevice(dataset.cells, self.args.device, whole)
            logger.info(f"cells_on_device: {there}")
            self._placed = dataset.cells, there
        dataset.place_cells(self._placed[1])

    def share(self, dataset):
        """Make the batches of another dataset on the device, if its cells are there already."""
        if self._placed is not None and isinstance(dataset, SentenceDataset) and dataset.cells is self._placed[0]:
            dataset.place_cells(self._placed[1])
