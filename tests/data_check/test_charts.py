"""Histograms hold every value once, at its place, whatever the values."""

import re

import numpy as np
import pytest

from llavaforge.data_check.charts import histogram

_BAR = re.compile(
    r'<rect class="bar" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"><title>(.*?): ([\d,]+)'
)


def bars(page: str) -> list[tuple[float, float, str, int]]:
    """Each bar's middle, height, name and count."""
    return [
        (float(x) + float(width) / 2, float(height), name, int(number.replace(",", "")))
        for x, _, width, height, name, number in _BAR.findall(page)
    ]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1000),
        np.random.default_rng(0).lognormal(8, 2, 3000).astype(int) + 1,
        np.random.default_rng(0).lognormal(0, 3, 500),
        np.full(9, 5),
        np.full(9, 0.25),
        np.array([0, 0, 1_000_000]),
        np.array([-3.5, 2.0]),
    ],
    ids=["whole", "long tail", "long tail of fractions", "all equal", "equal fractions", "outlier", "negative"],
)
def test_every_value_is_in_one_bar_inside_the_picture(values: np.ndarray) -> None:
    page = histogram(values, "Values", "tokens", num_bins=40)
    found = bars(page)
    assert sum(number for *_, number in found) == len(values)
    assert len(found) <= 40
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', page)[0])
    assert all(0 < x < width and height >= 1 for x, height, *_ in found)
    assert ("logarithmic" in page) == (values.min() > 0 and values.max() > 20 * np.median(values))


def test_whole_numbers_get_whole_bins_in_proportion() -> None:
    found = bars(histogram(np.array([2] * 10 + [3] * 5 + [7]), "Images", "images"))
    assert [(name, number) for *_, name, number in found] == [("2 images", 10), ("3 images", 5), ("7 images", 1)]
    (x2, h2, *_), (x3, h3, *_), (x7, *_) = found
    assert x7 - x2 == pytest.approx(5 * (x3 - x2), abs=0.1)
    assert h2 == pytest.approx(2 * h3, abs=0.1)


def test_a_mark_stands_at_its_value_and_one_far_away_is_named_at_the_edge() -> None:
    page = histogram(np.arange(101), "Length", "tokens", marks={"max_length": 50, "context": 1e6})
    (middle,) = [x for x, _, name, _ in bars(page) if name.startswith("48 to 50")]
    lines = re.findall(r'<line class="mark" x1="([\d.]+)"', page)
    assert len(lines) == 1
    assert float(lines[0]) == pytest.approx(middle + 5, abs=3)  # 50 is the upper end of its bin
    assert "context 1,000,000 (outside)" in page


def test_no_values_and_hostile_names() -> None:
    assert "No values." in histogram(np.array([], dtype=int), "Empty", "tokens")
    page = histogram(np.arange(3), '"><script>', "<b>", marks={"</svg>": 1})
    assert not re.search(r"<script|<b>|</svg>.*</svg>", page, re.DOTALL)
