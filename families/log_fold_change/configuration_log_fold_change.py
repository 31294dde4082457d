"""Configuration of the mean fold change."""

from ...base.configuration_fitted import MeasuredConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class LogFoldChangeConfig(MeasuredConfig):
    r"""
    Configuration of [`LogFoldChangeForPerturbation`], each control cell times the geometric mean fold change of its
    perturbation. The fields of [`MeasuredConfig`]. It takes log1p expression alone.
    """

    model_type = "state-log-fold-change"

    def validate_log_fold_change(self):
        if not self.nonnegative_output:
            raise ValueError(
                "state-log-fold-change multiplies expression, which is never below 0: expected nonnegative_output=True, found "
                "False, as for embeddings; read expression, or use state-perturbation-mean"
            )


__all__ = ["LogFoldChangeConfig"]
