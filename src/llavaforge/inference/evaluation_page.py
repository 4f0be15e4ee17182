"""The page of an evaluation: the figures, and the worst samples with their images.

Comes in: what was measured. Goes out: `report.html`, which opens offline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llavaforge.data.load.loader import BadImage, PackDataset
from llavaforge.report.page import render
from llavaforge.report.pictures import thumbnail_url

_NUM_WORST = 24


class Card(NamedTuple):
    """A sample that is shown: its line of samples.jsonl and its images as data URLs."""

    line: Mapping[str, Any]
    urls: list[str]


def evaluation_page(
    dataset: PackDataset,
    rows: npt.NDArray[np.int64],
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    metrics: Sequence[str],
) -> str:
    """Return the page.

    Args:
        dataset: that was measured.
        rows: of its index, for each line.
        lines: of samples.jsonl.
        summary: of summary.json.
        metrics: that were measured; the first one tells which samples are the worst.
    """

    def badness(number: int) -> tuple[float, float]:
        line = lines[number]
        return -line[metrics[0]] if metrics else 0.0, line["loss"]

    worst = sorted(range(len(lines)), key=badness, reverse=True)[:_NUM_WORST]
    values = {name: value for name, value in summary.items() if isinstance(value, float)}
    intervals = summary["intervals"]
    return render(
        Path(__file__).parent / "evaluation.html.jinja",
        summary=summary,
        rows=[(name, f"{value:.4g}", _between(intervals.get(name))) for name, value in values.items()],
        cards=[Card(lines[number], _pictures(dataset, int(rows[number]))) for number in worst],
        by=metrics[0] if metrics else "loss",
        metrics=metrics,
    )


def _between(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""


def _pictures(dataset: PackDataset, row: int) -> list[str]:
    try:
        return [thumbnail_url(pixels_CHW) for pixels_CHW in dataset.pixels(dataset.index.row(row))]
    except BadImage:  # it was there a moment ago
        return []
