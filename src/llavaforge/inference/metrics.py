"""Metrics of generated answers: one table, a row each. `evaluate` gives each one's mean, and its value per sample."""

import re
from collections.abc import Callable


def exact_match(answer: str, reference: str) -> float:
    """Compare two short answers without case, punctuation at the ends, or repeated spaces."""
    return float(_normalized(answer) == _normalized(reference))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
}
"""From a name in the summary to a function of an answer and its reference, 1 at best."""


def _normalized(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \t\n.,!?;:'\"").lower()
