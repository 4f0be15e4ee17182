"""VQA accuracy: how many of ten people gave the model's answer.

Comes in: an answer and what people answered. Goes out: a number from 0 to 1.

The rules are those of visualqa.org/evaluation.html; where its script does more or less than the page says, the script's
way is taken, so that numbers compare (Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837).
"""

import re
from collections.abc import Sequence

_ENOUGH = 3  # people who agree make an answer right
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't "
    "shan't she's should've shouldn't somebody's someone's something's that'd that's there'd there's they'd "
    "they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've "
    "who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've "
).split()
# Not those that are words without it (`were`, `its`, `ill`), nor `i'm` and `i've`, which the script never finds.
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED if word not in ("i'm", "i've")}


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the mean, over all but one of the people in turn, of min(1, number who gave this answer / 3).

    Texts are made alike (`normalized`) only where people differ, as the script has it.

    Args:
        answer: the model's.
        references: what people answered, ten as a rule.
    """
    answer, *people = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *references))
    if len(set(people)) > 1:
        answer, *people = (normalized(text) for text in (answer, *people))
    same = [person.lower() == answer.lower() for person in people]
    return sum(min(1.0, (sum(same) - mine) / _ENOUGH) for mine in same) / len(same)


def normalized(text: str) -> str:
    """Return an answer in lower case without punctuation and articles, with digits for number words."""
    glued = re.search(r"\d,\d", text) is not None  # then no mark leaves a space
    cleaned = text
    for mark in _MARKS:
        cleaned = cleaned.replace(mark, "" if glued or f"{mark} " in text or f" {mark}" in text else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
