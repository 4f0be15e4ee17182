"""Histograms as inline SVG, which take their colours from the page (`style.css`) and so follow light and dark.

Comes in: whole numbers. Goes out: `Markup` for a page's template.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from llavaforge.report.page import count
from llavaforge.report.svg import TEXT, svg_style, to_svg

_NUM_BINS = 40
_LONG_TAIL = 20  # times the median: a linear axis would leave nearly all bars in its first pixels
_FAR = 3  # times the largest value: a mark beyond is named at the edge instead of stretching the axis
_BAR, _MARK = "#000001", "#000002"
_COLOURS = {_BAR: "var(--bar)", _MARK: "var(--bad-ink)", TEXT: "var(--faint)"}  # what is drawn and what it becomes
_FIGURE = Markup('<figure class="chart"><figcaption>{}</figcaption>{}<p class="faint">{}</p></figure>')


def histogram(values: npt.NDArray[np.integer[Any]], title: str, unit: str, max_length: int | None = None) -> Markup:
    """Draw how often values occur, on a logarithmic axis if all are above zero and some far above most.

    Args:
        values: one-dimensional; may be empty or all the same.
        title: what is counted, such as `Length of samples`.
        unit: of the values, such as `tokens`.
        max_length: a value to mark.

    Returns:
        A `<figure>`; each bar tells its range and number under the pointer.
    """
    if not values.size:
        return _FIGURE.format(title, "", "No values.")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, median, high = int(values.min()), float(np.median(values)), int(values.max())
    width = -(-(high + 1 - low) // _NUM_BINS)
    edges = np.arange(low, high + 1 + width, width)
    if is_log := low > 0 and high > _LONG_TAIL * median:
        edges = np.unique(np.geomspace(low, high + 1, _NUM_BINS + 1).round().astype(int))
    counts = np.histogram(values, edges)[0]
    with svg_style():
        figure = Figure(figsize=(7.2, 2.2), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(edges[:-1] - 0.5, counts, np.diff(edges), align="edge", color=_BAR, edgecolor=_BAR)
        for bar, begin, end, number in zip(bars, edges[:-1], edges[1:] - 1, counts, strict=True):
            bar.set_linewidth(2 if number else 0)  # the outline shows one value beside a million
            bar.set_gid(f"{count(begin)}{f' to {count(end)}' if end > begin else ''} {unit}: {count(number)}")
        axes.set(xscale="log" if is_log else "linear", xmargin=0, xlabel=unit, ylabel="number")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if is_log else MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        if max_length:
            is_far = max_length > _FAR * high
            name = f"max_length {count(max_length)}{' (outside)' if is_far else ''}"
            if not is_far:
                axes.axvline(max_length, color=_MARK, linestyle="--", linewidth=1)
            place = high + 0.5 if is_far else max_length
            axes.text(place, 1, name, transform=axes.get_xaxis_transform(), color=_MARK, ha="right", va="bottom")
        svg = to_svg(figure, _COLOURS)
    summary = f"smallest {count(low)}, median {count(median)}, largest {count(high)} {unit}"
    return _FIGURE.format(title, svg, f"{count(values.size)} values; {summary}")
