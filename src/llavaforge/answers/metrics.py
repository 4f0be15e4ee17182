"""Metrics of answers: one table, a row each.

Comes in: what a model answered and what it should have, one or several references a sample. Goes out: a number per
sample, 1 at best (CIDEr: 10); of all samples their mean, an interval around it, and what a metric says of them all.

    {"yes_no": 0.84, "yes_no_precision": 0.88, "yes_no_recall": 0.79, "yes_no_f1": 0.83, "yes_no_yes_rate": 0.45}
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llavaforge.answers.vqa import vqa_accuracy
from llavaforge.errors import UserError

_SHORT_ANSWER_WORDS = 3
_CHOICE = re.compile(r"\W*([A-Za-z])(?=\s*$|[.):,\n])")
_NUM_RESAMPLES = 1000
_BLEU_ORDER = 4
_WORD = re.compile(r"n't|'\w+|\w+?(?=n't)|\w+")
References = Sequence[str]


def exact_match(answer: str, references: References) -> float:
    """Say whether an answer is one of the references but for case, punctuation at the ends, and repeated spaces."""
    return float(_normalized(answer) in map(_normalized, references))


def anls(answer: str, references: References) -> float:
    """Return 1 less the edits that lead to the nearest reference, per character of the longer text; 0 from half on.

    For answers that are read from documents (Biten et al. 2019, arXiv:1905.13648: normalised Levenshtein similarity).
    """
    from rapidfuzz.distance import Levenshtein

    own, *others = (" ".join(text.lower().split()) for text in (answer, *references))
    nearest = max(Levenshtein.normalized_similarity(own, other) for other in others)
    return nearest if nearest > 0.5 else 0.0


def yes_no(answer: str, references: References) -> float:
    """Say whether an answer means yes where the references do, and no where they do."""
    return float(means_yes(answer) == means_yes(most_common(references)))


def multiple_choice(answer: str, references: References) -> float:
    """Compare the letters with which two answers begin: `B`, `(b)`, `B. A dog`."""
    one, others = _CHOICE.match(answer), [_CHOICE.match(text) for text in references]
    return float(one is not None and any(other and one[1].upper() == other[1].upper() for other in others))


def yes_no_shares(answers: Sequence[str], references: Sequence[References]) -> dict[str, float]:
    """Return precision, recall and F1 of `yes`, and how often it is said (POPE: Li et al. 2023, arXiv:2305.10355).

    A model that always says yes has the recall of a good one; its precision and its yes-rate tell.
    """
    said = np.array([means_yes(text) for text in answers])
    true = np.array([means_yes(most_common(texts)) for texts in references])
    right = float((said & true).sum())
    precision, recall = right / max(said.sum(), 1), right / max(true.sum(), 1)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    shares = {"precision": precision, "recall": recall, "f1": f1, "yes_rate": float(said.mean())}
    return {name: float(value) for name, value in shares.items()}


def cider(answers: Sequence[str], references: Sequence[References]) -> list[float]:
    """Return CIDEr-D of captions (Vedantam et al. 2015, arXiv:1411.5726), by the reference implementation.

    Rare words count more: how rare they are is told by the references of all samples together. Words are split here
    and not by the Java program of COCO's pipeline, so that numbers may differ from its in the third figure.
    """
    from pycocoevalcap.cider.cider import Cider

    return [float(value) for value in Cider().compute_score(*_coco_form(answers, references))[1]]


def bleu(answers: Sequence[str], references: Sequence[References]) -> list[float]:
    """Return BLEU-4 of each caption (Papineni et al. 2002), by COCO's implementation; words as in `cider`."""
    return _bleu(answers, references)[1][-1]


def bleu_of_all(answers: Sequence[str], references: Sequence[References]) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4 of all captions together, which is not their mean."""
    return {str(order): value for order, value in enumerate(_bleu(answers, references)[0], 1)}


def most_common(references: References) -> str:
    """Return the reference that occurs most often, the first of several."""
    return Counter(references).most_common(1)[0][0]


def _each(of_answer: Callable[[str, References], float]) -> Callable[..., list[float]]:
    def of_answers(answers: Sequence[str], references: Sequence[References]) -> list[float]:
        return [of_answer(answer, mine) for answer, mine in zip(answers, references, strict=True)]

    return of_answers


def _all(suits: Callable[[str], object]) -> Callable[[Sequence[References]], bool]:
    return lambda references: all(suits(text) for texts in references for text in texts)


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        of_answers: the samples' values, of their answers and references.
        suits: whether `metrics: auto` takes it, of all samples' references.
        of_all: what it says of all answers and references together, by name.
        is_mean: whether the mean of the samples' values is its value of all.
        of: what it judges: what the model said, or which of the offered options it finds likeliest.
        least_references: how many a sample must have.
        library: that it needs, of the extra `metrics`.
    """

    of_answers: Callable[[Sequence[str], Sequence[References]], Sequence[float]]
    suits: Callable[[Sequence[References]], bool] = lambda references: False
    of_all: Callable[[Sequence[str], Sequence[References]], Mapping[str, float]] = lambda answers, references: {}
    is_mean: bool = True
    of: Literal["answer", "likeliest_choice"] = "answer"
    least_references: int = 1
    library: str = ""


