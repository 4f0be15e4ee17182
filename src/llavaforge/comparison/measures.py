"""The measures of a comparison: their values by variant and seed, and how they are told.

Comes in: results of runs. Goes out: `Values` of each measure, and texts.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from llavaforge.comparison.runs import Run
from llavaforge.comparison.spread import Difference

LOSS = "loss"
NOT_SHARES = (LOSS, "cider")  # from 0 to 10; all others from 0 to 1
_BLEU = "bleu_4"  # of all answers together: it has no interval over samples
Values = dict[str, dict[int, float]]  # of one measure, by variant and seed


def measures_of(results: Mapping[Run, dict[str, Any]]) -> dict[str, Values]:
    """Return every measure that all runs have, by variant and seed; the loss first."""
    measures: dict[str, Values] = {}
    of_runs = [result["evaluation"] for result in results.values()]
    names = [*of_runs[0]["intervals"], _BLEU] if of_runs else []
    for name in (name for name in names if all(name in one for one in of_runs)):
        for run, result in results.items():
            if (value := result["evaluation"][name]) is not None:  # a loss that is not finite
                measures.setdefault(name, {}).setdefault(run.variant.name, {})[run.seed] = value
    return measures


def name_of(measure: str) -> str:
    """Return what texts call a measure."""
    return "held-out loss" if measure == LOSS else measure.replace("_", " ")


def in_words(one: Difference) -> str:
    """Return a sentence on a difference."""
    title, higher, lower, mean, low, high = name_of(one.measure), one.one, one.other, one.mean, one.low, one.high
    if not mean:
        return f"{higher} and {lower} have the same {title} with every seed."
    if mean < 0:
        higher, lower, mean = lower, higher, -mean
        low, high = (None, None) if low is None or high is None else (-high, -low)
    better, how, worse = (lower, "lower", higher) if one.measure == LOSS else (higher, "higher", lower)
    text = f"{better} has a {how} {title} than {worse}, by {_amount(one.measure, mean)}"
    if low is None or high is None or one.p is None or one.p_among_all is None:
        return text + (f" with each of {one.num_seeds} seeds." if one.num_seeds > 1 else ".")
    interval = f"{_amount(one.measure, low).removesuffix(' points')} to {_amount(one.measure, high)}"
    return f"{text} (95 % interval {interval}; p = {one.p:.2g}, among all comparisons {one.p_among_all:.2g})."


def in_cell(measure: str, values: Sequence[float]) -> str:
    """Return the mean over seeds and its spread as the table has them."""
    if measure in NOT_SHARES:
        return mean_and_spread(values, 4)
    return mean_and_spread([100 * one for one in values], 1, " %")


def mean_and_spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Return mean and standard deviation; the mean alone of one value."""
    if not values:
        return "-"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "") + unit


def _amount(measure: str, value: float) -> str:
    return f"{value:.4f}" if measure in NOT_SHARES else f"{100 * value:.1f} points"
