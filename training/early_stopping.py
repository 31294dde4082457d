"""Ending a training once its evaluations get no better."""

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from pertstate.base.printable import get_logger


logger = get_logger(__name__)


def stale_evaluations(state: TrainerState, metric: str, greater_is_better: bool) -> int:
    """How many evaluations came after the best one. They are counted in the history, so that a run that is continued counts on."""
    values = [entry[metric] for entry in state.log_history if metric in entry]
    if not values:
        return 0
    best = max(values) if greater_is_better else min(values)
    return len(values) - 1 - values.index(best)


class EarlyStopping(TrainerCallback):
    """
    Stops after so many evaluations without a better one. The best step is kept, as `load_best_model_at_end` says.

    Args:
        patience (`int`): evaluations.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def has_come(self, args, state: TrainerState) -> bool:
        """Whether a training in this state is to take no further step."""
        return stale_evaluations(state, _metric(args), bool(args.greater_is_better)) >= self.patience

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if _metric(args) in (metrics or {}) and self.has_come(args, state) and not control.should_training_stop:
            control.should_training_stop = True
            logger.info(
                f"step {state.global_step}: {self.patience} evaluations without a better {_metric(args)}, the training ends here"
            )


def _metric(args) -> str:
    return (
        args.metric_for_best_model
        if args.metric_for_best_model.startswith("eval_")
        else f"eval_{args.metric_for_best_model}"
    )
