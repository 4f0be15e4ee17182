"""Each metric against what its authors define, and an interval against what is known of it."""

import importlib.util
import math

import numpy as np
import pytest

from llavaforge.answers.metrics import (
    METRICS,
    anls,
    bleu_of_all,
    chosen,
    cider,
    exact_match,
    interval,
    measure,
    multiple_choice,
    yes_no,
    yes_no_shares,
)
from llavaforge.answers.vqa import normalized, vqa_accuracy
from llavaforge.errors import UserError


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
    assert anls(answer, [reference]) == pytest.approx(value) == anls(reference, [answer])
    assert anls(answer, ["something else", reference]) >= value


@pytest.mark.parametrize(
    ("answer", "means_yes"),
    [
        *(("Yes", True), ("yes, there is a dog.", True), ("There is a dog. No cat", True)),
        *(("No.", False), ("There is no dog", False), ("It is not there", False), ("", False)),
    ],
)
def test_an_answer_means_yes_as_pope_has_it(answer: str, means_yes: bool) -> None:
    assert yes_no(answer, ["yes"]) == means_yes and yes_no(answer, ["yes", "No", "No"]) == (not means_yes)


def test_shares_of_yes_are_those_of_a_table_counted_by_hand() -> None:
    answers = ["yes"] * 5 + ["no"] * 3
    references = ["yes", "yes", "yes", "no", "no", "yes", "no", "no"]  # 3 of 5 said rightly, 3 of 4 found
    found = yes_no_shares(answers, [[text] for text in references])
    assert found == pytest.approx({"precision": 0.6, "recall": 0.75, "f1": 2 * 0.45 / 1.35, "yes_rate": 5 / 8})
    assert yes_no_shares(["no"], [["yes"]]) == {"precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B", True), ("(b) a dog", True), ("B. A dog", True), ("b", True), ("A", False), ("A dog", False), ("Bob", False)],
)
def test_a_choice_is_told_by_its_letter(answer: str, right: bool) -> None:
    assert multiple_choice(answer, ["B"]) == right


def test_what_suits_all_references_is_taken() -> None:
    suiting = {
        name: [metric for metric in METRICS if METRICS[metric].suits([[text] for text in texts])]
        for name, texts in (("words", ["red", "two cats"]), ("yes", ["Yes.", "no"]), ("letters", ["A", "(C)"]))
    }
    assert suiting["words"] == ["exact_match"]
    assert suiting["yes"] == ["exact_match", "yes_no"]
    assert suiting["letters"] == ["exact_match", "multiple_choice"]
    assert not any(metric.suits([["a caption of more than three words"]]) for metric in METRICS.values())


@pytest.mark.parametrize("same", range(11))
def test_vqa_accuracy_of_ten_people_is_the_formula_counted_out(same: int) -> None:
    people = ["yes"] * same + ["no"] * (10 - same)
    expected = sum(min(1, (same - (person == "yes")) / 3) for person in people) / 10
    assert vqa_accuracy("Yes.", people) == pytest.approx(
        expected if same < 10 else 0
    )  # all alike: nothing is made alike
    assert vqa_accuracy("yes", people) == pytest.approx(expected)
    assert [round(vqa_accuracy("yes", ["yes"] * few + ["no"] * (10 - few)), 6) for few in range(5)] == [
        *(0, 0.3, 0.6, 0.9, 1)
    ]


@pytest.mark.parametrize(
    ("text", "alike"),
    [
        ("The  red, Dog.", "red dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("100,978", "100978"),
        ("1.5 m.", "1.5 m"),
        ("2:50 pm", "2:50 pm"),
        ("girl's t-shirt", "girl's t shirt"),
        ("t-shirt - red", "tshirt red"),  # a mark beside a space is taken away everywhere
    ],
)
def test_answers_are_made_alike_as_the_script_does(text: str, alike: str) -> None:
    assert normalized(text) == alike


def test_captions_are_measured_as_coco_does() -> None:
    references = [["A cat sits on a mat."], ["two dogs, running in the park"]]
    assert cider(["a cat sits on a mat", "two dogs running in the park"], references) == pytest.approx([10, 10])
    assert cider(["two dogs running in the park", "a cat sits on a mat"], references) == pytest.approx([0, 0], abs=0.1)
    # 5 of 6 words, 3 of 5 pairs are the reference's; nothing is shorter than it.
    shares = bleu_of_all(["a cat lies on a mat"], [["a cat sits on a mat"]])
    assert shares["1"] == pytest.approx(5 / 6) and shares["2"] == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    longer = [f"a b c d e f {number}" for number in range(3)]
    together = measure(["bleu"], {"answer": longer}, {"answer": [[text] for text in longer]})
    assert together.of_all == pytest.approx({"bleu_1": 1, "bleu_2": 1, "bleu_3": 1, "bleu_4": 1})
    assert not together.intervals  # the value of all is no mean


def test_one_of_several_references_is_enough() -> None:
    assert exact_match("A sofa.", ["couch", "a sofa"]) == 1 and exact_match("chair", ["couch", "a sofa"]) == 0


def test_a_metric_that_lacks_references_or_a_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(["auto"], [["red"] * 10] * 3) == ["vqa", "exact_match"]
    assert chosen(["auto", "none"], [["red"]]) == []
    with pytest.raises(UserError, match=r"has 1 reference answer.*`answers` of each row"):
        chosen(["vqa"], [["red"] * 10, ["red"]])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pycocoevalcap: pip install 'llavaforge\[metrics\]'"):
        chosen(["cider"], [["red"]])


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
