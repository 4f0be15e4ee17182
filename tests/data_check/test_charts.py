"""Histograms hold every value once, in its range, whatever the values."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from llavaforge.data_check.charts import histogram


def bars(figure: str) -> dict[str, int]:
    """The number of values by the range that a bar tells under the pointer; empty ranges left out."""
    found = re.findall(r"<title>(.*?): ([\d,]+)</title>", figure)
    return {name: int(number.replace(",", "")) for name, number in found if number != "0"}


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1000),
        np.arange(41),
        np.random.default_rng(0).lognormal(8, 2, 3000).astype(int) + 1,
        np.full(9, 5),
        np.array([0]),
        np.array([0, 0, 1_000_000]),
    ],
    ids=["many", "one more than bins", "long tail", "all equal", "one zero", "outlier"],
)
def test_every_value_is_in_the_bar_of_its_range(values: np.ndarray) -> None:
    figure = histogram(values, "Values", "tokens")
    found = bars(figure)
    assert 0 < len(found) <= 40
    for name, number in found.items():
        first, last = re.fullmatch(r"([\d,]+)(?: to ([\d,]+))? tokens", name).groups()  # type: ignore[union-attr]
        begin = int(first.replace(",", ""))
        end = int(last.replace(",", "")) if last else begin
        assert number == np.count_nonzero((values >= begin) & (values <= end))
    assert sum(found.values()) == len(values)
    assert f"{len(values):,} values" in figure


def test_whole_numbers_get_whole_bins_and_every_bar_is_seen() -> None:
    values = np.array([2] * 1_000_000 + [3] * 5 + [7])
    figure = histogram(values, "Images", "images")
    assert bars(figure) == {"2 images": 1_000_000, "3 images": 5, "7 images": 1}
    outlined = re.findall(r"<title>[^<]*</title>\s*<path [^>]*stroke-width: 2[;\"]", figure)
    assert len(outlined) == 3  # a bar of 1 beside one of a million is no pixel high


def test_a_long_tail_gets_ranges_that_grow() -> None:
    def ranges(values: np.ndarray) -> list[str]:
        return list(bars(histogram(values, "Length", "tokens")))

    assert ranges(np.array([1, 1, 1, 1000]))[-1] == "842 to 1,000 tokens"
    assert ranges(np.array([1, 900, 1000]))[0] == "1 to 25 tokens"


def test_max_length_is_marked_and_named_at_the_edge_when_far_away() -> None:
    near, far = (histogram(np.arange(101), "Length", "tokens", limit) for limit in (120, 1_000_000))
    assert ">max_length 120<" in near and "stroke-dasharray" in near
    assert ">max_length 1,000,000 (outside)<" in far and "stroke-dasharray" not in far


def test_the_figure_is_safe_follows_the_page_and_is_the_same_again() -> None:
    figure = histogram(np.arange(3), '"><script>', "<b>&", 2)
    ET.fromstring(re.sub(r"xlink:href", "href", figure))  # well-formed: nothing of the names became a tag
    assert not re.search(r"<script|<b>|http|<metadata|<image|@import", figure)
    colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", figure))
    assert colours == {"none", "var(--bar)", "var(--bad-ink)", "var(--faint)"}
    assert figure == histogram(np.arange(3), '"><script>', "<b>&", 2)


def test_no_values() -> None:
    figure = histogram(np.array([], dtype=int), "Empty", "tokens")
    assert "Empty" in figure and "No values." in figure