METRICS: dict[str, Metric] = {
    "vqa": Metric(_each(vqa_accuracy), lambda all_: all(len(texts) == 10 for texts in all_), least_references=4),
    "exact_match": Metric(_each(exact_match), _all(lambda text: len(text.split()) <= _SHORT_ANSWER_WORDS)),
    "yes_no": Metric(_each(yes_no), _all(lambda text: _normalized(text) in ("yes", "no")), yes_no_shares),
    "multiple_choice": Metric(_each(multiple_choice), _all(lambda text: re.fullmatch(r"\(?[A-Z]\W*", text))),
    "multiple_choice_likelihood": Metric(_each(multiple_choice), of="likeliest_choice"),
    "anls": Metric(_each(anls), library="rapidfuzz"),
    "cider": Metric(cider, library="pycocoevalcap"),
    "bleu": Metric(bleu, of_all=bleu_of_all, is_mean=False, library="pycocoevalcap"),
}
"""From a name in the summary to how it is measured."""


def chosen(metrics: Sequence[str], references: Sequence[References]) -> list[str]:
    """Return the names of what is measured.

    Args:
        metrics: as the user gave them: names, `auto`, `none`.
        references: of every sample.

    Raises:
        UserError: one cannot be measured: its library is not there, or references are missing.
    """
    if "none" in metrics:
        return []
    suiting = {name for name, metric in METRICS.items() if "auto" in metrics and metric.suits(references)}
    names = [name for name in METRICS if name in suiting or name in metrics]
    for name in names:
        metric, fewest = METRICS[name], min(map(len, references))
        if metric.library and importlib.util.find_spec(metric.library) is None:
            raise UserError(f"--metrics {name} needs {metric.library}: pip install 'llavaforge[metrics]'.")
        if fewest < metric.least_references:
            raise UserError(
                f"--metrics {name}: a sample has {fewest} reference answer(s), and it needs {metric.least_references} "
                "or more (VQAv2 has ten). Give them as `answers` of each row, a list of texts."
            )
    return names


@dataclass(frozen=True)
class Scores:
    """What was measured.

    Attributes:
        of_samples: each metric's values, one per sample.
        of_all: the values of all samples together, by name.
        intervals: 95 % intervals of the means.
    """

    of_samples: dict[str, Sequence[float]]
    of_all: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def measure(
    metrics: Sequence[str], answers: Mapping[str, Sequence[str]], references: Mapping[str, Sequence[References]]
) -> Scores:
    """Measure answers.

    Args:
        metrics: names of the table.
        answers: of all samples, by what they are (`Metric.of`).
        references: of all samples, likewise.
    """
    scores = Scores({}, {}, {})
    for name in metrics:
        metric = METRICS[name]
        values = scores.of_samples[name] = metric.of_answers(answers[metric.of], references[metric.of])
        if metric.is_mean:
            scores.of_all[name], scores.intervals[name] = sum(values) / len(values), interval(values)
        shares = metric.of_all(answers[metric.of], references[metric.of])
        scores.of_all.update({f"{name}_{share}": value for share, value in shares.items()})
    return scores


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


def means_yes(text: str) -> bool:
    """Say what an answer means, by POPE's rule: the first sentence means yes unless it holds `no` or `not`."""
    words = re.findall(r"[a-z']+", text.partition(".")[0].lower())
    return bool(words) and not {"no", "not"} & set(words)


def _coco_form(
    answers: Sequence[str], references: Sequence[References]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and answers as COCO's code takes them: by number, words with single spaces between."""
    words = [[" ".join(_WORD.findall(text.lower())) for text in texts] for texts in references]
    return dict(enumerate(words)), {
        number: [" ".join(_WORD.findall(text.lower()))] for number, text in enumerate(answers)
    }


def _bleu(answers: Sequence[str], references: Sequence[References]) -> tuple[list[float], list[list[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu

    of_all, of_samples = Bleu(_BLEU_ORDER).compute_score(*_coco_form(answers, references), verbose=0)
    return of_all, of_samples
