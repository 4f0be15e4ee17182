"""Metrics of generated answers: one table, a row each.

Comes in: what a model answered and what it should have. Goes out: a number per sample, 1 at best; of all samples their
mean, an interval around it, and what a metric says of them all.

    {"yes_no": 0.84, "yes_no_precision": 0.88, "yes_no_recall": 0.79, "yes_no_f1": 0.83, "yes_no_yes_rate": 0.45}
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SHORT_ANSWER_WORDS = 3
_CHOICE = re.compile(r"\W*([A-Za-z])(?=\s*$|[.):,\n])")
_NUM_RESAMPLES = 1000
Of = Callable[[str, str], float]


def exact_match(answer: str, reference: str) -> float:
    """Compare two short answers without case, punctuation at the ends, or repeated spaces."""
    return float(_normalized(answer) == _normalized(reference))


def anls(answer: str, reference: str) -> float:
    """Return 1 less the edits that lead from one text to the other, per character of the longer; 0 from half on.

    For answers that are read from documents (Biten et al. 2019, arXiv:1905.13648: normalised Levenshtein similarity).
    """
    one, other = (" ".join(text.lower().split()) for text in (answer, reference))
    share = _num_edits(one, other) / max(len(one), len(other), 1)
    return 1 - share if share < 0.5 else 0.0


def yes_no(answer: str, reference: str) -> float:
    """Say whether an answer means yes where the reference does, and no where it does."""
    return float(_means_yes(answer) == _means_yes(reference))


def multiple_choice(answer: str, reference: str) -> float:
    """Compare the letters with which two answers begin: `B`, `(b)`, `B. A dog`."""
    one, other = (_CHOICE.match(text) for text in (answer, reference))
    return float(one is not None and other is not None and one[1].upper() == other[1].upper())


def yes_no_shares(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return precision, recall and F1 of `yes`, and how often it is said (POPE: Li et al. 2023, arXiv:2305.10355).

    A model that always says yes has the recall of a good one; its precision and its yes-rate tell.
    """
    said, true = (np.array([_means_yes(text) for text in texts]) for texts in (answers, references))
    right = float((said & true).sum())
    precision, recall = right / max(said.sum(), 1), right / max(true.sum(), 1)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    shares = {"precision": precision, "recall": recall, "f1": f1, "yes_rate": float(said.mean())}
    return {name: float(value) for name, value in shares.items()}


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        of_answer: a sample's value, of its answer and its reference.
        suits: whether `metrics: auto` takes it, of all references.
        of_all: what it says of all answers and references together, by name.
    """

    of_answer: Of
    suits: Callable[[Sequence[str]], bool]
    of_all: Callable[[Sequence[str], Sequence[str]], Mapping[str, float]] = lambda answers, references: {}


METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, lambda texts: all(len(text.split()) <= _SHORT_ANSWER_WORDS for text in texts)),
    "yes_no": Metric(yes_no, lambda texts: {_normalized(text) for text in texts} <= {"yes", "no"}, yes_no_shares),
    "multiple_choice": Metric(multiple_choice, lambda texts: all(re.fullmatch(r"\(?[A-Z]\W*", text) for text in texts)),
    "anls": Metric(anls, lambda texts: False),
}
"""From a name in the summary to how it is measured."""


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by the percentile bootstrap (Efron 1979) with 1,000 resamples.

    Args:
        values: one per sample.
        weights: of each sample in the mean, above 0; by default all alike.
    """
    rng = np.random.default_rng(0)
    of_sample = np.asarray(values, float)
    weight = np.ones(len(of_sample)) if weights is None else np.asarray(weights, float)
    means = []
    for _ in range(_NUM_RESAMPLES):
        counts = np.bincount(rng.integers(0, len(of_sample), len(of_sample)), minlength=len(of_sample)) * weight
        means.append(float(counts @ of_sample / counts.sum()))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _normalized(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \t\n.,!?;:'\"").lower()


def _means_yes(text: str) -> bool:
    """POPE's rule: the first sentence means yes unless it holds `no` or `not`."""
    words = re.findall(r"[a-z']+", text.partition(".")[0].lower())
    return bool(words) and not {"no", "not"} & set(words)


def _num_edits(one: str, other: str) -> int:
    """Return the fewest letters to put in, take out or change (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        above, row[0] = row[0], number
        for place, theirs in enumerate(other, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (letter != theirs))
    return row[-1]
