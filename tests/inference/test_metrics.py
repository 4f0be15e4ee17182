"""Each metric against what its authors define, and an interval against what is known of it."""

import math

import numpy as np
import pytest

from llavaforge.inference.metrics import METRICS, anls, interval, multiple_choice, yes_no, yes_no_shares


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("Dr.  Smith", "dr. smith", 1.0),
        ("dr smith", "dr. smith", 1 - 1 / 9),
        ("kitten", "sitting", 1 - 3 / 7),
        ("abcd", "abxy", 0.0),  # half of it differs
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_anls_is_one_less_the_share_of_edits(answer: str, reference: str, value: float) -> None:
    assert anls(answer, reference) == pytest.approx(value) == anls(reference, answer)


@pytest.mark.parametrize(
    ("answer", "means_yes"),
    [
        *(("Yes", True), ("yes, there is a dog.", True), ("There is a dog. No cat", True)),
        *(("No.", False), ("There is no dog", False), ("It is not there", False), ("", False)),
    ],
)
def test_an_answer_means_yes_as_pope_has_it(answer: str, means_yes: bool) -> None:
    assert yes_no(answer, "yes") == means_yes and yes_no(answer, "No") == (not means_yes)


def test_shares_of_yes_are_those_of_a_table_counted_by_hand() -> None:
    answers = ["yes"] * 5 + ["no"] * 3
    references = ["yes", "yes", "yes", "no", "no", "yes", "no", "no"]  # 3 of 5 said rightly, 3 of 4 found
    found = yes_no_shares(answers, references)
    assert found == pytest.approx({"precision": 0.6, "recall": 0.75, "f1": 2 * 0.45 / 1.35, "yes_rate": 5 / 8})
    assert yes_no_shares(["no"], ["yes"]) == {"precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B", True), ("(b) a dog", True), ("B. A dog", True), ("b", True), ("A", False), ("A dog", False), ("Bob", False)],
)
def test_a_choice_is_told_by_its_letter(answer: str, right: bool) -> None:
    assert multiple_choice(answer, "B") == right


def test_what_suits_all_references_is_taken() -> None:
    suiting = {
        name: [metric for metric in METRICS if METRICS[metric].suits(texts)]
        for name, texts in (("words", ["red", "two cats"]), ("yes", ["Yes.", "no"]), ("letters", ["A", "(C)"]))
    }
    assert suiting["words"] == ["exact_match"]
    assert suiting["yes"] == ["exact_match", "yes_no"]
    assert suiting["letters"] == ["exact_match", "multiple_choice"]
    assert not any(metric.suits(["a caption of more than three words"]) for metric in METRICS.values())


def test_an_interval_is_as_wide_as_the_mean_is_uncertain() -> None:
    values = np.random.default_rng(0).integers(0, 2, 400).tolist()
    low, high = interval(values)
    error = 1.96 * np.std(values) / math.sqrt(400)
    assert low == pytest.approx(np.mean(values) - error, abs=0.01)
    assert high == pytest.approx(np.mean(values) + error, abs=0.01)
    assert interval([1.0] * 5) == (1.0, 1.0)
    assert interval(values, [2.0] * 400) == pytest.approx((low, high))
    weights = [1.0 + 9 * value for value in values]  # the mean of tokens, not of samples
    assert interval(values, weights)[0] > high
