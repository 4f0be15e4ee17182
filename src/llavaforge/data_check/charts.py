"""Charts as inline SVG, which take their colours from the page (`style.css`) and so follow light and dark.

Comes in: numbers. Goes out: `Markup` for a page's template.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from llavaforge.report.page import count, fragment

Numbers = npt.NDArray[Any]

_TEMPLATE = Path(__file__).parent / "histogram.html.jinja"

_WIDTH, _HEIGHT = 640.0, 190.0  # of a chart, before the labels of marks are put on top
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 14.0, 10.0, 38.0
_MARK_ROW = 14.0
# A tail this many times longer than the median would leave a linear axis with all bars in its first pixels.
_LONG_TAIL = 20
# A mark further than this beyond the data is named at the edge instead of stretching the axis.
_FAR = 3
_NUM_TICKS = 6


def histogram(
    values: Numbers, title: str, unit: str, num_bins: int = 40, marks: Mapping[str, float] | None = None
) -> Markup:
    """Draw how often values occur.

    The axis is logarithmic when all values are above zero and some are far above most. Each bar tells its range and
    number under the pointer; a bar that is not empty is always visible.

    Args:
        values: one-dimensional, finite; may be empty or all the same. Whole numbers get whole bins.
        title: what is counted, such as `Length of samples`.
        unit: of the values, such as `tokens`.
        num_bins: most bars.
        marks: labelled vertical lines, such as `{"max_length": 2048}`.

    Returns:
        A `<figure>`.
    """
    values = np.asarray(values).ravel()
    if not values.size:
        return fragment(_TEMPLATE, title=title, plot=None)
    edges, is_log = _edges(values, num_bins)
    counts = np.histogram(values, edges)[0]
    marks = marks or {}
    plot = _Plot.of(edges, is_log, _is_whole(values), int(counts.max()), marks)
    facts = f"{count(values.size)} values; smallest {count(values.min())}, median {count(np.median(values))}, "
    return fragment(
        _TEMPLATE,
        title=title,
        unit=unit,
        summary=f"{facts}largest {count(values.max())} {unit}",
        plot=plot,
        bars=[plot.bar(a, b, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True) if n],
        names=[_range_name(a, b, values) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True) if n],
        counts=[int(n) for n in counts if n],
        x_ticks=[(plot.x(tick), count(tick)) for tick in plot.x_ticks],
        y_ticks=[(plot.y(tick), count(tick)) for tick in _ticks(0, plot.most, is_whole=True)],
        marks=[plot.mark(row, name, value) for row, (name, value) in enumerate(marks.items())],
    )


class _Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float


class _Mark(NamedTuple):
    x: float
    y: float
    label: str
    anchor: str
    is_far: bool


@dataclass(frozen=True)
class _Plot:
    """From numbers to places in the picture: values from `low` to `high`, counts from 0 to `most`."""

    low: float
    high: float
    most: int
    is_log: bool
    is_whole: bool
    top: float

    @classmethod
    def of(cls, edges: Numbers, is_log: bool, is_whole: bool, most: int, marks: Mapping[str, float]) -> "_Plot":
        low, high = float(edges[0]), float(edges[-1])
        near = [mark for mark in marks.values() if (mark > 0 or not is_log) and mark <= _FAR * high]
        return cls(min([low, *near]), max([high, *near]), most, is_log, is_whole, _TOP + _MARK_ROW * len(marks))

    @property
    def width(self) -> float:
        return _WIDTH

    @property
    def bottom(self) -> float:
        return self.top + _HEIGHT - _TOP - _BOTTOM

    @property
    def height(self) -> float:
        return self.bottom + _BOTTOM

    @property
    def left(self) -> float:
        return _LEFT

    @property
    def right(self) -> float:
        return _WIDTH - _RIGHT

    def x(self, value: float) -> float:
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 2)

    def y(self, number: float) -> float:
        return round(self.bottom - number / self.most * (self.bottom - self.top), 2)

    @property
    def x_ticks(self) -> list[float]:
        return (_log_ticks if self.is_log else _ticks)(self.low, self.high, self.is_whole)

    def bar(self, begin: float, end: float, number: int) -> _Box:
        x, top = self.x(begin), min(self.y(number), self.bottom - 1.5)
        return _Box(x, top, max(round(self.x(end) - x - 0.5, 2), 1.0), round(self.bottom - top, 2))

    def mark(self, row: int, name: str, value: float) -> _Mark:
        is_far = not self.low <= value <= self.high
        x = (self.left if value < self.low else self.right) if is_far else self.x(value)
        anchor = "end" if x > (self.left + self.right) / 2 else "start"
        return _Mark(x, _MARK_ROW * (row + 1), f"{name} {count(value)}", anchor, is_far)


def _edges(values: Numbers, num_bins: int) -> tuple[Numbers, bool]:
    """Return the borders of the bins, and whether they grow by a factor."""
    low, high, is_whole = float(values.min()), float(values.max()), _is_whole(values)
    is_log = low > 0 and high > _LONG_TAIL * float(np.median(values))
    if is_log and is_whole:
        return np.unique(np.round(np.geomspace(low, high + 1, num_bins + 1))) - 0.5, True
    if is_log:
        return np.geomspace(low, high, num_bins + 1), True
    if is_whole:
        width = math.ceil((high - low + 1) / num_bins)
        return low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1), False
    if low == high:
        return np.array([low - 0.5, low + 0.5]), False
    return np.linspace(low, high, num_bins + 1), False


def _range_name(begin: float, end: float, values: Numbers) -> str:
    if not _is_whole(values):
        return f"{count(begin)} to {count(end)}"
    first, last = round(begin + 0.5), round(end - 0.5)
    return count(first) if first == last else f"{count(first)} to {count(last)}"


def _is_whole(values: Numbers) -> bool:
    return values.dtype.kind in "iu"


def _ticks(low: float, high: float, is_whole: bool) -> list[float]:
    """Return round numbers in a range, 1, 2 or 5 times a power of ten apart."""
    rough = max((high - low) / _NUM_TICKS, 1.0 if is_whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float, is_whole: bool) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= _NUM_TICKS // 2 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high and (tick >= 1 or not is_whole)]
