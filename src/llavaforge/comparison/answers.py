"""Sample answers side by side: a few held-out records, and what each variant answers with each seed.

Comes in: finished runs. Goes out: a `Card` for each record.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llavaforge.comparison.runs import Run
from llavaforge.comparison.variants import Variant
from llavaforge.data.load.loader import BadImage
from llavaforge.data.storage.image_ref import short
from llavaforge.report.glyphs import visible
from llavaforge.report.pictures import thumbnail_url

_NUM_DIFFERENT, _NUM_EVENLY = 4, 4
_LONGEST_TEXT = 600


@dataclass(frozen=True)
class Answer:
    """What a variant answers, and with how many seeds."""

    text: str
    num_seeds: int
    is_right: bool


@dataclass(frozen=True)
class Card:
    """One held-out record.

    Attributes:
        id: the record's own.
        pictures: its images as data URLs.
        question: the last one of the conversation.
        reference: the right answer.
        answers: of each variant, the commonest first.
        differ: the variants, or seeds, do not answer alike.
    """

    id: str
    pictures: list[str]
    question: str
    reference: str
    answers: dict[str, list[Answer]]
    differ: bool


def make_cards(runs: Sequence[Run]) -> list[Card]:
    """Choose records, evenly over the held-out data: some of those that are not answered alike first, then of the rest.

    Args:
        runs: finished ones, whose models have answered the same records.
    """
    lines = {run: run.answers() for run in runs}
    lines = {run: mine for run, mine in lines.items() if mine and "answer" in mine[0]}
    if not lines:
        return []
    num_records = min(map(len, lines.values()))
    differ = [number for number in range(num_records) if len({mine[number]["answer"] for mine in lines.values()}) > 1]
    alike = sorted(set(range(num_records)) - set(differ))
    chosen = [*_evenly(differ, _NUM_DIFFERENT), *_evenly(alike, _NUM_EVENLY)]
    return [_card(number, lines, number in set(differ)) for number in chosen]


def _evenly(numbers: list[int], most: int) -> list[int]:
    places = np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers)), dtype=int))
    return [numbers[place] for place in places.tolist()]


def _card(number: int, lines: dict[Run, list[dict[str, Any]]], differ: bool) -> Card:
    of_variants: dict[str, Counter[tuple[str, bool]]] = {}
    for run, mine in lines.items():
        line = mine[number]
        said = (_shown(line["answer"]), bool(line["correct"]))
        of_variants.setdefault(run.variant.name, Counter())[said] += 1
    first = next(iter(lines))
    line = lines[first][number]
    answers = {
        name: [Answer(text, times, is_right) for (text, is_right), times in said.most_common()]
        for name, said in of_variants.items()
    }
    question, reference = (_shown(line[key]) for key in ("question", "reference"))
    return Card(line["id"], _pictures(first.variant, number), question, reference, answers, differ)


def _shown(text: str) -> str:
    return visible(short(text.strip(), _LONGEST_TEXT))


def _pictures(variant: Variant, number: int) -> list[str]:
    """Return a record's images as the model sees them, made small; none where one cannot be read any more."""
    try:
        row = variant.held_out.index.row(int(variant.held_out.rows[number]))
        return [thumbnail_url(pixels_CHW) for pixels_CHW in variant.dataset.pixels(row)]
    except BadImage:
        return []
