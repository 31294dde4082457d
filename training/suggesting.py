"""Settings that optuna suggests: values from lists and ranges, each chosen from the scores of those before."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


_RANGE = re.compile(r"(?P<low>[^.].*?)\.\.(?P<high>.+?)(?P<log>:log)?")
# Of a number between the ends of a range, so many digits are tried, said and kept.
_DIGITS = 4


@dataclass(frozen=True)
class Range:
    """
    Numbers between two ends: whole ones, if both ends are written so.

    Args:
        low, high (`int` or `float`): both ends may be taken.
        log (`bool`): equal factors are equally likely, not equal differences.
    """

    low: int | float
    high: int | float
    log: bool

    def suggested(self, trial: Any, field: str) -> str:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return str(trial.suggest_int(field, self.low, self.high, log=self.log))
        return f"{trial.suggest_float(field, self.low, self.high, log=self.log):.{_DIGITS}g}"


def range_of(text: str) -> Range | None:
    """
    `LOW..HIGH` or `LOW..HIGH:log`; None where the text is no range.

    Raises:
        ValueError: it is one, of ends that are no numbers or not in order.
    """
    if ".." not in text or "," in text:
        return None
    found = _RANGE.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        low, high = (_number(found[end]) for end in ("low", "high"))
        if not low < high < float("inf") or low == float("-inf") or (found["log"] and low <= 0):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text}: expected LOW..HIGH or LOW..HIGH:log, two numbers of which the first is smaller (and positive with :log)"
        ) from None
    return Range(low, high, found["log"] is not None)


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def check_optuna():
    """ImportError that says what to install, if optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("--trials needs optuna: pip install 'pertstate[tune]'") from error


def search(
    space: dict[str, list[str] | Range],
    trials: int,
    value_of: Callable[[dict[str, str]], float],
    maximize: bool,
) -> list[dict[str, str]]:
    """
    Try settings one after the other, each suggested by optuna's tree-structured Parzen estimator (Bergstra et al. 2011) from the
    values of those before. The sampler is seeded, so a search that begins again suggests the same settings as long as their
    values are the same: what was trained already need not be stored a second time.

    Args:
        space (`dict`): of each field the values, or their range.
        trials (`int`): settings to try. One may be suggested again.
        value_of (`Callable`): trains and scores a setting.
        maximize (`bool`): whether the best value is the highest.

    Returns:
        The settings, each once, in the order in which they were tried.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
    tried: list[dict[str, str]] = []
    for _ in range(trials):
        trial = study.ask()
        setting = {
            field: values.suggested(trial, field)
            if isinstance(values, Range)
            else trial.suggest_categorical(field, values)
            for field, values in space.items()
        }
        value = value_of(setting)
        if value != value:  # no figure, as of a correlation with a constant
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
        if setting not in tried:
            tried.append(setting)
    return tried
