"""The one pass over the training cells that families without gradients are fitted in."""

from accelerate import Accelerator
from accelerate.utils import gather_object

from pertstate.data.group_sums import GroupSums
from pertstate.data.sentences import SentenceDataset
from pertstate.data.stream_survey import check_controls
from pertstate.data.streaming import SentenceStream


def gather_sums(dataset: SentenceDataset | SentenceStream, accelerator: Accelerator, progress: bool) -> GroupSums:
    """
    Counts and sums of all training cells and of their controls, the same on every process. Of cells in memory or in a
    store each process takes some groups, so that several give what one does, to the bit; of a stream each reads its
    own part, and their sums agree with those of one process to the rounding of float64.

    Raises:
        ValueError: training cells have no control cells of their dataset and context.
    """
    if isinstance(dataset, SentenceStream):
        sums = dataset.group_sums(progress)
    else:
        sums = dataset.group_sums(accelerator.process_index, accelerator.num_processes, progress)
    sums = GroupSums.merged(gather_object([sums]))
    check_controls(sums.lonely)
    return sums
